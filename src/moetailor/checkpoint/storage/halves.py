"""Thirty-two weights at a time in bfloat16, for loops that numba compiles, where vectors multiply pairs of these.

Codes that stand for two weights each are looked up in vectors, too, which gathers nothing from memory: the first
weights of thirty-two codes come first, then the second ones, and inputs are to lie in the same order.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from moetailor.checkpoint.storage.vectors import (
    BFLOAT,
    FLOAT,
    FLOATS,
    HALF,
    INTEGERS,
    LANES,
    OCTET,
    PLAIN,
    SIXTEEN,
    WORD,
    called,
    codes_of,
    divided,
    has,
    instructions,
    of,
    place,
    read,
    spread,
    words_of,
)

# Weights of a vector. What an integer may be told with added, 2^7: its bits are those of the number in bfloat16 then.
DEPTH, MORE = 2 * LANES, 128
# Added to how many weights a code of 8 bits stands for: it is looked up byte by byte, 64 codes at a time.
BYTES = -16
NEEDED = ("avx512bw", "avx512vl", "avx512bf16")
# Whether there are such vectors: numba may compile for another CPU than this one.
ARE_HERE = all(has(cpu_target.target_context, each) for each in NEEDED)
IN_BYTES = has(cpu_target.target_context, "avx512vbmi")
COUNT = ir.IntType(64)


def order(numbers: int) -> np.ndarray:
    """Return in which order weights are told, and inputs are to lie: as many as are told at once.

    Args:
        numbers: that a code stands for in a table, or one of the constants that say how codes are told.
    """
    each, code_V32 = numbers, np.arange(DEPTH)[None]
    if each_of_bytes(numbers):  # as bytes of sixteen codes lie when they are made words
        each, code_V32 = each_of_bytes(numbers), np.arange(2 * DEPTH).reshape(4, 2, 8).swapaxes(0, 1).reshape(2, DEPTH)
    elif numbers != 2:
        return np.arange(DEPTH)
    return np.concatenate([(each * code_V32 + number).flatten() for number in range(each)])


def each_of_bytes(numbers: int) -> int:
    """Return how many weights a code stands for that is looked up byte by byte; none for others."""
    return max(numbers - BYTES, 0) if numbers < PLAIN else 0


def _all(number: int) -> ir.Constant:
    return ir.Constant(of(HALF, DEPTH), [number] * DEPTH)


def _permuted(builder: Any, table: Any, codes: Any) -> Any:
    # Of a code five bits count: a shorter table is there several times.
    return called(builder, "x86.avx512.permvar.hi.512", of(HALF, DEPTH), table, codes)


def _from_registers(context: Any, builder: Any, codes: Any, bits: int, table: Any, array: Any, first: int) -> Any:
    kind, found = of(HALF, DEPTH), []
    if bits <= 5:
        return _permuted(builder, read(context, builder, table, array, COUNT(first), kind), codes)
    # Two vectors of the table are looked up at once; the codes' upper bits say which of these count.
    for at in range(first, first + (1 << bits), 2 * DEPTH):
        low, high = (read(context, builder, table, array, COUNT(at + more), kind) for more in (0, DEPTH))
        found.append(called(builder, "x86.avx512.vpermi2var.hi.512", kind, low, codes, high))
    for bit in range(6, bits):
        is_set = builder.icmp_unsigned("!=", builder.and_(codes, _all(1 << bit)), _all(0))
        found = [builder.select(is_set, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _from_bytes(context: Any, builder: Any, codes: Any, table: Any, array: Any, number: int) -> list[Any]:
    # The same of 64 codes of 8 bits, byte by byte: upper and lower ones of a number lie in tables of their own.
    kind, planes = of(OCTET, 2 * DEPTH), []
    upper = builder.icmp_signed("<", codes, ir.Constant(kind, [0] * 2 * DEPTH))
    for plane in (2 * number, 2 * number + 1):
        four = [read(context, builder, table, array, COUNT(128 * plane + DEPTH * at), kind) for at in range(4)]
        both = [
            called(builder, "x86.avx512.vpermi2var.qi.512", kind, low, codes, high)
            for low, high in (four[:2], four[2:])
        ]
        planes.append(builder.select(upper, both[1], both[0]))
    found = []
    for half in (0, 8):
        places = [16 * lane + half + at + more for lane in range(4) for at in range(8) for more in (0, 2 * DEPTH)]
        words = builder.shuffle_vector(*planes, ir.Constant(of(WORD, 2 * DEPTH), places))
        found.append(builder.bitcast(words, of(HALF, DEPTH)))
    return found


def _from_memory(
    context: Any, builder: Any, row: Any, array: Any, first: Any, each: int, table: Any, numbers: Any
) -> Any:
    # Codes of 8 bits, each of several numbers.
    found = []
    for code in range(DEPTH // each):
        octet = read(context, builder, row, array, builder.add(first, COUNT(code)), OCTET)
        entry = builder.mul(builder.zext(octet, COUNT), COUNT(each))
        found.append(read(context, builder, table, numbers, entry, of(HALF, each)))
    while len(found) > 1:
        places = ir.Constant(of(WORD, 2 * found[0].type.count), [*range(2 * found[0].type.count)])
        found = [builder.shuffle_vector(*pair, places) for pair in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def shifts(bits: int, numbers: int, parts: int) -> bool:
    """Return whether codes are told with `MORE` added, which takes less time, and precision that float32 has not."""
    return numbers == INTEGERS and bits < 8 and parts == 1


def _units(
    context: Any, builder: Any, row: Any, table: Any, given: Any, bits: int, each: int, parts: int = 0
) -> list[tuple[Any, int]]:
    """Return vectors of what the weights from one on are before scales, and which vector of inputs each is to meet."""
    array, at, numbers = given
    if each == PLAIN:
        return [(read(context, builder, row, array, builder.mul(at, at.type(2)), of(HALF, DEPTH)), 0)]
    many = each_of_bytes(each)
    first = divided(builder, at, many or max(each, 1))
    if each > 2:
        return [(_from_memory(context, builder, row, array, first, each, table, numbers), 0)]
    if many:
        codes = read(context, builder, row, array, first, of(OCTET, 2 * DEPTH))
        every = (one for number in range(many) for one in _from_bytes(context, builder, codes, table, numbers, number))
        return [(found, number) for number, found in enumerate(every)]
    if each == INTEGERS and bits == 8:  # 128 less turns the first bit
        octets = read(context, builder, row, array, first, of(OCTET, DEPTH))
        signed = builder.xor(octets, ir.Constant(octets.type, [128] * DEPTH))
        found = builder.fptrunc(builder.sitofp(signed, of(FLOAT, DEPTH)), of(BFLOAT, DEPTH))
        return [(builder.bitcast(found, of(HALF, DEPTH)), 0)]
    if shifts(bits, each, parts):  # 0x4300 is 2^7 with seven bits behind it
        codes = codes_of(context, builder, row, array, first, bits, DEPTH)
        return [(builder.or_(codes, _all(0x4300)), 0)]
    if each != FLOATS:
        codes = words_of(context, builder, row, array, first, bits, DEPTH)
        tables = ((at, at << max(bits, 5)) for at in range(max(each, 1)))
        return [(_from_registers(context, builder, codes, bits, table, numbers, first), at) for at, first in tables]
    codes = codes_of(context, builder, row, array, first, bits, DEPTH)
    lower, upper = builder.and_(codes, _all(127)), builder.and_(codes, _all(128))
    size = _from_registers(context, builder, lower, 7, table, numbers, 0)
    return [(builder.or_(size, builder.shl(upper, _all(8))), 0)]


def _dotted(context: Any, builder: Any, sums: Any, left: Any, x: Any, array: Any, at: Any) -> Any:
    right = read(context, builder, x, array, divided(builder, at, 2), of(WORD))
    halves = (builder.bitcast(each, of(BFLOAT, DEPTH)) for each in (left, right))
    return called(builder, "x86.avx512bf16.dpbf16ps.512", of(FLOAT), sums, *halves)


@instructions
def dotted(_typing: Any, bits: Any, numbers: Any, parts: Any, row: Any, at: Any, table: Any, x: Any, sums: Any) -> Any:
    """Return sums + w x of the weights from one on before scales, for each part of x, pairs of bfloat16 as words."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        at, count = given[4], parts.literal_value
        sums, kind = cgutils.unpack_tuple(builder, given[7]), (bits.literal_value, numbers.literal_value, count)
        for left, number in _units(context, builder, row, table, (given[3], at, given[5]), *kind):
            for part in range(count):
                first = builder.add(builder.mul(at, at.type(count)), at.type(DEPTH * (count * number + part)))
                sums[part] = _dotted(context, builder, sums[part], left, x, given[6], first)
        return cgutils.pack_array(builder, sums)

    return sums(bits, numbers, parts, row, at, table, x, sums), made


