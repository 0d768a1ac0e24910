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
from moetailor.checkpoint.storage.vectors import INTEGERS, LANES, WHOLE

NO_SCALES = NO_WEIGHTS.reshape(0, 0, 0)


def takes(x_PI: torch.Tensor, weight_nOI: torch.Tensor) -> bool:
    """Return whether `product` takes inputs and matrices: both in bfloat16, where pairs of that are multiplied."""
    in_halves = halves.ARE_HERE and x_PI.dtype == weight_nOI.dtype == torch.bfloat16
    return in_halves and weight_nOI.shape[2] % halves.DEPTH == 0 and _lies_here(weight_nOI)


def product(x_PI: torch.Tensor, weight_nOI: torch.Tensor, number_P: torch.Tensor) -> torch.Tensor:
    """Return x W^T of each input, float32 [P, O].

    Args:
        x_PI: inputs.
        weight_nOI: matrices.
        number_P: that of each input; inputs of one that are next to each other read it once.
    """
    inputs, out = x_PI.shape[1], np.empty((len(x_PI), weight_nOI.shape[1]), np.float32)
    codes = (in_one_piece(weight_nOI.detach().view(torch.uint8)), NO_WEIGHTS, NO_SCALES, NO_ZEROS, inputs)
    given = (*codes, halved(x_PI), number_P.numpy(), inputs, out)
    in_threads(half_loops.products(16, WHOLE), given, x_PI.numel(), (0, out.shape[1]))
    return torch.from_numpy(out)


def takes_factors(factors: Iterable[Mapping[str, torch.Tensor]], out_TD: torch.Tensor) -> bool:
    """Return whether `add_maps` takes these factors and the output."""
    known = (torch.bfloat16, torch.float32, torch.int32)
    fit = all(part.dtype in known and _lies_here(part) for parts in factors for part in parts.values())
    return fit and out_TD.dtype == torch.float32 and out_TD.shape[1] % LANES == 0


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
            bits, numbers = 8 * rows.itemsize, WHOLE
        given += [in_one_piece(rows.flatten(1).view(torch.uint8)), NO_SCALES if scale is None else scales(scale)]
    inputs, weights = x_TD.float().contiguous().numpy(), np.array([*gates], np.float32)
    loops.maps(bits, numbers)(*given, NO_TABLE, inputs, np.array(pairs), weights, out_TD.numpy())


def _lies_here(tensor: torch.Tensor) -> bool:
    # Loops know no tensors but torch's own, and leave nothing to gradients.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device == CPU and tensor.is_contiguous()
    return plain and not (torch.is_grad_enabled() and tensor.requires_grad)
