"""Sixteen weights at a time, for loops that numba compiles: what is done with a vector, in LLVM's instructions.

LLVM makes narrow vectors of loops over codes, or none. Its instructions for vectors are the same for all CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# Weights of a vector; codes that are numbers themselves: integers less half of all of them, floats of 8 bits, e4m3, and
# those of 16 or 32, which are no codes: bfloat16 and float32.
LANES, INTEGERS, FLOATS, PLAIN = 16, 0, -1, -2
# Which instructions these are: numba takes what it has kept of a loop as long as that loop's own file is as old.
FILES = [Path(__file__).with_name(f"{name}.py") for name in ("vectors", "halves", "tiles", "loops")]
STAMP = f"{crc32(b''.join(file.read_bytes() for file in FILES)):08x}"
OCTET, HALF, WORD, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


class Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def __str__(self) -> str:
        """Return LLVM's name."""
        return "bfloat"


class Sixteen(numba.types.Type):
    """A vector of sixteen float32, as a variable of loops."""


BFLOAT, SIXTEEN = Bfloat(), Sixteen("Sixteen")
# numba holds such a vector as LLVM does.
register_model(Sixteen)(lambda manager, kind: models.PrimitiveModel(manager, kind, of(FLOAT)))


def instructions(made: Any) -> Callable[..., Any]:
    """Return a function for loops; `made` gives its type, for those of its arguments, and what writes it for LLVM."""
    return intrinsic(prefer_literal=True)(made)


