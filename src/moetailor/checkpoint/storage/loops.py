"""Loops over rows of codes, which numba compiles; shapes: see `compiled`.

All are in one file: numba takes what it has kept of a function as long as the function's own file is as old.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np


def _compiled(function: Any, **options: Any) -> Any:
    """Return a function compiled when it is first called, and kept on the disk where there is a folder for that."""
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


# What is called for each row or group: a call would count the references of its arrays.
_inlined = partial(_compiled, inline="always")
# Sums that may be taken in any order, which vectors need.
_summing = partial(_compiled, fastmath={"reassoc", "contract"})


@_inlined
def _across(bits, row, units):
    # Bits are a constant of each call, for which the loops are unrolled. Functions made for each of them would have one
    # name, under which what numba kept of one is taken for another.
    mask, half = np.uint64((1 << bits) - 1), np.int32(1 << bits - 1)
    # Eight lie in as many bytes as one has bits; the last ones may have fewer, where no more of them are.
    whole = len(row) // bits
    for eight in range(whole):
        word = np.uint64(0)
        for octet in range(bits):
            word |= np.uint64(row[eight * bits + octet]) << np.uint64(8 * octet)
        for each in range(8):
            units[8 * eight + each] = np.float32(np.int32(word >> np.uint64(bits * each) & mask) - half)
    word = np.uint64(0)
    for octet in range(len(row) - whole * bits):
        word |= np.uint64(row[whole * bits + octet]) << np.uint64(8 * octet)
    for each in range(8 if len(row) > whole * bits else 0):
        units[8 * whole + each] = np.float32(np.int32(word >> np.uint64(bits * each) & mask) - half)


@_inlined
def _told(bits, row, units):
    if bits == 8:
        for at in range(len(row)):
            units[at] = np.float32(np.int32(row[at]) - np.int32(128))
    elif bits == 4:
        for at in range(len(row)):
            octet = np.int32(row[at])
            units[2 * at] = np.float32((octet & np.int32(15)) - np.int32(8))
            units[2 * at + 1] = np.float32((octet >> np.int32(4)) - np.int32(8))
    elif bits == 2:
        for at in range(len(row)):
            octet = np.int32(row[at])
            for each in range(4):
                units[4 * at + each] = np.float32((octet >> np.int32(2 * each) & np.int32(3)) - np.int32(2))
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
        octet = np.uint32(row[at])
        size = octet & np.uint32(0x7F)
        word = np.uint32(0x7F800001) if size == np.uint32(0x7F) else size << np.uint32(20)
        words[at] = word | (octet & np.uint32(0x80)) << np.uint32(24)
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
    halves, sums = np.zeros((count, 2, (inputs + 1) // 2), np.float32), np.zeros((count, groups), np.float32)
    for n in range(len(x)):
        for p in range(count):
            halves[p, 0], halves[p, 1, : inputs // 2] = x[n, p, ::2], x[n, p, 1::2]
            for g in range(groups if zero.size else 0):
                sums[p, g] = x[n, p, g * size : (g + 1) * size].sum()
        for o in range(first, last):
            row = octets[n, o]
            if not straight:
                _looked_up(bits, elements, row, table, units, cells)
            for p in range(count):
                total = np.float32(0)
                for g in range(groups):
                    some = slice(g * size, min((g + 1) * size, inputs))
                    if not straight:
                        each = _dot(units[some], x[n, p, some])
                    elif bits == 8:
                        each = _dot_octets(row[some], x[n, p, some])
                    else:
                        half = slice(g * size // 2, min((g + 1) * size, inputs + 1) // 2)
                        each = _dot_halves(row[half], halves[p, 0, half], halves[p, 1, half])
                    if zero.size:
                        each -= zero[n, o, g] * sums[p, g]
                    total += each * scale[n, o, g]
                out[n, p, o] = total


@_inlined
def _row(n, o, bits, elements, octets, table, scale, zero, size, units, cells, out):
    _looked_up(bits, elements, octets[n, o], table, units, cells)
    for g in range(scale.shape[2]):
        some = slice(g * size, min((g + 1) * size, len(out)))
        less = zero[n, o, g] if zero.size else np.float32(0)
        _scaled(units[some], less, scale[n, o, g], out[some])


@_compiled
def numbers(bits, elements, octets, table, scale, zero, size, out, first, last):
    """Fill some rows of W, out float32 [n, O, I]."""
    units = _room(octets)
    cells = units.view(table.dtype)
    for n in range(len(out)):
        for o in range(first, last):
            _row(n, o, bits, elements, octets, table, scale, zero, size, units, cells, out[n, o])


@_compiled
def rounded(bits, elements, octets, table, scale, zero, size, out, first, last):
    """Fill some rows of W in bfloat16, out uint16 [n, O, I]."""
    units, row = _room(octets), np.empty(out.shape[2], np.float32)
    cells, words = units.view(table.dtype), row.view(np.uint32)
    for n in range(len(out)):
        for o in range(first, last):
            _row(n, o, bits, elements, octets, table, scale, zero, size, units, cells, row)
            _halved(words, out[n, o])


@_summing
def _dot(some, others):
    total = np.float32(0)
    for at in range(len(some)):
        total += some[at] * others[at]
    return total


@_summing
def _dot_octets(octets, others):
    total = np.float32(0)
    for at in range(len(octets)):
        total += np.float32(np.int32(octets[at]) - np.int32(128)) * others[at]
    return total


@_summing
def _dot_halves(octets, others, more):
    total = np.float32(0)
    for at in range(len(octets)):
        octet = np.int32(octets[at])
        total += np.float32((octet & np.int32(15)) - np.int32(8)) * others[at]
        total += np.float32((octet >> np.int32(4)) - np.int32(8)) * more[at]
    return total


@_inlined
def _scaled(units, less, scale, out):
    for at in range(len(units)):
        out[at] = (units[at] - less) * scale


@_compiled
def _halved(words, out):
    # The upper half of a float32 is a bfloat16: half a unit of its last place is added, less where a tie is even.
    for at in range(len(out)):
        even = words[at] >> np.uint32(16) & np.uint32(1)
        out[at] = np.uint16(words[at] + np.uint32(0x7FFF) + even >> np.uint32(16))
