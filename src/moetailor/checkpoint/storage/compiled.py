"""Rows of codes on a CPU, in one pass: each is looked up into a cache, and scaled or multiplied with inputs there.

Through torch every step would go over a whole matrix in memory, which takes longer than the product. Shapes: n
matrices, P inputs of each, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetailor.checkpoint.devices import in_tiles, passing_nbytes
from moetailor.checkpoint.storage import loops
from moetailor.checkpoint.storage.lookup import longer
from moetailor.checkpoint.storage.tiles import ARE_HERE
from moetailor.checkpoint.storage.vectors import FLOATS, INTEGERS, LANES, STAMP

if TYPE_CHECKING:
    from moetailor.checkpoint.storage.few_bits import FewBits

CPU = torch.device("cpu")
# Of codes without zero points, and of those without a table.
NO_ZEROS, NO_TABLE = np.zeros((0, 0, 0), np.uint32), np.zeros(0, np.float32)
# Weights from which on a thread is worth to be woken.
SHARE = 2**18
# Inputs that take as long to multiply in tiles as their weights to tell.
TOKENS = 64


def kept() -> set[tuple[str, int, int]]:
    """Return the loops that numba has kept on the disk, compiled before: by the functions' names, and the kind."""
    folder = loops.products(8, INTEGERS).stats.cache_path
    names = [each.name for each in Path(folder).glob("loops.*.nbc")] if folder else []
    found = [re.search(rf"\.(product|weight|tiled)_(\d+)_(_?\d+)_{STAMP}-", name) for name in names]
    return {(each[1], int(each[2]), int(each[3].replace("_", "-"))) for each in found if each}


def kind(storage: FewBits) -> tuple[int, int]:
    """Return the kind of a storage's codes, as `loops` takes it."""
    found = storage.look_up(CPU)
    if found is None or found.told == "integers":
        return storage.bits, INTEGERS
    if found.told == "float8":
        return storage.bits, FLOATS
    bits = found.bits * found.codes
    assert bits in (8, 12), "the loops read past other tables"
    return bits, found.table.shape[1]


def product(
    storage: FewBits,
    x_PI: torch.Tensor,
    number_P: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Return x W^T of each input, sum_G s_G (x_G . q_G - z_G sum x_G), float32 [P, O].

    Args:
        storage: how the matrices lie.
        x_PI: inputs.
        number_P: the matrix of each; inputs of one that are next to each other read its codes once.
        parts: the stored tensors by their suffixes.
        shape: of all matrices.
    """
    inputs, number = shape[2], number_P.long().contiguous().numpy()
    # Loops take whole vectors.
    x = longer(x_PI.float().contiguous(), -inputs % LANES).numpy()
    out = np.empty((len(x), shape[1]), np.float32)
    run, scale_nOG = loops.products(*kind(storage)), storage.scales(parts, shape[1])
    _shared(run, storage, parts, scale_nOG, inputs, x.size, (0, shape[1]), x, number, inputs, out)
    return torch.from_numpy(out)


def few(
    storage: FewBits, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """Return x W^T of a few inputs of each matrix, float32 [n, P, O]; for the arguments see `tiled`."""
    number_P = torch.arange(len(x_nPI), device=CPU).repeat_interleave(x_nPI.shape[1])
    return product(storage, x_nPI.flatten(0, 1), number_P, parts, shape).unflatten(0, x_nPI.shape[:2])


def has_tiles(tensor: torch.Tensor) -> bool:
    """Return whether `tiled` may multiply a tensor."""
    return ARE_HERE and in_tiles(tensor)


def tiled(
    storage: FewBits, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """Return x W^T in tiles of bfloat16, sums in float32, [n, P, O].

    Args:
        storage: how the matrices lie.
        x_nPI: inputs.
        parts: the stored tensors by their suffixes.
        shape: of all matrices.
    """
    x = longer(x_nPI, -shape[2] % LANES).contiguous()
    if x.storage_offset() % 2 or any(step % 2 for step in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)  # else pairs are no words
    out = torch.empty(*x.shape[:2], shape[1], dtype=x.dtype, device=CPU)
    run, scale_nOG = loops.tiles(*kind(storage)), storage.scales(parts, shape[1])
    # More than a second cache holds take longer than to tell the weights again.
    at_once = max(passing_nbytes(CPU) // (2 * x.shape[2]), LANES)
    words, bits = x.view(torch.int32).numpy().view(np.uint32), out.view(torch.uint16).numpy()
    more = (words, shape[2], at_once, bits)
    _shared(run, storage, parts, scale_nOG, shape[2], x.numel() // TOKENS + x[:, 0].numel(), (0, shape[1]), *more)
    return out


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
    # torch's memory begins where a line of a cache does, which numpy's does not.
    out = torch.empty(len(scale_nOG), rows[1] - rows[0], shape[2], dtype=dtype if halved else torch.float32, device=CPU)
    run, given = loops.weights(*kind(storage)), (out.view(torch.uint16) if halved else out).numpy()
    _shared(run, storage, parts, scale_nOG, shape[2], out[:, 0].numel(), rows, given, rows[0])
    return out.to(dtype)


def _shared(
    run: Any,
    storage: FewBits,
    parts: Mapping[str, torch.Tensor],
    scale_nOG: torch.Tensor,
    inputs: int,
    each: int,
    rows: tuple[int, int],
    *more: Any,
) -> None:
    """Run a loop over rows, which threads share; its last arguments are the first row and that behind the last one.

    Args:
        run: the loop.
        storage: how the matrices lie.
        parts: the stored tensors by their suffixes.
        scale_nOG: the scales.
        inputs: of a matrix.
        each: weights that the loop tells for a row.
        rows: the first one, and that behind the last one.
        more: what the loop wants between codes and rows.
    """
    found = storage.look_up(CPU)
    table = NO_TABLE if found is None or found.told else found.table.flatten().numpy()
    octets = _rows(parts["_packed"]).view(np.uint8)
    zero = _rows(parts["_zero_point"]).view(np.uint32) if "_zero_point" in parts else NO_ZEROS
    # numpy has no bfloat16: the loops know what its bits mean.
    scale = _rows(scale_nOG.view(torch.uint16) if scale_nOG.dtype == torch.bfloat16 else scale_nOG.float())
    codes = (octets, table, scale, zero, storage.size(inputs))
    first, last = rows
    threads = min(torch.get_num_threads(), max(each * (last - first) // SHARE, 1), last - first)
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
