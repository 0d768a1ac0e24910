"""Loops over rows of codes, which numba compiles; shapes: see `compiled`.

All are in one file: numba takes what it has kept of a function as long as the function's own file is as old.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic


def _compiled(function: Any, **options: Any) -> Any:
    """Return a function compiled when it is first called, and kept on the disk where there is a folder for that."""
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


# What is called for each row or group: a call would count the references of its arrays, as a slice does. Whole numbers
# that are computed with become 64 bits wide, and indices that may be negative are looked at: hence the casts.
_inlined = partial(_compiled, inline="always")
# Sums that may be taken in any order, which vectors need.
_summing = partial(_compiled, fastmath={"reassoc", "contract"})


@_inlined
def _across(bits, row, units):
    # Bits are a constant of each call, for which the loops are unrolled. Functions made for each of them would have one
    # name, under which what numba kept of one is taken for another.
    mask, half = np.uint64((1 << bits) - 1), np.float32(1 << bits - 1)
    # Eight lie in as many bytes as one has bits; the last ones may have fewer, where no more of them are. The words are
    # kept behind what they stand for, which fills half of the room at most, as a row is whole words of 32 bits: loops
    # over all of them become vectors, one that does both does not.
    words, whole = units[len(units) // 2 :].view(np.uint64), len(row) // bits
    for eight in range(whole):
        words[eight] = 0
        for octet in range(bits):
            words[eight] |= np.uint64(row[eight * bits + octet]) << np.uint64(8 * octet)
    words[whole] = 0
    for octet in range(len(row) - whole * bits):
        words[whole] |= np.uint64(row[whole * bits + octet]) << np.uint64(8 * octet)
    for eight in range(whole + (len(row) > whole * bits)):
        for each in range(8):
            code = np.uint8(words[eight] >> np.uint64(bits * each) & mask)
            units[8 * eight + each] = np.float32(code) - half


# Compiled once, and called: within each of the loops it took half of the seconds that compiling them takes.
@_compiled
def _told(bits, row, units):
    if bits == 8:
        for at in range(len(row)):
            units[at] = np.float32(row[at]) - np.float32(128)
    elif bits == 4:
        for at in range(len(row)):
            units[2 * at] = np.float32(np.uint8(row[at] & np.uint8(15))) - np.float32(8)
            units[2 * at + 1] = np.float32(np.uint8(row[at] >> np.uint8(4))) - np.float32(8)
    elif bits == 2:
        for at in range(len(row)):
            for each in range(4):
                units[4 * at + each] = np.float32(np.uint8(row[at] >> np.uint8(2 * each) & np.uint8(3))) - np.float32(2)
    elif bits == 3:
        _across(3, row, units)
    elif bits == 5:
        _across(5, row, units)
    elif bits == 6:
        _across(6, row, units)
    else:
        _across(7, row, units)


@_inlined
def _floats(row, words, units):
    # e4m3, moved to its places in a float32, is 2^(7 - 127) of what it stands for; all ones stand for no number.
    for at in range(len(row)):
        size, sign = np.uint32(np.uint8(row[at] & np.uint8(0x7F))), np.uint32(np.uint8(row[at] & np.uint8(0x80)))
        word = np.uint32(0x7F800001) if size == np.uint32(0x7F) else np.uint32(size << np.uint32(20))
        words[at] = word | sign << np.uint32(24)
    for at in range(len(row)):
        units[at] *= np.float32(2.0**120)


@_inlined
def _looked_up(bits, elements, row, table, units, cells):
    # Cells are the same place as units, in elements of the table.
    if elements == 0:
        _told(bits, row, units)
    elif elements == -1:
        _floats(row, cells, units)
    elif bits == 6:
        # Three bytes have four codes, two look-ups; where a row ends with one or two bytes they are one look-up.
        whole = len(row) // 3
        for three in range(whole):
            low, middle, high = np.int32(row[3 * three]), np.int32(row[3 * three + 1]), np.int32(row[3 * three + 2])
            cells[2 * three] = table[low | (middle & np.int32(15)) << np.int32(8)]
            cells[2 * three + 1] = table[middle >> np.int32(4) | high << np.int32(4)]
        if len(row) % 3:
            high = np.int32(row[len(row) - 1]) << np.int32(8) if len(row) % 3 == 2 else np.int32(0)
            cells[2 * whole] = table[(np.int32(row[3 * whole]) | high) & np.int32(4095)]
    elif elements == 1:
        for at in range(len(row)):
            cells[at] = table[row[at]]
    else:
        for at in range(len(row)):
            cells[2 * at] = table[2 * np.int64(row[at])]
            cells[2 * at + 1] = table[2 * np.int64(row[at]) + 1]


def _seen_as(kind: Any, _context: Any, given: Any) -> Any:
    """Return what the bits of a number mean as one of another kind: by way of an array it would take a loop more."""
    found = kind(given)
    return found, lambda context, builder, _, args: builder.bitcast(args[0], context.get_value_type(kind))


_bits: Any = intrinsic(lambda context, number: _seen_as(numba.uint32, context, number))
_float: Any = intrinsic(lambda context, word: _seen_as(numba.float32, context, word))


@_inlined
def _halved(word):
    # The upper half of a float32 is a bfloat16: half a unit of its last place is added, less where a tie is even.
    even = word >> np.uint32(16) & np.uint32(1)
    return np.uint16(word + np.uint32(0x7FFF) + even >> np.uint32(16))


@_inlined
def _of_groups(bits, scale, zero, n, o, by, less):
    # Scales in bfloat16 come as their bits; zero points are codes in words that lie along the outputs.
    at, shift, mask = np.uint64(o * bits // 32), np.uint32(o * bits % 32), np.uint32((1 << bits) - 1)
    for g in range(len(by)):
        half = scale.itemsize == 2
        by[g] = _float(np.uint32(np.uint32(scale[n, o, g]) << np.uint32(16))) if half else scale[n, o, g]
    for g in range(zero.shape[2]):
        code = zero[n, at, g] >> shift
        if shift + bits > 32:
            code |= zero[n, at + np.uint64(1), g] << np.uint32(32 - shift)
        less[g] = np.float32(np.uint32(code) & mask) - np.float32(1 << bits - 1)


@_compiled
def _room(octets):
    # A byte stands for eight weights at most.
    return np.zeros(8 * octets.shape[2], np.float32)


@_summing
def products(bits, elements, octets, table, scale, zero, size, x, out, first, last):
    """Fill some outputs of x W^T, out [n, P, O]."""
    (_, count, inputs), groups = x.shape, scale.shape[2]
    units = _room(octets)
    cells = units.view(table.dtype)
    # Integers of 8 and 4 bits are multiplied as they are told; of 4, inputs of the lower halves of bytes lie together.
    straight = elements == 0 and (bits == 8 or (bits == 4 and size % 2 == 0))
    by, less = np.zeros(groups, np.float32), np.zeros(groups, np.float32)
    halves, sums = np.zeros((count, 2, (inputs + 1) // 2), np.float32), np.zeros((count, groups), np.float32)
    for n in range(len(x)):
        for p in range(count):
            halves[p, 0], halves[p, 1, : inputs // 2] = x[n, p, ::2], x[n, p, 1::2]
            for g in range(groups if zero.size else 0):
                sums[p, g] = x[n, p, g * size : (g + 1) * size].sum()
        for o in range(first, last):
            row = octets[n, o]
            _of_groups(bits, scale, zero, n, o, by, less)
            if not straight:
                _looked_up(bits, elements, row, table, units, cells)
            for p in range(count):
                given, low, high, total = x[n, p], halves[p, 0], halves[p, 1], np.float32(0)
                for g in range(groups):
                    each, start, stop = np.float32(0), np.uint64(g * size), np.uint64(min((g + 1) * size, inputs))
                    if not straight:
                        for at in range(start, stop):
                            each += units[at] * given[at]
                    elif bits == 8:
                        for at in range(start, stop):
                            each += (np.float32(row[at]) - np.float32(128)) * given[at]
                    else:
                        for at in range(start // np.uint64(2), (stop + np.uint64(1)) // np.uint64(2)):
                            each += (np.float32(np.uint8(row[at] & np.uint8(15))) - np.float32(8)) * low[at]
                            each += (np.float32(np.uint8(row[at] >> np.uint8(4))) - np.float32(8)) * high[at]
                    if zero.size:
                        each -= less[g] * sums[p, g]
                    total += each * by[g]
                out[n, p, o] = total


@_compiled
def numbers(bits, elements, octets, table, scale, zero, size, out, start, first, last):
    """Fill some rows of W, out [n, O, I] from one row on: the bits of float32 as uint32, or of bfloat16 as uint16."""
    units = _room(octets)
    cells = units.view(table.dtype)
    by, less = np.zeros(scale.shape[2], np.float32), np.zeros(scale.shape[2], np.float32)
    for n in range(len(out)):
        for o in range(first, last):
            _looked_up(bits, elements, octets[n, o], table, units, cells)
            _of_groups(bits, scale, zero, n, o, by, less)
            row = out[n, o - start]
            for g in range(len(by)):
                zero_point, times = less[g], by[g]
                for at in range(np.uint64(g * size), np.uint64(min((g + 1) * size, len(row)))):
                    word = _bits((units[at] - zero_point) * times)
                    row[at] = word if row.itemsize == 4 else _halved(word)