@instructions
def nothing(_typing: Any, parts: Any) -> Any:
    """Return zeros for each part."""

    def made(_context: Any, builder: Any, _signature: Any, _given: Any) -> Any:
        return cgutils.pack_array(builder, [ir.Constant(of(FLOAT), [0.0] * LANES)] * parts.literal_value)

    return numba.types.UniTuple(SIXTEEN, parts.literal_value)(parts), made


@instructions
def joined(_typing: Any, sums: Any) -> Any:
    """Return the sum over all parts."""

    def made(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return reduce(builder.fadd, cgutils.unpack_tuple(builder, given[0]))

    return SIXTEEN(sums), made


@instructions
def added(_typing: Any, x: Any, at: Any, sums: Any) -> Any:
    """Return sums + x."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return _dotted(context, builder, given[2], _all(0x3F80), x, given[0], given[1])

    return SIXTEEN(x, at, SIXTEEN), made


@instructions
def spelled(_typing: Any, bits: Any, numbers: Any, row: Any, at: Any, table: Any, by: Any, out: Any, to: Any) -> Any:
    """Write what codes of a table stand for, times a scale, into a row of tiles, from one place on."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        to, by, kind = given[7], spread(builder, given[5], DEPTH), (bits.literal_value, numbers.literal_value)
        for units, number in _units(context, builder, row, table, (given[2], given[3], given[4]), *kind):
            words = builder.shl(builder.zext(units, of(WORD, DEPTH)), ir.Constant(of(WORD, DEPTH), [16] * DEPTH))
            found = builder.fmul(builder.bitcast(words, of(FLOAT, DEPTH)), by)
            found = builder.bitcast(builder.fptrunc(found, of(BFLOAT, DEPTH)), of(HALF, DEPTH))
            where = builder.add(to, to.type(LANES * DEPTH * number))
            builder.store(found, place(context, builder, out, given[6], where, found.type)).align = 1
        return context.get_dummy_value()

    return numba.void(bits, numbers, row, at, table, numba.float32, out, to), made


@instructions
def levels(_typing: Any, bits: Any, less: Any, by: Any) -> Any:
    """Return what all integers of at most five bits stand for, s (q - z), as DEPTH numbers of bfloat16."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        half = 1 << (bits.literal_value - 1)
        units = ir.Constant(of(FLOAT, DEPTH), [float(code % (2 * half) - half) for code in range(DEPTH)])
        less, by = (spread(builder, number, DEPTH) for number in given[1:])
        found = builder.fptrunc(builder.fmul(builder.fsub(units, less), by), of(BFLOAT, DEPTH))
        return builder.bitcast(found, of(FLOAT))

    return SIXTEEN(bits, numba.float32, numba.float32), made


@instructions
def looked_up(_typing: Any, bits: Any, row: Any, at: Any, levels: Any, out: Any, to: Any) -> Any:
    """Write what DEPTH codes stand for into an array, looked up at once."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        codes, kind = words_of(context, builder, row, given[1], given[2], bits.literal_value, DEPTH), of(HALF, DEPTH)
        found = _permuted(builder, builder.bitcast(given[3], kind), codes)
        builder.store(found, place(context, builder, out, given[4], given[5], kind)).align = 1
        return context.get_dummy_value()

    return numba.void(bits, row, at, levels, out, to), made
