"""Rows of codes on a CPU, in one pass: each is looked up into a cache, and scaled or multiplied with inputs there.

Through torch every step would go over a whole matrix in memory, which takes longer than the product. Shapes: n
matrices, P inputs of each, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetailor.checkpoint.devices import passing_nbytes
from moetailor.checkpoint.storage import half_loops, halves, loops
from moetailor.checkpoint.storage.lookup import longer
from moetailor.checkpoint.storage.vectors import FLOATS, INTEGERS, LANES, STAMP

if TYPE_CHECKING:
    from moetailor.checkpoint.storage.few_bits import FewBits

CPU = torch.device("cpu")
# Of codes without zero points, of those without a table, and tables and scales of what is no codes.
NO_ZEROS, NO_TABLE, NO_WEIGHTS = np.zeros((0, 0, 0), np.uint32), np.zeros(0, np.float32), np.zeros(0, np.uint16)
# Weights from which on a thread is worth to be woken.
SHARE = 2**18
# Inputs that take as long to multiply in tiles as their weights to tell.
TOKENS = 64


def kept() -> set[tuple[str, int, int]]:
    """Return the loops that numba has kept on the disk, compiled before: by the functions' names, and the kind."""
    folder = loops.products(8, INTEGERS).stats.cache_path
    names = [each.name for each in Path(folder).glob("*loops.*.nbc")] if folder else []
    found = [
        re.search(rf"\.(product|weight|halved|thirds|{half_loops.TILED})_(\d+)_(_?\d+)_{STAMP}-", name)
        for name in names
    ]
    kinds = {(each[1], int(each[2]), int(each[3].replace("_", "-"))) for each in found if each}
    # Integers and floats that are looked up byte by byte have one loop.
    named = {halves.BYTES + 1: (INTEGERS, FLOATS), halves.BYTES + 2: (2,)}
    kinds = {(loop, bits, each) for loop, bits, numbers in kinds for each in named.get(numbers, (numbers,))}
    # Of tables of fewer than eight bits, loops in float32 look up two codes at once, and so are their kinds named.
    halved = {each for each in kinds if each[0] not in ("product", "weight") and each[1] < 8 and each[2] > 0}
    return kinds - halved | {(loop, 2 * bits, 2 * numbers) for loop, bits, numbers in halved}


@cache
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


@cache
def half_kind(storage: FewBits, inputs: int) -> tuple[int, int] | None:
    """Return the same as `half_loops` takes it, one code at a time; None where groups are not whole vectors."""
    bits, numbers = kind(storage)
    found = storage.look_up(CPU)
    if found is not None and not found.told:
        bits, numbers = found.bits, numbers // found.codes
    for each in (halves.BYTES + 2, numbers) if (bits, numbers) == (8, 2) and halves.IN_BYTES else (numbers,):
        if _whole(storage, inputs, each):
            return bits, each
    return None


@cache
def few_kind(storage: FewBits, inputs: int) -> tuple[int, int] | None:
    """Return the same for few inputs: codes of 8 bits that are numbers themselves are looked up byte by byte, too."""
    bits, numbers = kind(storage)
    if bits == 8 and numbers < 1 and halves.IN_BYTES and _whole(storage, inputs, halves.BYTES + 1):
        return bits, halves.BYTES + 1
    return half_kind(storage, inputs)


def _whole(storage: FewBits, inputs: int, numbers: int) -> bool:
    step = len(halves.order(numbers))
    return inputs % step == 0 and (storage.size(inputs) % step == 0 or storage.groups(inputs) == 1)


def in_halves(storage: FewBits, inputs: int) -> bool:
    """Return whether so many inputs meet codes as pairs of bfloat16."""
    return halves.ARE_HERE and half_kind(storage, inputs) is not None


def in_tiles(storage: FewBits, x: torch.Tensor) -> bool:
    """Return whether many inputs meet codes in tiles."""
    return x.dtype == torch.bfloat16 and in_halves(storage, x.shape[-1])


def in_thirds(storage: FewBits, inputs: int) -> bool:
    """Return whether inputs in float32 meet codes as three numbers of bfloat16: where codes are looked up in vectors,
    which takes half as long for weights in bfloat16; from memory, and as bytes, they come as fast in float32.
    """
    known = few_kind(storage, inputs) if in_halves(storage, inputs) else None
    return known is not None and known[1] <= 2 and storage.bits < 8


