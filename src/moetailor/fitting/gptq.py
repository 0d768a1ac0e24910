"""GPTQ (arXiv:2210.17323, algorithm 1) over a batch of matrices: codes whose errors later inputs make up for.

Shapes: n matrices, O outputs, I inputs, G groups, S inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetailor.checkpoint.storage.integers import Codes, Integers

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


def gptq(weight: torch.Tensor, seen: Seen, storage: Integers, dtype: torch.dtype) -> Codes:
    """Return the codes of some matrices, errors weighted by what they do to outputs.

    The scales of a group are searched when it is reached, with the weights as the groups before have left them.

    Args:
        weight: float32 [n, O, I].
        seen: what is known of the inputs.
        storage: how the codes lie.
        dtype: of the scales.
    """
    rest, size = weight.clone(), storage.size(weight.shape[-1])
    upper = seen.upper
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.int8), [], []
    for start in range(0, weight.shape[-1], size):
        here = slice(start, min(start + size, weight.shape[-1]))
        group = rest[..., here]
        scale, zero = storage.fit(group, seen.importance[:, here], dtype)
        code, errors = _rounded(group, upper[:, here, here], storage, scale, zero)
        codes[..., here] = code
        rest[..., here.stop :] -= errors @ upper[:, here, here.stop :]
        scales.append(scale)
        zeros.append(zero)
    zero = None if storage.symmetric else torch.cat(zeros, -1)
    return Codes(code=codes, scale=torch.cat(scales, -1), zero=zero)


def _rounded(
    group: torch.Tensor, upper: torch.Tensor, storage: Integers, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of one group and the errors to hand on, [n, O, S] each.

    Args:
        group: weights, [n, O, S].
        upper: the rows and columns of the factor, [n, S, S].
        storage: how codes lie.
        scale: [n, O, 1].
        zero: [n, O, 1].
    """
    # Inputs come first, so that one of them lies together.
    rest = group.permute(2, 0, 1).contiguous()
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    size, numbers = len(rest), scale.float()[..., 0]
    shift = torch.zeros_like(numbers) if zero is None else zero.float()[..., 0]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        for at in range(start, stop):
            codes[at] = storage.codes_at(rest[at] / numbers + shift)
            # w_j -= (w_i - q_i) / u_ii u_ij for the inputs j that are left
            errors[at] = (rest[at] - (codes[at] - shift) * numbers) / upper[:, at, at, None]
            rest[at + 1 : stop].addcmul_(upper[:, at, at + 1 : stop].T[..., None], errors[at], value=-1)
        # [n, S left, block] @ [n, block, O]
        later = upper[:, start:stop, stop:].transpose(1, 2) @ errors[start:stop].transpose(0, 1)
        rest[stop:] -= later.transpose(0, 1)
    return codes.permute(1, 2, 0), errors.permute(1, 2, 0)
