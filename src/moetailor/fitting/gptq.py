"""GPTQ (arXiv:2210.17323, algorithm 1) over a batch of matrices: codes whose errors later inputs make up for.

Shapes: n matrices, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch

from moetailor.checkpoint.storage.integers import Codes, Integers

# Added to the diagonal of the moments, as a share of its mean.
DAMPING = 0.01


def gptq(weight: torch.Tensor, moment: torch.Tensor, storage: Integers, dtype: torch.dtype) -> Codes:
    """Return the codes of some matrices, errors weighted by what they do to outputs.

    The scales of a group are searched when it is reached, with the weights as the groups before have left them.

    Args:
        weight: float32 [n, O, I].
        moment: of the inputs, sum x x^T, float32 [n, I, I]; positive semidefinite.
        storage: how the codes lie.
        dtype: of the scales.
    """
    rest, size = weight.clone(), storage.size(weight.shape[-1])
    importance = moment.diagonal(dim1=1, dim2=2)
    upper = _inverse_factor(moment)
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.int8), [], []
    for start in range(0, weight.shape[-1], size):
        here = slice(start, min(start + size, weight.shape[-1]))
        group = rest[..., here]
        scale, zero = storage.fit(group, importance[:, here], dtype)
        errors = torch.empty_like(group)
        for at in range(group.shape[-1]):
            code = storage.round(group[..., at : at + 1], scale, zero)
            codes[..., start + at] = code[..., 0]
            kept = (code.float() - (0 if zero is None else zero.float())) * scale.float()
            # w_j -= (w_i - q_i) / u_ii u_ij for the inputs j that are left
            row = upper[:, start + at, here]
            errors[..., at] = (group[..., at] - kept[..., 0]) / row[:, at, None]
            group[..., at + 1 :] -= errors[..., at, None] * row[:, None, at + 1 :]
        rest[..., here.stop :] -= errors @ upper[:, here, here.stop :]
        scales.append(scale)
        zeros.append(zero)
    zero = None if storage.symmetric else torch.cat(zeros, -1)
    return Codes(code=codes, scale=torch.cat(scales, -1), zero=zero)


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Return U with U^T U = (moment + damping)^-1, upper triangular, [n, I, I]."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = moment / mean[:, None, None]
    damped.diagonal(dim1=1, dim2=2).add_(DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