def has(context: Any, feature: str) -> bool:
    """Return whether the CPU that loops are compiled for has what LLVM calls so."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


def called(builder: Any, name: str, kind: ir.Type, *given: Any, **options: Any) -> Any:
    """Return what one of LLVM's functions gives, of a type."""
    function = ir.FunctionType(kind, [each.type for each in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}"), given, **options)


def of(kind: ir.Type, count: int = LANES) -> ir.VectorType:
    """Return the type of a vector."""
    return ir.VectorType(kind, count)


def _all(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(of(kind), [value] * LANES)


def _shuffled(builder: Any, vector: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(of(WORD, len(places)), places))


def spread(builder: Any, number: Any, count: int = LANES) -> Any:
    """Return a vector of one number."""
    first = builder.insert_element(ir.Constant(of(number.type), ir.Undefined), number, WORD(0))
    return _shuffled(builder, first, [0] * count)


def place(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Return where an array's numbers from one on lie, as a pointer to another type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def read(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Return the vector that lies in an array from one of its numbers on."""
    found = builder.load(place(context, builder, kind, array, at, vector))
    found.align = 1
    return found


def divided(builder: Any, number: Any, by: int) -> Any:
    """Return a whole number over one of which it is a multiple."""
    return builder.udiv(number, number.type(by), flags=["exact"])


def codes_of(context: Any, builder: Any, row: Any, array: Any, at: Any, bits: int, count: int = LANES) -> Any:
    """Return so many codes of a row, as numbers of 16 bits, from one on, a multiple of that."""
    words = words_of(context, builder, row, array, at, bits, count)
    return builder.and_(words, ir.Constant(words.type, [(1 << bits) - 1] * count))


def words_of(context: Any, builder: Any, row: Any, array: Any, at: Any, bits: int, count: int) -> Any:
    """Return the same with bits of other codes above them."""
    start = builder.mul(divided(builder, at, count), at.type(count * bits // 8))
    octets = read(context, builder, row, array, start, of(OCTET, count * bits // 8))
    # A code lies within two bytes, as a number of which it is shifted to the first bit.
    firsts = [bits * lane // 8 for lane in range(count)]
    pairs = [min(octet, octets.type.count - 1) for first in firsts for octet in (first, first + 1)]
    words = builder.bitcast(_shuffled(builder, octets, pairs), of(HALF, count))
    shifts = ir.Constant(words.type, [bits * lane % 8 for lane in range(count)])
    return builder.lshr(words, shifts)


def _widened(builder: Any, halves: Any) -> Any:
    words = builder.shl(builder.zext(halves, of(WORD)), _all(WORD, 16))
    return builder.bitcast(words, of(FLOAT))


def _float8(builder: Any, octets: Any) -> Any:
    # e4m3, moved to its places in a float32, is 2^(7 - 127) of what it stands for; all ones stand for no number.
    word = builder.zext(octets, of(WORD))
    size, sign = builder.and_(word, _all(WORD, 0x7F)), builder.and_(word, _all(WORD, 0x80))
    none, size = builder.icmp_unsigned("==", size, _all(WORD, 0x7F)), builder.shl(size, _all(WORD, 20))
    word = builder.or_(builder.select(none, _all(WORD, 0x7FC00000), size), builder.shl(sign, _all(WORD, 24)))
    return builder.fmul(builder.bitcast(word, of(FLOAT)), _all(FLOAT, 2.0**120))


@instructions
def told(_typing: Any, bits: Any, numbers: Any, row: Any, table: Any, at: Any) -> Any:
    """Return the weights from one on, a multiple of sixteen; bits and numbers as `loops.products` has them."""
    width, each = bits.literal_value, numbers.literal_value

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        at, count = given[4], LANES // max(each, 1)
        start = builder.mul(builder.udiv(at, at.type(LANES)), at.type(count * width // 8))
        if each == PLAIN:
            found = read(context, builder, row, given[2], start, of(FLOAT if width == 32 else HALF))
            return found if width == 32 else _widened(builder, found)
        if each == FLOATS:
            return _float8(builder, read(context, builder, row, given[2], start, of(OCTET)))
        if each == INTEGERS:
            codes = builder.zext(codes_of(context, builder, row, given[2], at, width), of(WORD))
            return builder.fsub(builder.sitofp(codes, of(FLOAT)), _all(FLOAT, 2.0 ** (width - 1)))
        if each == 2 and has(context, "avx512f"):
            # Eight codes at once: the table's entries are taken as numbers of eight bytes.
            codes = builder.zext(read(context, builder, row, given[2], start, of(OCTET, count)), of(WORD, count))
            entries, first = of(ir.IntType(64), count), place(context, builder, table, given[3], at.type(0), OCTET)
            none, every = ir.Constant(entries, ir.Undefined), ir.Constant(of(ir.IntType(1), count), [1] * count)
            found = called(builder, "x86.avx512.mask.gather.dpq.512", entries, none, first, codes, every, WORD(8))
            return builder.bitcast(found, of(FLOAT))
        found, kind = [], OCTET if width == 8 else HALF
        for part in range(count):
            code = read(context, builder, row, given[2], builder.add(start, at.type(width * part // 8)), kind)
            code = builder.and_(builder.lshr(code, kind(width * part % 8)), kind((1 << width) - 1))
            entry = builder.mul(builder.zext(code, at.type), at.type(each))
            found.append(read(context, builder, table, given[3], entry, of(FLOAT, each)))
        while len(found) > 1:
            places = ir.Constant(of(WORD, 2 * found[0].type.count), [*range(2 * found[0].type.count)])
            found = [builder.shuffle_vector(*pair, places) for pair in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    return SIXTEEN(bits, numbers, row, table, at), made


@instructions
def zeros(_typing: Any) -> Any:
    """Return sixteen zeros."""
    return SIXTEEN(), lambda *_: _all(FLOAT, 0.0)


@instructions
def loaded(_typing: Any, array: Any, at: Any) -> Any:
    """Return the numbers of an array from one on."""
    return SIXTEEN(array, at), lambda context, builder, _, given: read(
        context, builder, array, given[0], given[1], of(FLOAT)
    )


@instructions
def scaled(_typing: Any, sixteen: Any, less: Any, by: Any) -> Any:
    """Return (w - z) s."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        less, by = (spread(builder, number) for number in given[1:])
        return builder.fmul(builder.fsub(given[0], less), by)

    return SIXTEEN(SIXTEEN, numba.float32, numba.float32), made


@instructions
def plus(_typing: Any, sums: Any, sixteen: Any, others: Any) -> Any:
    """Return sums + w x, x sixteen numbers or one."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        x = given[2] if others == SIXTEEN else spread(builder, given[2])
        return builder.fadd(given[0], builder.fmul(given[1], x, flags=["contract"]), flags=["contract"])

    return SIXTEEN(SIXTEEN, SIXTEEN, others), made


@instructions
def minus(_typing: Any, sums: Any, by: Any, less: Any, others: Any) -> Any:
    """Return sums - s z x, sixteen numbers each."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        sums, by, less, x = given
        return builder.fsub(sums, builder.fmul(builder.fmul(by, less), x), flags=["contract"])

    return SIXTEEN(SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN), made


@instructions
def total(_typing: Any, sixteen: Any) -> Any:
    """Return the sum of all sixteen."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return called(builder, f"vector.reduce.fadd.v{LANES}f32", FLOAT, FLOAT(0.0), given[0], fastmath=["reassoc"])

    return numba.float32(SIXTEEN), made


@instructions
def stored(_typing: Any, array: Any, at: Any, sixteen: Any) -> Any:
    """Write numbers into an array from one on, into one of 16 bits as the bits of bfloat16."""
    halved = array.dtype.bitwidth == 16

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        found = given[2]
        # One instruction where there is one: what is below 2^-126 is zero then.
        if halved and has(context, "avx512bf16"):
            found = builder.bitcast(builder.fptrunc(found, of(BFLOAT)), of(HALF))
        elif halved:
            # The upper half of a float32: half a unit of its last place is added, less where a tie is even.
            word = builder.bitcast(found, of(WORD))
            even = builder.and_(builder.lshr(word, _all(WORD, 16)), _all(WORD, 1))
            word = builder.add(builder.add(word, _all(WORD, 0x7FFF)), even)
            found = builder.trunc(builder.lshr(word, _all(WORD, 16)), of(HALF))
        builder.store(found, place(context, builder, array, given[0], given[1], found.type)).align = 1
        return context.get_dummy_value()

    return numba.void(array, at, SIXTEEN), made
