"""Loops over rows of codes in bfloat16, where a CPU multiplies pairs of that and groups are whole vectors.

Shapes: see `compiled`; what numba compiles: see `loops`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from moetailor.checkpoint.storage.halves import (
    DEPTH,
    MORE,
    added,
    dotted,
    joined,
    levels,
    looked_up,
    nothing,
    order,
    shifts,
    spelled,
)
from moetailor.checkpoint.storage.loops import inlined, of_groups, of_kind
from moetailor.checkpoint.storage.tiles import (
    BLOCK,
    EIGHT,
    IN_TILES,
    SHAPES,
    begin,
    cleared,
    end,
    kept,
    multiplied,
    summed,
    taken,
    turned,
)
from moetailor.checkpoint.storage.vectors import (
    INTEGERS,
    LANES,
    loaded,
    minus,
    plus,
    scaled,
    stored,
    told,
    total,
    zeros,
)


@inlined
def _aligned(nbytes):
    # Vectors and rows of tiles that lie across two lines of a cache take up to four times as long.
    room = np.zeros(nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + nbytes]


@inlined
def _crossed(order, parts, x, out):
    # Inputs [P, parts I] in the order in which codes are told: what a vector meets of each part comes first.
    inputs = x.shape[1] // parts
    for p in range(len(x)):
        for part in range(parts):
            for at in range(0, inputs, len(order)):
                for place in range(len(order)):
                    to = (at + place // DEPTH * DEPTH) * parts + part * DEPTH + place % DEPTH
                    out[p, to] = x[p, part * inputs + at + order[place]]


@inlined
def _in_thirds(x):
    # Float32 [P, I] as three numbers of bfloat16, [P, 3 I]: x = a + b + c, each the upper half of what is left. A
    # fraction of 24 bits is three of 8.
    inputs, out = x.shape[1], np.empty((len(x), 3 * x.shape[1]), np.uint16)
    upper, left = np.empty((2, inputs), np.float32)
    words, bits = upper.view(np.uint32), left.view(np.uint32)
    for p in range(len(x)):
        left[:] = x[p]
        for part in range(3):
            for at in range(inputs):
                out[p, part * inputs + at] = bits[at] >> np.uint32(16)
                words[at] = bits[at] & np.uint32(0xFFFF0000)
                left[at] -= upper[at]
    return out


@cache
def products(bits: int, numbers: int, parts: int = 1) -> Any:
    """Return the loop that multiplies a kind of codes with a few inputs in bfloat16.

    Args:
        bits: of a code.
        numbers: that it stands for in a table, or how it is told: `INTEGERS`, `FLOATS`, `BYTES`, `PLAIN`.
        parts: of bfloat16 that an input is made of.
    """
    told_as, half = order(numbers), np.float32(1 << bits - 1)
    step, shifted = len(told_as), shifts(bits, numbers, parts)
    more = half + np.float32(MORE) if shifted else np.float32(0)

    def halved(octets, table, scale, zero, size, x, number, inputs, out, first, last):
        """Fill some outputs of x W^T, out [P, O], W that of each input's number; x [P, I] as bits or float32."""
        groups, deep = max(scale.shape[2], 1), parts * inputs
        crossed = _aligned(2 * len(x) * deep).view(np.uint16).reshape(len(x), deep)
        whole = -(-groups // LANES) * LANES
        # No function of these two is a variable of this one: numba would take it for another one in each process.
        if parts == 1:
            _crossed(told_as, parts, x, crossed)
        else:
            _crossed(told_as, parts, _in_thirds(x), crossed)
        pairs = crossed.view(np.uint32)
        by, less = np.ones(whole, np.float32), np.full(whole, more)
        sums = np.zeros((len(x), whole), np.float32)
        for p in range(len(x) if shifted or zero.size else 0):
            for g in range(groups):
                each = zeros()
                for at in range(parts * g * size, parts * min((g + 1) * size, inputs), DEPTH):
                    each = added(pairs[p], at, each)
                sums[p, g] = total(each)
        start, stop = 0, 0
        while start < len(x):
            n = number[start]
            while stop < len(x) and number[stop] == n:
                stop += 1
            for o in range(first, last):
                row = octets[n, o]
                of_groups(bits, scale, zero, n, o, by, less, more - half)
                for p in range(start, stop):
                    given, lanes = pairs[p], zeros()
                    for g in range(groups):
                        each = nothing(parts)
                        for at in range(g * size, min((g + 1) * size, inputs), step):
                            each = dotted(bits, numbers, parts, row, at, table, given, each)
                        lanes = plus(lanes, joined(each), by[g])
                    for g in range(0, groups if shifted or zero.size else 0, LANES):
                        lanes = minus(lanes, loaded(by, g), loaded(less, g), loaded(sums[p], g))
                    out[p, o] = total(lanes)
            start = stop

    halved.__name__ = "halved" if parts == 1 else "thirds"
    return of_kind(halved, bits, numbers)


@cache
def thirds(bits: int, numbers: int) -> Any:
    """Return the same loop for inputs in float32, x [P, I]; see `products`."""
    return products(bits, numbers, 3)


@inlined
def _told(bits, numbers, step, row, table, by, less, size, inputs, out, start):
    # A row of weights, told into a row of each tile; out lies as [I / DEPTH, LANES, DEPTH], so that input i is at
    # i // DEPTH * (LANES * DEPTH) + i % DEPTH, which is LANES i where i is a multiple of DEPTH.
    for g in range(len(by)):
        first, stop = g * size, min((g + 1) * size, inputs)
        if numbers != INTEGERS:
            for at in range(first, stop, step):
                spelled(bits, numbers, row, at, table, by[g], out, start + at * LANES)
        elif 1 << bits <= DEPTH:
            found = levels(bits, less[g], by[g])
            for at in range(first, stop, DEPTH):
                looked_up(bits, row, at, found, out, start + at * LANES)
        else:
            for at in range(first, stop, DEPTH):
                for half in range(0, DEPTH, LANES):
                    found = scaled(told(bits, numbers, row, table, at + half), less[g], by[g])
                    stored(out, start + at * LANES + half, found)


@inlined
def _laid(x, out):
    # Inputs as tiles want them on the right: x [P, I / 2], pairs as words, in tiles of sixteen inputs.
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


@inlined
def _in_tiles(rows, deep, pairs, start, sums, _):
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


@inlined
def _in_vectors(rows, deep, pairs, start, sums, some):
    # The same in vectors, where there are no tiles, of so many inputs.
    for tile in range(BLOCK // LANES):
        if some > EIGHT:
            summed(rows, tile * deep, deep, pairs, start, sums, tile * LANES * LANES, LANES)
        else:
            summed(rows, tile * deep, deep, pairs, start, sums, tile * LANES * LANES, EIGHT)


_product, TILED = (_in_tiles, "tiled") if IN_TILES else (_in_vectors, "vectored")


@cache
def tiles(bits: int, numbers: int) -> Any:
    """Return the loop that multiplies a kind of codes with many inputs in tiles; see `products`."""
    told_as, step = order(numbers), len(order(numbers))
    half = np.float32(1 << bits - 1)

    def tiled(octets, table, scale, zero, size, x, inputs, at_once, out, first, last):
        """Fill some outputs of x W^T: x [n, P, I], out [n, P, O], both the bits of bfloat16.

        Weights of a block of outputs are told into a cache and multiplied there, for so many inputs at once.
        """
        by, less = np.zeros((2, scale.shape[2]), np.float32)
        crossed = np.empty((min(at_once, x.shape[1]), inputs), np.uint16)
        deep, blocks = LANES * inputs, -(-min(at_once, x.shape[1]) // LANES)
        rows = _aligned(2 * BLOCK * inputs).view(np.uint16)
        pairs, sums = _aligned(2 * blocks * deep).view(np.uint32), _aligned(4 * BLOCK * LANES).view(np.float32)
        right, halves = pairs.reshape(blocks, inputs // 2, LANES), np.zeros(LANES * BLOCK, np.uint16)
        begin(SHAPES)
        for n in range(len(x)):
            for start in range(0, x.shape[1], at_once):
                some = min(at_once, x.shape[1] - start)
                _crossed(told_as, 1, x[n, start : start + some], crossed)
                _laid(crossed[:some].view(np.uint32), right)
                for o in range(first, last, BLOCK):
                    count = min(BLOCK, last - o)
                    for r in range(count):
                        to = r // LANES * deep + r % LANES * DEPTH
                        of_groups(bits, scale, zero, n, o + r, by, less, -half)
                        _told(bits, numbers, step, octets[n, o + r], table, by, less, size, inputs, rows, to)
                    for p in range(0, some, LANES):
                        _product(rows, deep, pairs, p // LANES * deep // 2, sums, some - p)
                        for r in range(0, BLOCK, LANES):
                            turned(sums, r * LANES, halves, r)
                        for lane in range(min(LANES, some - p)):
                            given = out[n, start + p + lane]
                            for r in range(count):
                                given[np.uint64(o + r)] = halves[np.uint64(lane * BLOCK + r)]
        end()

    # What numba keeps does not say on which of the two it was.
    tiled.__name__ = TILED
    return of_kind(tiled, bits, numbers)
