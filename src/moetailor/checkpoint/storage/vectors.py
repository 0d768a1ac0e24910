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

# Weights of a vector; codes that are numbers themselves: integers less half of all of them, and floats of 8 bits, e4m3.
LANES, INTEGERS, FLOATS = 16, 0, -1
# Which instructions these are: numba takes what it has kept of a loop as long as that loop's own file is as old.
STAMP = f"{crc32(Path(__file__).read_bytes()):08x}"
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
register_model(Sixteen)(lambda manager, kind: models.PrimitiveModel(manager, kind, _of(FLOAT)))


def _instructions(made: Any) -> Callable[..., Any]:
    """Return a function for loops; `made` gives its type, for those of its arguments, and what writes it for LLVM."""
    return intrinsic(prefer_literal=True)(made)


def _of(kind: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(kind, count)


def _all(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(_of(kind), [value] * LANES)


def _shuffled(builder: Any, vector: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(_of(WORD, len(places)), places))


def _spread(builder: Any, number: Any) -> Any:
    first = builder.insert_element(ir.Constant(_of(FLOAT), ir.Undefined), number, WORD(0))
    return _shuffled(builder, first, [0] * LANES)


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _read(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    found = builder.load(_place(context, builder, kind, array, at, vector))
    found.align = 1
    return found


def _integers(builder: Any, octets: Any, bits: int) -> Any:
    # A code lies within two bytes, as a number of which it is shifted to the first bit.
    firsts = [bits * lane // 8 for lane in range(LANES)]
    pairs = [min(octet, octets.type.count - 1) for first in firsts for octet in (first, first + 1)]
    words = builder.bitcast(_shuffled(builder, octets, pairs), _of(HALF))
    shifts = ir.Constant(words.type, [bits * lane % 8 for lane in range(LANES)])
    codes = builder.zext(builder.and_(builder.lshr(words, shifts), _all(HALF, (1 << bits) - 1)), _of(WORD))
    return builder.fsub(builder.sitofp(codes, _of(FLOAT)), _all(FLOAT, 2.0 ** (bits - 1)))


def _float8(builder: Any, octets: Any) -> Any:
    # e4m3, moved to its places in a float32, is 2^(7 - 127) of what it stands for; all ones stand for no number.
    word = builder.zext(octets, _of(WORD))
    size, sign = builder.and_(word, _all(WORD, 0x7F)), builder.and_(word, _all(WORD, 0x80))
    none, size = builder.icmp_unsigned("==", size, _all(WORD, 0x7F)), builder.shl(size, _all(WORD, 20))
    word = builder.or_(builder.select(none, _all(WORD, 0x7FC00000), size), builder.shl(sign, _all(WORD, 24)))
    return builder.fmul(builder.bitcast(word, _of(FLOAT)), _all(FLOAT, 2.0**120))


@_instructions
def told(_typing: Any, bits: Any, numbers: Any, row: Any, table: Any, at: Any) -> Any:
    """Return the weights from one on, a multiple of sixteen; bits and numbers as `loops.products` has them."""
    width, each = bits.literal_value, numbers.literal_value

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        at, count = given[4], LANES // max(each, 1)
        start = builder.mul(builder.udiv(at, at.type(LANES)), at.type(count * width // 8))
        if each in (INTEGERS, FLOATS):
            octets = _read(context, builder, row, given[2], start, _of(OCTET, count * width // 8))
            return _float8(builder, octets) if each == FLOATS else _integers(builder, octets, width)
        found, kind = [], OCTET if width == 8 else HALF
        for part in range(count):
            code = _read(context, builder, row, given[2], builder.add(start, at.type(width * part // 8)), kind)
            code = builder.and_(builder.lshr(code, kind(width * part % 8)), kind((1 << width) - 1))
            place = builder.mul(builder.zext(code, at.type), at.type(each))
            found.append(_read(context, builder, table, given[3], place, _of(FLOAT, each)))
        while len(found) > 1:
            places = ir.Constant(_of(WORD, 2 * found[0].type.count), [*range(2 * found[0].type.count)])
            found = [builder.shuffle_vector(*pair, places) for pair in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    return SIXTEEN(bits, numbers, row, table, at), made


@_instructions
def zeros(_typing: Any) -> Any:
    """Return sixteen zeros."""
    return SIXTEEN(), lambda *_: _all(FLOAT, 0.0)


@_instructions
def loaded(_typing: Any, array: Any, at: Any) -> Any:
    """Return the numbers of an array from one on."""
    return SIXTEEN(array, at), lambda context, builder, _, given: _read(
        context, builder, array, given[0], given[1], _of(FLOAT)
    )


@_instructions
def scaled(_typing: Any, sixteen: Any, less: Any, by: Any) -> Any:
    """Return (w - z) s."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        less, by = (_spread(builder, number) for number in given[1:])
        return builder.fmul(builder.fsub(given[0], less), by)

    return SIXTEEN(SIXTEEN, numba.float32, numba.float32), made


@_instructions
def plus(_typing: Any, sums: Any, sixteen: Any, others: Any) -> Any:
    """Return sums + w x, x sixteen numbers or one."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        x = given[2] if others == SIXTEEN else _spread(builder, given[2])
        return builder.fadd(given[0], builder.fmul(given[1], x, flags=["contract"]), flags=["contract"])

    return SIXTEEN(SIXTEEN, SIXTEEN, others), made


@_instructions
def total(_typing: Any, sixteen: Any) -> Any:
    """Return the sum of all sixteen."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(FLOAT, [FLOAT, _of(FLOAT)])
        summed = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(summed, [FLOAT(0.0), given[0]], fastmath=["reassoc"])

    return numba.float32(SIXTEEN), made


@_instructions
def stored(_typing: Any, array: Any, at: Any, sixteen: Any) -> Any:
    """Write numbers into an array from one on, into one of 16 bits as the bits of bfloat16."""
    halved = array.dtype.bitwidth == 16

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        found = given[2]
        # One instruction where there is one: what is below 2^-126 is zero then.
        if halved and "+avx512bf16" in context.codegen().magic_tuple()[2]:
            found = builder.bitcast(builder.fptrunc(found, _of(BFLOAT)), _of(HALF))
        elif halved:
            # The upper half of a float32: half a unit of its last place is added, less where a tie is even.
            word = builder.bitcast(found, _of(WORD))
            even = builder.and_(builder.lshr(word, _all(WORD, 16)), _all(WORD, 1))
            word = builder.add(builder.add(word, _all(WORD, 0x7FFF)), even)
            found = builder.trunc(builder.lshr(word, _all(WORD, 16)), _of(HALF))
        builder.store(found, _place(context, builder, array, given[0], given[1], found.type)).align = 1
        return context.get_dummy_value()

    return numba.void(array, at, SIXTEEN), made
