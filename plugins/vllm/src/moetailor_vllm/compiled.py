"""Rows of codes on a CPU, by loops that numba compiles: told in a cache, and scaled or multiplied with inputs there.

Through torch every step would go over a whole matrix in memory, which takes longer than a product with few inputs.
Shapes: P inputs, O outputs, I inputs of a matrix, B bytes of a row, G groups, R parts of a code.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch

from moetailor_vllm.codes import Codes

# Weights from which on a thread is worth to be woken.
SHARE = 2**18


def runs_compiled(tensor: torch.Tensor) -> bool:
    """Return whether loops compiled for a CPU may run on a tensor: graphs cannot follow them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def product_of(
    x_PI: torch.Tensor, octets_OB: torch.Tensor, codes: Codes, scale_OG: torch.Tensor, zero_OG: torch.Tensor, size: int
) -> torch.Tensor:
    """Return x W^T, sum_G s_G (x_G . q_G - z_G sum x_G), float32 [P, O].

    Args:
        x_PI: inputs.
        octets_OB: codes of a matrix.
        codes: what they stand for.
        scale_OG: scales.
        zero_OG: zero points; one of all groups, [1, 1], where they have none of their own.
        size: inputs of a group.
    """
    out = np.empty((len(octets_OB), len(x_PI)), np.float32)
    _shared(_products, octets_OB, codes, scale_OG, zero_OG, size, out, _array(x_PI))
    # vLLM's activations take rows that lie one behind the other.
    return torch.from_numpy(out).T.contiguous()


