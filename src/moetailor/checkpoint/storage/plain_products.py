"""Products of a few inputs with weights as they are, on a CPU, where loops make more of its memory than torch does.

Shapes: see `compiled`; T tokens, D model width, R rows of a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from moetailor.checkpoint.storage import half_loops, halves, loops
from moetailor.checkpoint.storage.compiled import (
    CPU,
    NO_TABLE,
    NO_WEIGHTS,
    NO_ZEROS,
    halved,
    in_one_piece,
    in_threads,
    scales,
)
from moetailor.checkpoint.storage.vectors import INTEGERS, LANES, PLAIN

NO_SCALES = NO_WEIGHTS.reshape(0, 0, 0)


def takes(x_PI: torch.Tensor, weight_nOI: torch.Tensor) -> bool:
    """Return whether `product` takes inputs and matrices: of one dtype, and of whole vectors."""
    vectors = {torch.float32: LANES} | ({torch.bfloat16: halves.DEPTH} if halves.ARE_HERE else {})
    whole = x_PI.dtype == weight_nOI.dtype in vectors and weight_nOI.shape[2] % vectors[x_PI.dtype] == 0
    return whole and _lies_here(weight_nOI)


def product(x_PI: torch.Tensor, weight_nOI: torch.Tensor, number_P: torch.Tensor) -> torch.Tensor:
    """Return x W^T of each input, float32 [P, O].

    Args:
        x_PI: inputs.
        weight_nOI: matrices.
        number_P: that of each input; inputs of one that are next to each other read it once.
    """
    inputs, out = x_PI.shape[1], np.empty((len(x_PI), weight_nOI.shape[1]), np.float32)
    if weight_nOI.dtype == torch.bfloat16:
        run, table, x = half_loops.products(16, PLAIN), NO_WEIGHTS, halved(x_PI)
    else:
        run, table, x = loops.products(32, PLAIN), NO_TABLE, x_PI.contiguous().numpy()
    codes = (in_one_piece(weight_nOI.detach().view(torch.uint8)), table, NO_SCALES, NO_ZEROS, inputs)
    in_threads(run, (*codes, x, number_P.numpy(), inputs, out), x_PI.numel(), (0, out.shape[1]))
    return torch.from_numpy(out)


def takes_factors(factors: Sequence[Mapping[str, torch.Tensor]], out_TD: torch.Tensor) -> bool:
    """Return whether `add_maps` takes these factors and the output: of whole vectors, factors as they are, both in
    bfloat16 or float32, or both as codes of 8 bits with one scale a row.
    """
    width, dtypes = out_TD.shape[1], (torch.bfloat16, torch.float32)
    known = [{"": (dtype, width)} for dtype in dtypes]
    known += [{"_packed": (torch.int32, width // 4), "_scale": (dtype, 1)} for dtype in dtypes]
    # Of what dtype a row of each tensor is, and how long.
    rows = [{name: (part.dtype, part.shape[1:].numel()) for name, part in parts.items()} for parts in factors]
    alike = rows[0] == rows[1] and rows[0] in known and out_TD.dtype == torch.float32 and width % LANES == 0
    return alike and all(map(_lies_here, (out_TD, *(part for parts in factors for part in parts.values()))))


def add_maps(
    factors: Iterable[Mapping[str, torch.Tensor]],
    x_TD: torch.Tensor,
    pairs: Sequence[tuple[int, int, int, int]],
    gates: Iterable[float],
    out_TD: torch.Tensor,
) -> None:
    """Add g (x in^T) out of some rows of two thin factors [R, D] to an output.

    Args:
        factors: the stored tensors of each, rows as they are or as codes of 8 bits, by their suffixes.
        x_TD: inputs.
        pairs: a token, the first of its rows in both factors, and how many these are.
        gates: of each.
        out_TD: the output so far.
    """
    given, bits, numbers = [], 8, INTEGERS
    for parts in factors:
        rows, scale = next(iter(parts.values())).detach(), parts.get("_scale")
        if scale is None:
            bits, numbers = 8 * rows.itemsize, PLAIN
        given += [in_one_piece(rows.flatten(1).view(torch.uint8)), NO_SCALES if scale is None else scales(scale)]
    inputs, weights = x_TD.float().contiguous().numpy(), np.array([*gates], np.float32)
    loops.maps(bits, numbers)(*given, NO_TABLE, inputs, np.array(pairs), weights, out_TD.numpy())


def _lies_here(tensor: torch.Tensor) -> bool:
    # Loops know no tensors but torch's own, and leave nothing to gradients.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device == CPU and tensor.is_contiguous()
    return plain and not (torch.is_grad_enabled() and tensor.requires_grad)
