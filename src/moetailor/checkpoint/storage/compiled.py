"""Rows of codes on a CPU, in one pass: each is looked up into a cache, and scaled or multiplied with inputs there.

Through torch every step would go over a whole matrix in memory, which takes longer than the product. Shapes: n
matrices, P inputs of each, O outputs, I inputs, B bytes of a row, G groups.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch

from moetailor.checkpoint.storage.lookup import Lookup

# What a look-up gives moves as so many elements of one of these types.
ELEMENTS = {1: (np.float32, 1), 2: (np.int64, 1), 4: (np.complex128, 1), 8: (np.complex128, 2)}
# Codes of so many bits lie across bytes: how many of them a look-up has.
ACROSS = {3: 4, 5: 2, 6: 2, 7: 2}
# Weights from which on a thread is worth to be woken.
SHARE = 2**18


def product(
    x_nPI: torch.Tensor,
    octets_nOB: torch.Tensor,
    found: Lookup | None,
    scale_nOG: torch.Tensor,
    zero_nOG: torch.Tensor | None,
    size: int,
) -> torch.Tensor:
    """Return x W^T, sum_G s_G (x_G . q_G - z_G sum x_G), float32 [n, P, O].

    Args:
        x_nPI: inputs.
        octets_nOB: codes, as bytes.
        found: what they stand for; None for bytes less 128.
        scale_nOG: scales.
        zero_nOG: zero points; None where there are none.
        size: inputs of a group.
    """
    x = x_nPI.float().contiguous().numpy()
    out = np.empty((*x.shape[:2], octets_nOB.shape[1]), np.float32)
    _shared(_products, octets_nOB, found, scale_nOG, zero_nOG, size, x, out)
    return torch.from_numpy(out)


def numbers(
    octets_nOB: torch.Tensor,
    found: Lookup | None,
    scale_nOG: torch.Tensor,
    zero_nOG: torch.Tensor | None,
    size: int,
    inputs: int,
) -> torch.Tensor:
    """Return W, s (q - z), float32 [n, O, I]; the arguments are those of `product`, and the inputs of a matrix."""
    out = np.empty((*octets_nOB.shape[:2], inputs), np.float32)
    _shared(_numbers, octets_nOB, found, scale_nOG, zero_nOG, size, out)
    return torch.from_numpy(out)


def _shared(
    run: Any,
    octets_nOB: torch.Tensor,
    found: Lookup | None,
    scale_nOG: torch.Tensor,
    zero_nOG: torch.Tensor | None,
    size: int,
    *arrays: np.ndarray,
) -> None:
    """Run a loop over outputs, which threads share; its last arguments are the first and last of these."""
    (count, outputs, _), inputs = octets_nOB.shape, scale_nOG.shape[2] * size
    assert found is None or ACROSS.get(found.bits, found.codes) == found.codes, "the loops read past other tables"
    element, elements = ELEMENTS[found.table.shape[1]] if found else (np.float32, 0)
    table = found.table.numpy().reshape(-1).view(element) if found else np.zeros(0, element)
    zero = torch.zeros(0, 0, 0) if zero_nOG is None else zero_nOG
    scale, zero = (part.float().contiguous().numpy() for part in (scale_nOG, zero))
    codes = (found.bits if found else 8, elements, octets_nOB.numpy(), table, scale, zero, size)
    threads = min(torch.get_num_threads(), max(count * outputs * inputs // SHARE, 1), outputs)
    if threads == 1:
        run(*codes, *arrays, 0, outputs)
        return
    bounds = [outputs * thread // threads for thread in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(partial(run, *codes, *arrays), bounds[:-1], bounds[1:]))


def _compiled(function: Any, **options: Any) -> Any:
    """Return a function compiled when it is first called, and kept on the disk where there is a folder for that."""
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


# Sums that may be taken in any order, which vectors need.
_summing = partial(_compiled, fastmath={"reassoc", "contract"})


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of the one that it was forked from are not there."""
    return ThreadPoolExecutor(threads)


def _across(bits: int, codes: int) -> Any:
    """Return what looks up codes that lie across bytes; compiled for these numbers, so that its loops are unrolled."""
    step, rows, mask = bits * codes, 8 // codes, np.uint64((1 << bits * codes) - 1)

    @_compiled
    def look(row, table, units):
        # Eight codes lie in as many bytes as a code has bits; the last ones may have fewer, where no more codes are.
        whole = min(len(row) // bits, len(units) // rows)
        for eight in range(whole):
            word = np.uint64(0)
            for octet in range(bits):
                word |= np.uint64(row[eight * bits + octet]) << np.uint64(8 * octet)
            for each in range(rows):
                units[eight * rows + each] = table[word >> np.uint64(step * each) & mask]
        word = np.uint64(0)
        for octet in range(min(len(row) - whole * bits, bits)):
            word |= np.uint64(row[whole * bits + octet]) << np.uint64(8 * octet)
        for each in range(len(units) - whole * rows):
            units[whole * rows + each] = table[word >> np.uint64(step * each) & mask]

    return look


_across_3, _across_5, _across_6, _across_7 = (_across(*each) for each in ACROSS.items())


@_compiled
def _looked_up(bits, elements, row, table, units):
    if bits == 3:
        _across_3(row, table, units)
    elif bits == 5:
        _across_5(row, table, units)
    elif bits == 6:
        _across_6(row, table, units)
    elif bits == 7:
        _across_7(row, table, units)
    elif elements == 0:
        for at in range(len(units)):
            units[at] = np.float32(np.int32(row[at]) - np.int32(128))
    elif elements == 1:
        for at in range(len(units)):
            units[at] = table[row[at]]
    else:
        for at in range(len(units) // 2):
            units[2 * at] = table[2 * np.int64(row[at])]
            units[2 * at + 1] = table[2 * np.int64(row[at]) + 1]


@_compiled
def _room(bits, elements, table, inputs):
    # For whole bytes, and for eight codes where they lie across bytes.
    at_once = max(elements, 1) if 8 % bits == 0 else 2 if bits == 3 else 4
    per = table.itemsize // 4 * at_once
    return np.zeros(-(-inputs // per) * per, np.float32)


@_summing
def _products(bits, elements, octets, table, scale, zero, size, x, out, first, last):
    inputs, groups = x.shape[2], scale.shape[2]
    units = _room(bits, elements, table, inputs)
    for n in range(len(x)):
        sums = np.zeros((x.shape[1], groups), np.float32)
        for p in range(len(sums) if zero.size else 0):
            for g in range(groups):
                sums[p, g] = x[n, p, g * size : (g + 1) * size].sum()
        for o in range(first, last):
            _looked_up(bits, elements, octets[n, o], table, units.view(table.dtype))
            for p in range(x.shape[1]):
                total = np.float32(0)
                for g in range(groups):
                    some = slice(g * size, min((g + 1) * size, inputs))
                    each = _dot(units[some], x[n, p, some])
                    if zero.size:
                        each -= zero[n, o, g] * sums[p, g]
                    total += each * scale[n, o, g]
                out[n, p, o] = total


@_compiled
def _numbers(bits, elements, octets, table, scale, zero, size, out, first, last):
    inputs, groups = out.shape[2], scale.shape[2]
    units = _room(bits, elements, table, inputs)
    for n in range(len(out)):
        for o in range(first, last):
            _looked_up(bits, elements, octets[n, o], table, units.view(table.dtype))
            for g in range(groups):
                some = slice(g * size, min((g + 1) * size, inputs))
                less = zero[n, o, g] if zero.size else np.float32(0)
                _scaled(units[some], less, scale[n, o, g], out[n, o, some])


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
