"""Rows of codes on a CPU, in one pass: each is looked up into a cache, and scaled or multiplied with inputs there.

Through torch every step would go over a whole matrix in memory, which takes longer than the product. Shapes: n
matrices, P inputs of each, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetailor.checkpoint.storage import loops

if TYPE_CHECKING:
    from moetailor.checkpoint.storage.few_bits import FewBits

# What a look-up gives moves as so many elements of one of these types.
ELEMENTS = {1: (np.uint32, 1), 2: (np.int64, 1), 4: (np.complex128, 1), 8: (np.complex128, 2)}
# Codes of six bits lie across bytes: how many of them a look-up has.
SIXES = 2
# Zero points of codes that have none.
NONE = np.zeros((0, 0, 0), np.uint32)
# Weights from which on a thread is worth to be woken.
SHARE = 2**18


def kept() -> int:
    """Return how many loops numba has kept on the disk that it compiled before, for a kind of arguments each."""
    folder, stem = loops.numbers.stats.cache_path, Path(loops.__file__).stem
    names = ("numbers", "products")
    return 0 if folder is None else sum(len([*Path(folder).glob(f"{stem}.{name}-*.nbc")]) for name in names)


def product(
    storage: FewBits, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """Return x W^T, sum_G s_G (x_G . q_G - z_G sum x_G), float32 [n, P, O].

    Args:
        storage: how the matrices lie.
        x_nPI: inputs.
        parts: the stored tensors by their suffixes.
        shape: of what they are a part of.
    """
    x = x_nPI.float().contiguous().numpy()
    out = np.empty((*x.shape[:2], shape[1]), np.float32)
    _shared(loops.products, storage, parts, storage.scales(parts, shape[1]), shape, (0, shape[1]), x, out)
    return torch.from_numpy(out)


def numbers(
    storage: FewBits,
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: tuple[int, int],
) -> torch.Tensor:
    """Return some rows of W, s (q - z), [n, rows, I]: exact in float32, then rounded once.

    Args:
        storage: how the matrices lie.
        parts: the stored tensors by their suffixes.
        shape: of what they are a part of.
        dtype: to round to, where that of the scales is no narrower.
        rows: the first one, and that behind the last one.
    """
    scale_nOG = storage.scales(parts, shape[1])
    dtype = min(scale_nOG.dtype, dtype, key=lambda each: each.itemsize)
    halved = dtype == torch.bfloat16
    out = np.empty((len(scale_nOG), rows[1] - rows[0], shape[2]), np.uint16 if halved else np.uint32)
    _shared(loops.numbers, storage, parts, scale_nOG, shape, rows, out, rows[0])
    return torch.from_numpy(out).view(dtype if halved else torch.float32).to(dtype)


def _shared(
    run: Any,
    storage: FewBits,
    parts: Mapping[str, torch.Tensor],
    scale_nOG: torch.Tensor,
    shape: tuple[int, ...],
    rows: tuple[int, int],
    *more: Any,
) -> None:
    """Run a loop over rows, which threads share; its last arguments are the first row and that behind the last one."""
    found = storage.look_up(scale_nOG.device)
    # Each type of table is a loop to compile, and a loop takes seconds: those without one have that of another.
    if found is None or found.told == "integers":
        elements, table = 0, np.zeros(0, np.uint32)
    elif found.told == "float8":
        elements, table = -1, np.zeros(0, np.uint32)
    else:
        assert 8 % found.bits == 0 or (found.bits, found.codes) == (6, SIXES), "the loops read past other tables"
        element, elements = ELEMENTS[found.table.shape[1]]
        table = found.table.numpy().reshape(-1).view(element)
    octets = _rows(parts["_packed"]).view(np.uint8)
    zero = _rows(parts["_zero_point"]).view(np.uint32) if "_zero_point" in parts else NONE
    # numpy has no bfloat16: the loops know what its bits mean.
    scale = _rows(scale_nOG.view(torch.uint16) if scale_nOG.dtype == torch.bfloat16 else scale_nOG.float())
    codes = (found.bits if found else 8, elements, octets, table, scale, zero, storage.size(shape[2]))
    first, last = rows
    threads = min(torch.get_num_threads(), max(len(octets) * (last - first) * shape[2] // SHARE, 1), last - first)
    if threads == 1:
        run(*codes, *more, first, last)
        return
    bounds = [first + (last - first) * thread // threads for thread in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(partial(run, *codes, *more), bounds[:-1], bounds[1:]))


def _rows(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor whose rows lie in one piece, also where axes of length one had other strides."""
    return np.ascontiguousarray(tensor.numpy())


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of the one that it was forked from are not there."""
    return ThreadPoolExecutor(threads)
