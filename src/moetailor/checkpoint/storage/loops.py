"""Loops over rows of codes in float32, which numba compiles for a kind of codes; shapes: see `compiled`."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numba
import numpy as np

from moetailor.checkpoint.storage.vectors import (
    LANES,
    STAMP,
    loaded,
    plus,
    scaled,
    stored,
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
inlined = partial(_compiled, inline="always")


@inlined
def of_groups(bits, scale, zero, n, o, by, less, more):
    """Fill the scales of a row's groups, and its zero points where codes have some, with what is to be added to these.

    Scales in bfloat16 come as their bits; zero points are codes in words that lie along the outputs.
    """
    at, shift, mask = np.uint64(o * bits // 32), np.uint32(o * bits % 32), np.uint32((1 << bits) - 1)
    words = by.view(np.uint32)
    for g in range(scale.shape[2]):
        if scale.itemsize == 2:
            words[g] = np.uint32(scale[n, o, g]) << np.uint32(16)
        else:
            by[g] = scale[n, o, g]
    for g in range(zero.shape[2]):
        code = zero[n, at, g] >> shift
        if shift + bits > 32:
            code |= zero[n, at + np.uint64(1), g] << np.uint32(32 - shift)
        less[g] = np.float32(np.uint32(code) & mask) + more


@inlined
def opened(bits, numbers, row, table, by, less, size, octets, units):
    """Tell a row whose groups are not whole vectors into more room than it needs, and scale it there."""
    for at in range(len(row)):
        octets[at] = row[at]
    for at in range(0, len(units), LANES):
        stored(units, at, told(bits, numbers, octets, table, at))
    for g in range(len(by)):
        for at in range(np.uint64(g * size), np.uint64(min((g + 1) * size, len(units)))):
            units[at] = (units[at] - less[g]) * by[g]


def of_kind(function: Any, bits: int, numbers: int) -> Any:
    """Return a function compiled for a kind of codes, with a name of its own."""
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
    half = np.float32(1 << bits - 1)

    def product(octets, table, scale, zero, size, x, number, inputs, out, first, last):
        """Fill some outputs of x W^T, out [P, O], W that of each input's number: those of one are told once."""
        groups, straight = max(scale.shape[2], 1), size % LANES == 0 and inputs % LANES == 0
        by, less, sums = (
            np.ones(groups, np.float32),
            np.zeros(groups, np.float32),
            np.zeros((len(x), groups), np.float32),
        )
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
                of_groups(bits, scale, zero, n, o, by, less, -half)
                if not straight:
                    opened(bits, numbers, row, table, by, less, size, room, units)
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

    return of_kind(product, bits, numbers)


@cache
def weights(bits: int, numbers: int) -> Any:
    """Return the loop that writes what a kind of codes stands for; see `products`."""
    half = np.float32(1 << bits - 1)

    def weight(octets, table, scale, zero, size, out, start, first, last):
        """Fill some rows of W, out [n, O, I] from one row on: float32, or the bits of bfloat16 as uint16."""
        groups, inputs = scale.shape[2], out.shape[2]
        straight, whole = size % LANES == 0 and inputs % LANES == 0, inputs // LANES * LANES
        (by, less), units = np.zeros((2, groups), np.float32), np.zeros(whole + LANES, np.float32)
        room, end = np.zeros(octets.shape[2] + 2 * LANES, np.uint8), np.zeros(LANES, out.dtype)
        for n in range(len(out)):
            for o in range(first, last):
                row, given = octets[n, o], out[n, o - start]
                of_groups(bits, scale, zero, n, o, by, less, -half)
                if straight:
                    for g in range(groups):
                        for at in range(g * size, min((g + 1) * size, inputs), LANES):
                            stored(given, at, scaled(told(bits, numbers, row, table, at), less[g], by[g]))
                    continue
                opened(bits, numbers, row, table, by, less, size, room, units)
                for at in range(0, whole, LANES):
                    stored(given, at, loaded(units, at))
                stored(end, 0, loaded(units, whole))
                for at in range(whole, inputs):
                    given[at] = end[at - whole]

    return of_kind(weight, bits, numbers)


@cache
def maps(bits: int, numbers: int) -> Any:
    """Return the loop that adds what products of two thin factors give; see `products`, and `PLAIN`."""
    none = np.float32(0)

    def mapped(inner, inner_scale, outer, outer_scale, table, x, pairs, gate, out):
        """Add g (x in^T) out to rows of out, float32 [T, D], of some rows of both factors.

        A factor has one group, or as a whole no scale; pairs [P, 4]: token, first rows in both factors, how many.
        """
        by, zero = np.ones((2, 1), np.float32), np.zeros((0, 0, 0), np.uint32)
        for p in range(len(pairs)):
            given, to = x[pairs[p, 0]], out[pairs[p, 0]]
            for rank in range(pairs[p, 3]):
                first, last = np.uint64(pairs[p, 1] + rank), np.uint64(pairs[p, 2] + rank)
                of_groups(bits, inner_scale, zero, first, 0, by[0], by[0], none)
                of_groups(bits, outer_scale, zero, last, 0, by[1], by[1], none)
                lanes = zeros()
                for at in range(0, len(given), LANES):
                    lanes = plus(lanes, told(bits, numbers, inner[first], table, at), loaded(given, at))
                weight = total(lanes) * by[0, 0] * by[1, 0] * gate[p]
                for at in range(0, len(to), LANES):
                    stored(to, at, plus(loaded(to, at), told(bits, numbers, outer[last], table, at), weight))

    return of_kind(mapped, bits, numbers)
