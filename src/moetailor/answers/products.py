"""The products that answers run: grouped by expert, and weighted rows of a table.

Matrices are those of `Experts`, stacked: gate and up [E, F, D], down [E, D, F]. Everything is differentiable. Shapes: T
tokens, K slots of a token, P pairs of a token and an expert, E experts, I inputs, O outputs, D model width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear


def grouped(
    x_PI: torch.Tensor,
    weight_EOI: torch.Tensor,
    expert_P: torch.Tensor,
    bias_EO: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Return x W^T (+ b) of each row with the matrix of its expert, [P, O].

    Args:
        x_PI: inputs, sorted by expert.
        weight_EOI: a matrix for each expert, [E, I, O] when `transposed`.
        expert_P: the expert of each row, ascending.
        bias_EO: biases.
        transposed: how the matrices lie.
    """
    if 1 not in weight_EOI.stride()[1:]:  # interleaved gate and up projections
        weight_EOI = weight_EOI.contiguous()
    ends = torch.bincount(expert_P, minlength=len(weight_EOI)).cumsum(0).int()
    bias = None if bias_EO is None else bias_EO[expert_P]
    return _grouped_linear(x_PI, weight_EOI, ends, bias, is_transposed=transposed)


def weighted_rows(table_ND: torch.Tensor, number_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of some rows for each token, [T, D]: gathered and added, no matrix product.

    Args:
        table_ND: the rows.
        number_TK: which, negative for none.
        weight_TK: their weights.
    """
    weight_TK = weight_TK.masked_fill(number_TK < 0, 0).to(table_ND.dtype)
    return F.embedding_bag(number_TK.clamp_min(0), table_ND, per_sample_weights=weight_TK, mode="sum")


def sorted_pairs(number_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token, place and number of each pair whose number is not negative, by number, [P] each."""
    token, place = (number_TK >= 0).nonzero().unbind(1)
    number, order = number_TK[token, place].sort(stable=True)
    return token[order], place[order], number


def joined_gates(number_TK: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let slots of a token with one number run once: its first slot, with the sum of their gates.

    Args:
        number_TK: what each slot runs, negative for nothing.
        gate_TK: the gates.

    Returns:
        The numbers, -1 for slots that another one runs for, and the gates, [T, K] each.
    """
    same_TKK = number_TK[:, :, None] == number_TK[:, None, :]
    first_TK = same_TKK.int().argmax(2) == torch.arange(number_TK.shape[1], device=number_TK.device)
    return number_TK.masked_fill(~first_TK, -1), (same_TKK * gate_TK[:, None, :]).sum(2)