@cache
def _half_loop(
    storage: FewBits, known: tuple[int, int] | None, of: Callable[[int, int], Any]
) -> tuple[Any, np.ndarray]:
    """Return a loop for a storage's codes, of a kind, and the bits of its table's numbers in bfloat16."""
    assert known is not None, "these are told in float32"
    found, (bits, numbers) = storage.look_up(CPU), known
    if found is None:
        table = torch.arange(-128.0, 128, device=CPU)[:, None]
    elif found.told == "float8":
        table = torch.arange(256, dtype=torch.uint8, device=CPU).view(torch.float8_e4m3fn).float()[:, None]
    else:
        table = found.table[: 1 << bits, : 1 if found.told else kind(storage)[1] // found.codes]
    table = table.bfloat16().repeat(max(halves.DEPTH // len(table), 1), 1)
    if numbers <= 2:  # all first ones first; vectors of the table are taken in pairs
        table = longer(table.T, -len(table) % (2 * halves.DEPTH))
    if halves.each_of_bytes(numbers):
        table = table.contiguous().view(torch.uint8).unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    return of(*known), table.flatten().view(torch.uint16).numpy()


def products(
    given: Iterable[tuple[FewBits, Mapping[str, torch.Tensor], tuple[int, ...], int]],
    x_PI: torch.Tensor,
    number_P: np.ndarray,
) -> torch.Tensor:
    """Return x W^T of each input, sum_G s_G (x_G . q_G - z_G sum x_G), float32 [P, O].

    Args:
        given: how some matrices lie, their stored tensors by suffixes, the shape of all of these matrices, and how many
            inputs meet one of them; the next inputs meet the next ones.
        x_PI: inputs.
        number_P: the matrix of each; inputs of one that are next to each other read its codes once.
    """
    inputs, start, found = x_PI.shape[1], 0, []
    for storage, parts, shape, count in given:
        mine, out = slice(start, start + count), np.empty((count, shape[1]), np.float32)
        if in_halves(storage, inputs) and x_PI.dtype == torch.bfloat16:
            x, (run, table) = halved(x_PI)[mine], _half_loop(storage, few_kind(storage, inputs), half_loops.products)
        elif in_thirds(storage, inputs):
            x = in_one_piece(x_PI[mine].float())
            run, table = _half_loop(storage, few_kind(storage, inputs), half_loops.thirds)
        else:
            # Loops take whole vectors.
            x = longer(x_PI[mine].float().contiguous(), -inputs % LANES).numpy()
            run, table = _loop(storage, loops.products)
        more, scale_nOG = (x, number_P[mine], inputs, out), storage.scales(parts, shape[1])
        _shared(run, table, storage, parts, scale_nOG, inputs, count * inputs, (0, shape[1]), *more)
        start, found = start + count, [*found, out]
    return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found))


def few(
    storage: FewBits, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """Return x W^T of a few inputs of each matrix, float32 [n, P, O]; for the arguments see `tiled`."""
    number_P = np.arange(len(x_nPI)).repeat(x_nPI.shape[1])
    given = [(storage, parts, shape, len(number_P))]
    return products(given, x_nPI.flatten(0, 1), number_P).unflatten(0, x_nPI.shape[:2])


def scales(scale_nOG: torch.Tensor) -> np.ndarray:
    """Return scales in one piece; numpy has no bfloat16: loops know what its bits mean."""
    return in_one_piece(scale_nOG.view(torch.uint16) if scale_nOG.dtype == torch.bfloat16 else scale_nOG.float())


def halved(tensor: torch.Tensor) -> np.ndarray:
    """Return the bits of numbers in bfloat16, in one piece."""
    return tensor.contiguous().view(torch.uint16).numpy()


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
    out = torch.empty(*x_nPI.shape[:2], shape[1], dtype=x_nPI.dtype, device=CPU)
    scale_nOG = storage.scales(parts, shape[1])
    run, table = _half_loop(storage, half_kind(storage, shape[2]), half_loops.tiles)
    # More than a second cache holds take longer than to tell the weights again.
    at_once = max(passing_nbytes(CPU) // (2 * shape[2]), LANES)
    more = (halved(x_nPI), shape[2], at_once, out.view(torch.uint16).numpy())
    each = x_nPI.numel() // TOKENS + x_nPI[:, 0].numel()
    _shared(run, table, storage, parts, scale_nOG, shape[2], each, (0, shape[1]), *more)
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
    (run, table), given = _loop(storage, loops.weights), (out.view(torch.uint16) if halved else out).numpy()
    _shared(run, table, storage, parts, scale_nOG, shape[2], out[:, 0].numel(), rows, given, rows[0])
    return out.to(dtype)


@cache
def _loop(storage: FewBits, of: Callable[[int, int], Any]) -> tuple[Any, np.ndarray]:
    """Return a loop for a storage's codes, and the table that it tells them with."""
    found = storage.look_up(CPU)
    return of(*kind(storage)), NO_TABLE if found is None or found.told else found.table.flatten().numpy()


def _shared(
    run: Any,
    table: np.ndarray,
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
        table: of the codes.
        storage: how the matrices lie.
        parts: the stored tensors by their suffixes.
        scale_nOG: the scales.
        inputs: of a matrix.
        each: weights that the loop tells for a row.
        rows: the first one, and that behind the last one.
        more: what the loop wants between codes and rows.
    """
    octets = in_one_piece(parts["_packed"]).view(np.uint8)
    zero = in_one_piece(parts["_zero_point"]).view(np.uint32) if "_zero_point" in parts else NO_ZEROS
    codes = (octets, table, scales(scale_nOG), zero, storage.size(inputs))
    in_threads(run, (*codes, *more), each, rows)


def in_threads(run: Any, given: tuple[Any, ...], each: int, rows: tuple[int, int]) -> None:
    """Run a loop over rows, each worth so many weights; see `_shared`."""
    first, last = rows
    threads = min(torch.get_num_threads(), each * (last - first) // SHARE, last - first)
    if threads <= 1:
        run(*given, first, last)
        return
    bounds = [first + (last - first) * thread // threads for thread in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(partial(run, *given), bounds[:-1], bounds[1:]))


def in_one_piece(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor whose rows lie in one piece, also where axes of length one had other strides."""
    return np.ascontiguousarray(tensor.numpy())


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of the one that it was forked from are not there."""
    return ThreadPoolExecutor(threads)
