"""Loops over rows of codes, which numba compiles for a kind of codes; shapes: see `compiled`."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numba
import numpy as np

from moetailor.checkpoint.storage.tiles import (
    BLOCK,
    DEPTH,
    SHAPES,
    begin,
    cleared,
    end,
    kept,
    levels,
    looked_up,
    multiplied,
    taken,
    turned,
)
from moetailor.checkpoint.storage.vectors import (
    INTEGERS,
    LANES,
    STAMP,
    loaded,
    plus,
    scaled,
    stored,
    times,
    told,
    total,
    zeros,
)


def _compiled(function: Any, **options: Any) -> Any:
    """Return a function compiled when it is first called, and kept on the disk where there is a folder for that."""
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


# What is called for each row: a call would count the references of its arrays, as a slice does.
_inlined = partial(_compiled, inline="always")


@_inlined
def _of_groups(bits, scale, zero, n, o, by, less):
    # Scales in bfloat16 come as their bits; zero points are codes in words that lie along the outputs.
    at, shift, mask = np.uint64(o * bits // 32), np.uint32(o * bits % 32), np.uint32((1 << bits) - 1)
    words = by.view(np.uint32)
    for g in range(len(by)):
        if scale.itemsize == 2:
            words[g] = np.uint32(scale[n, o, g]) << np.uint32(16)
        else:
            by[g] = scale[n, o, g]
    for g in range(zero.shape[2]):
        code = zero[n, at, g] >> shift
        if shift + bits > 32:
            code |= zero[n, at + np.uint64(1), g] << np.uint32(32 - shift)
        less[g] = np.float32(np.uint32(code) & mask) - np.float32(1 << bits - 1)


@_inlined
def _opened(bits, numbers, row, table, by, less, size, octets, units):
    # Rows whose groups are not whole vectors: told into more room than they need, and scaled there.
    for at in range(len(row)):
        octets[at] = row[at]
    for at in range(0, len(units), LANES):
        stored(units, at, told(bits, numbers, octets, table, at))
    for g in range(len(by)):
        for at in range(np.uint64(g * size), np.uint64(min((g + 1) * size, len(units)))):
            units[at] = (units[at] - less[g]) * by[g]


@_inlined
def _numbers(bits, numbers, row, table, at, less, by):
    # Those of a table have no zero points.
    found = told(bits, numbers, row, table, at)
    return times(found, by) if numbers > 0 else scaled(found, less, by)


@_inlined
def _in_tiles(bits, numbers, row, table, by, less, size, inputs, out, start):
    # A row whose groups are whole vectors, told into a row of each tile; out lies as [I / DEPTH, LANES, DEPTH], so that
    # input i is at i // DEPTH * (LANES * DEPTH) + i % DEPTH, which is LANES i where i is a multiple of DEPTH.
    rows = size % DEPTH == 0 and inputs % DEPTH == 0
    for g in range(len(by)):
        first, stop = g * size, min((g + 1) * size, inputs)
        if rows and numbers == INTEGERS and 1 << bits <= DEPTH:
            found = levels(bits, less[g], by[g])
            for at in range(first, stop, DEPTH):
                looked_up(bits, row, at, found, out, start + at * LANES)
        elif rows:
            for at in range(first, stop, DEPTH):
                for half in range(0, DEPTH, LANES):
                    found = _numbers(bits, numbers, row, table, at + half, less[g], by[g])
                    stored(out, start + at * LANES + half, found)
        else:
            for at in range(first, stop, LANES):
                found = _numbers(bits, numbers, row, table, at, less[g], by[g])
                stored(out, start + at // DEPTH * (LANES * DEPTH) + at % DEPTH, found)


@_inlined
def _aligned(nbytes):
    # Rows of tiles that lie across two lines of a cache take up to four times as long.
    room = np.zeros(nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + nbytes]


@_inlined
def _laid(x, out):
    # Inputs as tiles want them on the right: x [P, I / 2], pairs of bfloat16 as words, in tiles of sixteen inputs.
    # Blocks that are whole have a loop of known length, of which LLVM makes vectors.
    for p in range(0, len(x), LANES):
        if p + LANES <= len(x):
            for k in range(x.shape[1]):
                for lane in range(LANES):
                    out[p // LANES, k, lane] = x[p + lane, k]
        else:
            for lane in range(len(x) - p):
                for k in range(x.shape[1]):
                    out[p // LANES, k, lane] = x[p + lane, k]


@_inlined
def _multiplied(rows, deep, pairs, start, sums):
    # Four tiles of outputs with one of sixteen inputs; outputs stand on the left, where weights lie as they are told.
    # Tiles 0 to 3 have the sums, 7 inputs, and 4, 5, 6 and 4 again weights.
    cleared(0)
    cleared(1)
    cleared(2)
    cleared(3)
    for at in range(0, deep, LANES * DEPTH):
        taken(7, pairs, start + at // 2)
        taken(4, rows, at)
        multiplied(0, 4, 7)
        taken(5, rows, deep + at)
        multiplied(1, 5, 7)
        taken(6, rows, 2 * deep + at)
        multiplied(2, 6, 7)
        taken(4, rows, 3 * deep + at)
        multiplied(3, 4, 7)
    kept(0, sums, 0)
    kept(1, sums, LANES * LANES)
    kept(2, sums, 2 * LANES * LANES)
    kept(3, sums, 3 * LANES * LANES)


def _of_kind(function: Any, bits: int, numbers: int) -> Any:
    # What numba keeps has the function's name, under which it takes the one of another kind for it.
    function.__qualname__ = f"{function.__name__}_{bits}_{numbers}_{STAMP}".replace("-", "_")
    return _compiled(function)


@cache
def products(bits: int, numbers: int) -> Any:
    """Return the loop that multiplies a kind of codes with inputs.

    Args:
        bits: that are told at once: of a code, of a byte or, for codes of 6 bits in a table, of two.
        numbers: that they stand for in a table, or `INTEGERS` or `FLOATS`.
    """

    def product(octets, table, scale, zero, size, x, number, inputs, out, first, last):
        """Fill some outputs of x W^T, out [P, O], W that of each input's number: those of one are told once."""
        groups, straight = scale.shape[2], size % LANES == 0 and inputs % LANES == 0
        (by, less), sums = np.zeros((2, groups), np.float32), np.zeros((len(x), groups), np.float32)
        room, units = np.zeros(octets.shape[2] + 2 * LANES, np.uint8), np.zeros(x.shape[1], np.float32)
        for p in range(len(x) if zero.size else 0):
            for at in range(inputs):
                sums[p, at // size] += x[p, at]
        start, stop = 0, 0
        while start < len(x):
            n = number[start]
            while stop < len(x) and number[stop] == n:
                stop += 1
            for o in range(first, last):
                row = octets[n, o]
                _of_groups(bits, scale, zero, n, o, by, less)
                if not straight:
                    _opened(bits, numbers, row, table, by, less, size, room, units)
                for p in range(start, stop):
                    given, lanes, rest = x[p], zeros(), np.float32(0)
                    for at in range(0, 0 if straight else len(units), LANES):
                        lanes = plus(lanes, loaded(units, at), loaded(given, at))
                    for g in range(groups if straight else 0):
                        each = zeros()
                        for at in range(g * size, min((g + 1) * size, inputs), LANES):
                            each = plus(each, told(bits, numbers, row, table, at), loaded(given, at))
                        lanes = plus(lanes, each, by[g])
                        if zero.size:
                            rest -= by[g] * less[g] * sums[p, g]
                    out[p, o] = rest + total(lanes)
            start = stop

    return _of_kind(product, bits, numbers)


@cache
def weights(bits: int, numbers: int) -> Any:
    """Return the loop that writes what a kind of codes stands for; see `products`."""

    def weight(octets, table, scale, zero, size, out, start, first, last):
        """Fill some rows of W, out [n, O, I] from one row on: float32, or the bits of bfloat16 as uint16."""
        groups, inputs = scale.shape[2], out.shape[2]
        straight, whole = size % LANES == 0 and inputs % LANES == 0, inputs // LANES * LANES
        (by, less), units = np.zeros((2, groups), np.float32), np.zeros(whole + LANES, np.float32)
        room, end = np.zeros(octets.shape[2] + 2 * LANES, np.uint8), np.zeros(LANES, out.dtype)
        for n in range(len(out)):
            for o in range(first, last):
                row, given = octets[n, o], out[n, o - start]
                _of_groups(bits, scale, zero, n, o, by, less)
                if straight:
                    for g in range(groups):
                        for at in range(g * size, min((g + 1) * size, inputs), LANES):
                            stored(given, at, scaled(told(bits, numbers, row, table, at), less[g], by[g]))
                    continue
                _opened(bits, numbers, row, table, by, less, size, room, units)
                for at in range(0, whole, LANES):
                    stored(given, at, loaded(units, at))
                stored(end, 0, loaded(units, whole))
                for at in range(whole, inputs):
                    given[at] = end[at - whole]

    return _of_kind(weight, bits, numbers)


@cache
def tiles(bits: int, numbers: int) -> Any:
    """Return the loop that multiplies a kind of codes with inputs in tiles; see `products`."""

    def tiled(octets, table, scale, zero, size, x, inputs, at_once, out, first, last):
        """Fill some outputs of x W^T: x [n, P, I / 2] pairs of bfloat16 as words, out [n, P, O] the bits of bfloat16.

        Weights of a block of outputs are told into a cache and multiplied there, for so many inputs at once.
        """
        straight, wide = size % LANES == 0 and inputs % LANES == 0, -(-inputs // DEPTH) * DEPTH
        (by, less), units = np.zeros((2, scale.shape[2]), np.float32), np.zeros(2 * x.shape[2], np.float32)
        deep, blocks = LANES * wide, -(-min(at_once, x.shape[1]) // LANES)
        room, rows = np.zeros(octets.shape[2] + 2 * LANES, np.uint8), _aligned(2 * BLOCK * wide).view(np.uint16)
        pairs, sums = _aligned(2 * blocks * deep).view(np.uint32), _aligned(4 * BLOCK * LANES).view(np.float32)
        right, halves = pairs.reshape(blocks, wide // 2, LANES), np.zeros(LANES * BLOCK, np.uint16)
        begin(SHAPES)
        for n in range(len(x)):
            for start in range(0, x.shape[1], at_once):
                some = min(at_once, x.shape[1] - start)
                _laid(x[n, start : start + some], right)
                for o in range(first, last, BLOCK):
                    count = min(BLOCK, last - o)
                    for r in range(count):
                        row, to = octets[n, o + r], r // LANES * deep + r % LANES * DEPTH
                        _of_groups(bits, scale, zero, n, o + r, by, less)
                        if straight:
                            _in_tiles(bits, numbers, row, table, by, less, size, inputs, rows, to)
                            continue
                        _opened(bits, numbers, row, table, by, less, size, room, units)
                        for at in range(0, len(units), LANES):
                            stored(rows, to + at // DEPTH * (LANES * DEPTH) + at % DEPTH, loaded(units, at))
                    for p in range(0, some, LANES):
                        _multiplied(rows, deep, pairs, p // LANES * deep // 2, sums)
                        for r in range(0, BLOCK, LANES):
                            turned(sums, r * LANES, halves, r)
                        for lane in range(min(LANES, some - p)):
                            given = out[n, start + p + lane]
                            for r in range(count):
                                given[np.uint64(o + r)] = halves[np.uint64(lane * BLOCK + r)]
        end()

    return _of_kind(tiled, bits, numbers)
