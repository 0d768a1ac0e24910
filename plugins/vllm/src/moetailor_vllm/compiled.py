"""Rows of codes on a CPU, by loops that numba compiles: looked up into a cache, scaled there, or multiplied there.

Through torch every step would go over a whole matrix in memory, which takes longer than a product with few inputs.
Shapes: P inputs, O outputs, I inputs of a matrix, B bytes of a row, G groups, R parts of a code.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch

from moetailor_vllm.lookups import PARTS, nbytes, tables, values_of

# Numbers that a byte stands for, at most.
MOST = 8
# Weights from which on a thread is worth to be woken.
SHARE = 2**18


@dataclass(frozen=True)
class Codes:
    """What codes stand for.

    Attributes:
        starts: where the bytes of each part start in a row, [R + 1].
        each: numbers of a byte of each part, [R]; 0 for bytes that stand for themselves.
        tables: these numbers, float32 [R, 256, 8]; what the parts give adds up.
        book: numbers of a row of the book that this is the row of, float32 [rows, 2]; no rows where it is the number.
    """

    starts: np.ndarray
    each: np.ndarray
    tables: np.ndarray
    book: np.ndarray

    @classmethod
    @cache
    def of(cls, codes: str, bits: int, count: int) -> Codes:
        """Return it for rows of codes, as `cut` leaves them.

        Args:
            codes: their name.
            bits: of a weight.
            count: codes of a row.
        """
        with torch.device("cpu"):
            values_CV, counted = values_of(codes, bits), bits == 8 and codes in ("uint", "int")
            bits *= values_CV.shape[1]
            book = values_CV.shape[1] > 1 and len(PARTS[bits]) > 1
            values = torch.arange(len(values_CV))[:, None].float() if book else values_CV
            found = [] if counted else tables(values, torch.float32)
            padded = np.zeros((max(len(found), 1), 256, MOST), np.float32)
            for number, table in enumerate(found):
                padded[number, :, : table.shape[1]] = table.numpy()
        return cls(
            starts=np.cumsum([0, *nbytes(bits, count)]),
            each=np.array([table.shape[1] for table in found] or [0]),
            tables=padded,
            book=values_CV.float().contiguous().numpy() if book else np.zeros((0, 2), np.float32),
        )


def product(
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
    return torch.from_numpy(out).T


def numbers(
    octets_OB: torch.Tensor, codes: Codes, scale_OG: torch.Tensor, zero_OG: torch.Tensor, size: int, inputs: int
) -> torch.Tensor:
    """Return W, s (q - z), float32 [O, I]; the arguments are those of `product`, and the inputs of a matrix."""
    out = np.empty((len(octets_OB), inputs), np.float32)
    _shared(_numbers, octets_OB, codes, scale_OG, zero_OG, size, out)
    return torch.from_numpy(out)


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
        meant = (codes.starts, codes.each, codes.tables, codes.book)
        run(octets[rows], *meant, scale[rows], zero[rows] if own else zero, own, size, out[rows], *more)

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


# Sums that may be taken in any order, which vectors need.
_summing = partial(_compiled, fastmath={"reassoc", "contract"})


@_compiled
def _part(octets, table, each, units, more):
    for at in range(len(octets)):
        row = table[octets[at]]
        for number in range(each):
            if more:
                units[at * each + number] += row[number]
            else:
                units[at * each + number] = row[number]


@_compiled
def _looked_up(row, starts, each, tables, book, ids, units):
    if each[0] == 0:
        for at in range(len(row)):
            units[at] = np.float32(row[at])
        return
    given = ids if len(book) else units
    for part in range(len(each)):
        octets, more = row[starts[part] : starts[part + 1]], part > 0
        # Each number is a constant of a loop of its own, which is unrolled.
        if each[part] == 1:
            _part(octets, tables[part], 1, given, more)
        elif each[part] == 2:
            _part(octets, tables[part], 2, given, more)
        elif each[part] == 4:
            _part(octets, tables[part], 4, given, more)
        else:
            _part(octets, tables[part], 8, given, more)
    for at in range(len(units) // 2 if len(book) else 0):
        units[2 * at] = book[np.int64(ids[at]), 0]
        units[2 * at + 1] = book[np.int64(ids[at]), 1]


@_compiled
def _room(starts, each, book):
    # Parts end in whole bytes: the first one has the most.
    places = (starts[1] - starts[0]) * max(each[0], 1)
    return np.zeros(places, np.float32), np.zeros(2 * places if len(book) else places, np.float32)


@_summing
def _products(octets, starts, each, tables, book, scale, zero, own, size, out, x):
    inputs, groups = x.shape[1], scale.shape[1]
    ids, units = _room(starts, each, book)
    sums = np.zeros((len(x), groups), np.float32)
    for p in range(len(x)):
        for g in range(groups):
            sums[p, g] = x[p, g * size : (g + 1) * size].sum()
    for o in range(len(octets)):
        _looked_up(octets[o], starts, each, tables, book, ids, units)
        for p in range(len(x)):
            total = np.float32(0)
            for g in range(groups):
                some = slice(g * size, min((g + 1) * size, inputs))
                less = zero[o, g] if own else zero[0, 0]
                total += (_dot(units[some], x[p, some]) - less * sums[p, g]) * scale[o, g]
            out[o, p] = total


@_compiled
def _numbers(octets, starts, each, tables, book, scale, zero, own, size, out):
    inputs, groups = out.shape[1], scale.shape[1]
    ids, units = _room(starts, each, book)
    for o in range(len(octets)):
        _looked_up(octets[o], starts, each, tables, book, ids, units)
        for g in range(groups):
            some = slice(g * size, min((g + 1) * size, inputs))
            less = zero[o, g] if own else zero[0, 0]
            _scaled(units[some], less, scale[o, g], out[o, some])


@_summing
def _dot(some, others):
    total = np.float32(0)
    for at in range(len(some)):
        total += some[at] * others[at]
    return total


@_compiled
def _scaled(units, less, scale, out):
    for at in range(len(units)):
        out[at] = (units[at] - less) * scale
