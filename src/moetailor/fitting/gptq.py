"""GPTQ (arXiv:2210.17323, algorithm 1) over a batch of matrices: codes whose errors later inputs make up for.

Shapes: n matrices, O outputs, I inputs, G groups, S inputs of a group, C codes of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moetailor.checkpoint.storage.few_bits import Codes, FewBits
from moetailor.checkpoint.storage.lookup import longer

# Added to the diagonal of the moments, as a share of its mean.
DAMPING = 0.01
# Inputs of a group whose errors are handed on one by one; to those behind them they go together.
BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What GPTQ knows of the inputs of some matrices, whatever it rounds to.

    Attributes:
        importance: the diagonal of sum x x^T, [n, I].
        upper: U with U^T U = (sum x x^T + damping)^-1, upper triangular, [n, I, I].
    """

    importance: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> Seen:
        """Return it of moments sum x x^T, float32 [n, I, I]; positive semidefinite."""
        importance = moment.diagonal(dim1=1, dim2=2).clone()
        mean = importance.mean(1).clamp_min(1e-30)
        damped = moment / mean[:, None, None]
        damped.diagonal(dim1=1, dim2=2).add_(DAMPING)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return cls(importance=importance, upper=torch.linalg.cholesky(inverse, upper=True))


def gptq(weight: torch.Tensor, seen: Seen, storage: FewBits, dtype: torch.dtype) -> Codes:
    """Return the codes of some matrices, errors weighted by what they do to outputs.

    The scales of a group are searched when it is reached, with the weights as the groups before have left them. Where a
    code is one of several weights, these are rounded together (GPTVQ, arXiv:2402.15319).

    Args:
        weight: float32 [n, O, I].
        seen: what is known of the inputs.
        storage: how the codes lie.
        dtype: of the scales.
    """
    inputs = weight.shape[-1]
    more, size = -inputs % storage.step, storage.size(inputs)
    if (whole := storage.whole(weight)) is not None:
        weight = weight * whole
    rest, upper, importance = (
        longer(weight.clone(), more),
        F.pad(seen.upper, (0, more, 0, more)),
        longer(seen.importance, more),
    )
    upper.diagonal(dim1=1, dim2=2)[:, inputs:] = 1
    codes, scales, zeros = [], [], []
    for start in range(0, inputs, size):
        here = slice(start, start + size)
        group = rest[..., here]
        scale, zero = storage.fit(group, importance[:, here], dtype)
        code, errors = _rounded(group, upper[:, here, here], storage, scale, zero)
        rest[..., here.stop :] -= errors @ upper[:, here, here.stop :]
        codes.append(code)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    scale, zero = torch.cat(scales, -1), torch.cat(zeros, -1) if zeros else None
    scale = scale if whole is None else scale / whole
    return Codes(code=torch.cat(codes, -1), scale=scale, zero=zero, whole=whole)


def _rounded(
    group: torch.Tensor, upper: torch.Tensor, storage: FewBits, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of one group, int8 [n, O, C], and the errors to hand on, [n, O, S].

    Args:
        group: weights, [n, O, S].
        upper: the rows and columns of the factor, [n, S, S].
        storage: how codes lie.
        scale: [n, O, 1].
        zero: [n, O, 1].
    """
    # Inputs come first, so that one of them lies together.
    rest, step = group.permute(2, 0, 1).contiguous(), storage.step
    size, errors = len(rest), torch.empty_like(rest)
    codes = rest.new_empty(size // step, *rest.shape[1:])
    numbers, shift = scale.float()[..., 0], None if zero is None else zero.float()[..., 0]
    inverse = _inverses(upper, step)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        for at in range(start, stop, step):
            here, metric = slice(at, at + step), inverse[:, at // step]
            # What stays wrong when all inputs behind make up for e, the error of these, is |e U^-1|^2.
            codes[at // step], given = storage.choose(rest[here], metric, numbers, shift)
            errors[here] = (metric.transpose(1, 2) @ (rest[here] - given).transpose(0, 1)).transpose(0, 1)
            for i in range(at, at + step):
                # w_j -= (e U^-1)_i u_ij for the inputs j that are left
                rest[here.stop : stop].addcmul_(upper[:, i, here.stop : stop].T[..., None], errors[i], value=-1)
        # [n, S left, block] @ [n, block, O]
        later = upper[:, start:stop, stop:].transpose(1, 2) @ errors[start:stop].transpose(0, 1)
        rest[stop:] -= later.transpose(0, 1)
    return codes.to(torch.int8).permute(1, 2, 0), errors.permute(1, 2, 0)


def _inverses(upper: torch.Tensor, step: int) -> torch.Tensor:
    """Return the inverse of each block on the diagonal, [n, C, inputs of a code, inputs of a code].

    Args:
        upper: upper triangular, [n, S, S].
        step: inputs of a code.
    """
    blocks = upper.unflatten(2, (-1, step)).unflatten(1, (-1, step)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return torch.linalg.solve_triangular(blocks, torch.eye(step).to(blocks), upper=True)