def numbers_of(
    octets_OB: torch.Tensor,
    codes: Codes,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor,
    size: int,
    inputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return W, s (q - z), [O, I]: exact in float32, then rounded once.

    Args:
        octets_OB: see `product_of`.
        codes: see `product_of`.
        scale_OG: see `product_of`.
        zero_OG: see `product_of`.
        size: see `product_of`.
        inputs: of a matrix.
        dtype: of the numbers.
    """
    halved = dtype == torch.bfloat16
    out = np.empty((len(octets_OB), inputs), np.uint16 if halved else np.float32)
    _shared(_rounded if halved else _numbers, octets_OB, codes, scale_OG, zero_OG, size, out)
    return torch.from_numpy(out).view(dtype) if halved else torch.from_numpy(out).to(dtype)


def _shared(
    run: Any,
    octets_OB: torch.Tensor,
    codes: Codes,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor,
    size: int,
    out: np.ndarray,
    *more: np.ndarray,
) -> None:
    """Run a loop over outputs, which threads share."""
    octets, scale, zero = octets_OB.contiguous().numpy(), _array(scale_OG), _array(zero_OG)
    own = zero.shape == scale.shape

    def some(first: int, last: int) -> None:
        rows = slice(first, last)
        run(octets[rows], tuple(codes), scale[rows], zero[rows] if own else zero, own, size, out[rows], *more)

    weights = len(octets) * scale.shape[1] * size
    threads = min(torch.get_num_threads(), max(weights // SHARE, 1), len(octets))
    bounds = [len(octets) * thread // threads for thread in range(threads + 1)]
    if threads == 1:
        some(0, len(octets))
    else:
        list(_pool(os.getpid(), threads).map(some, bounds[:-1], bounds[1:]))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of the one that it was forked from are not there."""
    return ThreadPoolExecutor(threads)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().contiguous().numpy()


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
def _first(octets, width, less, units):
    # Width is a constant of each call, for which the loops are unrolled.
    each, mask = 8 // width, np.int32((1 << width) - 1)
    for at in range(len(octets)):
        octet = np.int32(octets[at])
        for number in range(each):
            units[at * each + number] = np.float32(octet >> np.int32(width * number) & mask) - less


@_inlined
def _next(octets, width, factor, units):
    each, mask = 8 // width, np.int32((1 << width) - 1)
    for at in range(len(octets)):
        octet = np.int32(octets[at])
        for number in range(each):
            units[at * each + number] += np.float32(octet >> np.int32(width * number) & mask) * factor


# Compiled once, and called: within each of the loops it took most of the seconds that compiling them takes.
@_compiled
def _counted(row, starts, widths, less, units):
    octets = row[: starts[1]]
    if widths[0] == 8:
        _first(octets, 8, less, units)
    elif widths[0] == 4:
        _first(octets, 4, less, units)
    else:
        _first(octets, 2, less, units)
    factor = np.float32(1 << widths[0])
    for part in range(1, len(widths)):
        octets = row[starts[part] : starts[part + 1]]
        if widths[part] == 2:
            _next(octets, 2, factor, units)
        else:
            _next(octets, 1, factor, units)
        factor *= np.float32(1 << widths[part])


@_compiled
def _room(codes):
    # Parts end in whole bytes, each of which is for eight numbers at most; the first one has the most.
    starts, book, table = codes[0], codes[5], codes[3]
    ids, units = (
        np.zeros(8 * starts[1], np.float32),
        np.zeros(16 * starts[1] if len(book) else 8 * starts[1], np.float32),
    )
    # The last are the same place as units, in elements of the table.
    return ids, units, units.view(table.dtype)


@_inlined
def _told(row, codes, room):
    (starts, widths, less, table, elements, book), (ids, units, cells) = codes, room
    if elements == -1:
        # e4m3, moved to its places in a float32, is 2^(7 - 127) of what it stands for; all ones stand for no number.
        for at in range(len(row)):
            octet = np.uint32(row[at])
            size = octet & np.uint32(0x7F)
            word = np.uint32(0x7F800001) if size == np.uint32(0x7F) else size << np.uint32(20)
            cells[at] = word | (octet & np.uint32(0x80)) << np.uint32(24)
        for at in range(len(row)):
            units[at] *= np.float32(2.0**120)
    elif elements == 1:
        for at in range(len(row)):
            cells[at] = table[row[at]]
    elif elements == 2:
        for at in range(len(row)):
            cells[2 * at] = table[2 * np.int64(row[at])]
            cells[2 * at + 1] = table[2 * np.int64(row[at]) + 1]
    elif len(book):
        _counted(row, starts, widths, less, ids)
        for at in range(len(units) // 2):
            units[2 * at] = book[np.int64(ids[at]), 0]
            units[2 * at + 1] = book[np.int64(ids[at]), 1]
    else:
        _counted(row, starts, widths, less, units)


@_inlined
def _row(o, octets, codes, scale, zero, own, size, room, out):
    _told(octets[o], codes, room)
    for g in range(scale.shape[1]):
        some = slice(g * size, min((g + 1) * size, len(out)))
        _scaled(room[1][some], zero[o, g] if own else zero[0, 0], scale[o, g], out[some])


@_summing
def _products(octets, codes, scale, zero, own, size, out, x):
    (_, widths, under, _, _, book), (count, inputs), groups = codes, x.shape, scale.shape[1]
    room = _room(codes)
    # Integers of 8 and of 4 bits are multiplied as they are told; for the latter those inputs lie together that have
    # the lower halves of bytes.
    straight = len(widths) == 1 and len(book) == 0 and (widths[0] == 8 or (widths[0] == 4 and size % 2 == 0))
    halves, sums = np.zeros((count, 2, (inputs + 1) // 2), np.float32), np.zeros((count, groups), np.float32)
    for p in range(count):
        halves[p, 0], halves[p, 1, : inputs // 2] = x[p, ::2], x[p, 1::2]
        for g in range(groups):
            sums[p, g] = x[p, g * size : (g + 1) * size].sum()
    for o in range(len(octets)):
        row = octets[o]
        if not straight:
            _told(row, codes, room)
        for p in range(count):
            total = np.float32(0)
            for g in range(groups):
                some = slice(g * size, min((g + 1) * size, inputs))
                less = zero[o, g] if own else zero[0, 0]
                if not straight:
                    each = _dot(room[1][some], x[p, some])
                elif widths[0] == 8:
                    each = _dot_octets(row[some], x[p, some])
                else:
                    half = slice(g * size // 2, min((g + 1) * size, inputs + 1) // 2)
                    each = _dot_halves(row[half], halves[p, 0, half], halves[p, 1, half])
                    less += under
                total += (each - less * sums[p, g]) * scale[o, g]
            out[o, p] = total


@_compiled
def _numbers(octets, codes, scale, zero, own, size, out):
    room = _room(codes)
    for o in range(len(octets)):
        _row(o, octets, codes, scale, zero, own, size, room, out[o])


@_compiled
def _rounded(octets, codes, scale, zero, own, size, out):
    room, row = _room(codes), np.empty(out.shape[1], np.float32)
    words = row.view(np.uint32)
    for o in range(len(octets)):
        _row(o, octets, codes, scale, zero, own, size, room, row)
        # The upper half of a float32 is a bfloat16: half a unit of its last place is added, less where a tie is even.
        for at in range(out.shape[1]):
            even = words[at] >> np.uint32(16) & np.uint32(1)
            out[o, at] = np.uint16(words[at] + np.uint32(0x7FFF) + even >> np.uint32(16))


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
        total += np.float32(octets[at]) * others[at]
    return total


@_summing
def _dot_halves(octets, others, more):
    total = np.float32(0)
    for at in range(len(octets)):
        octet = np.int32(octets[at])
        total += np.float32(octet & np.int32(15)) * others[at] + np.float32(octet >> np.int32(4)) * more[at]
    return total


@_inlined
def _scaled(units, less, scale, out):
    for at in range(len(units)):
        out[at] = (units[at] - less) * scale
