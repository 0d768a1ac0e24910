"""Rows of codes on a CPU, in one pass: each is looked up into a cache, and scaled or multiplied with inputs there.

Through torch every step would go over a whole matrix in memory, which takes longer than the product. Shapes: n
matrices, P inputs of each, O outputs, I inputs, B bytes of a row, G groups.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from moetailor.checkpoint.storage import loops
from moetailor.checkpoint.storage.lookup import Lookup

# What a look-up gives moves as so many elements of one of these types.
ELEMENTS = {1: (np.float32, 1), 2: (np.int64, 1), 4: (np.complex128, 1), 8: (np.complex128, 2)}
# Codes of six bits lie across bytes: how many of them a look-up has.
SIXES = 2
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
    _shared(loops.products, octets_nOB, found, scale_nOG, zero_nOG, size, x, out)
    return torch.from_numpy(out)


def numbers(
    octets_nOB: torch.Tensor,
    found: Lookup | None,
    scale_nOG: torch.Tensor,
    zero_nOG: torch.Tensor | None,
    size: int,
    inputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return W, s (q - z), [n, O, I]: exact in float32, then rounded once to a dtype.

    The arguments are those of `product`, and the inputs of a matrix.
    """
    halved = dtype == torch.bfloat16
    out = np.empty((*octets_nOB.shape[:2], inputs), np.uint16 if halved else np.uint32)
    _shared(loops.numbers, octets_nOB, found, scale_nOG, zero_nOG, size, out)
    return torch.from_numpy(out).view(dtype if halved else torch.float32).to(dtype)


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
    if found is None or found.told == "integers":
        elements, table = 0, np.zeros(0, np.float32)
    elif found.told == "float8":
        elements, table = -1, np.zeros(0, np.uint32)
    else:
        assert 8 % found.bits == 0 or (found.bits, found.codes) == (6, SIXES), "the loops read past other tables"
        element, elements = ELEMENTS[found.table.shape[1]]
        table = found.table.numpy().reshape(-1).view(element)
    zero = torch.zeros(0, 0, 0) if zero_nOG is None else zero_nOG
    scale, zero = (part.float().contiguous().numpy() for part in (scale_nOG, zero))
    codes = (found.bits if found else 8, elements, octets_nOB.numpy(), table, scale, zero, size)
    threads = min(torch.get_num_threads(), max(count * outputs * inputs // SHARE, 1), outputs)
    if threads == 1:
        run(*codes, *arrays, 0, outputs)
        return
    bounds = [outputs * thread // threads for thread in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(partial(run, *codes, *arrays), bounds[:-1], bounds[1:]))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of the one that it was forked from are not there."""
    return ThreadPoolExecutor(threads)
