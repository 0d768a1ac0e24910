"""Experts on pairs of a token and an expert, matrix by matrix: for answers that a family's own forward does not know.

Matrices are those of `Experts`, stacked: gate and up [E, F, D], down [E, D, F]. All products are grouped, as in
transformers' grouped implementation, and differentiable. Shapes: T tokens, P pairs sorted by expert, E experts or
bases, N low-rank experts, D model width, F expert width, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.integrations.moe import _grouped_linear

from moetailor.checkpoint.experts import Experts

# The grouped kernels of CUDA want rows of 16 bytes.
ALIGNMENT = 8


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


def modulated(
    module: Any,
    x_TD: torch.Tensor,
    token_P: torch.Tensor,
    expert_P: torch.Tensor,
    vectors: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Return E(x; theta) = W_down[(act(W_gate(x e_gate)) (W_up(x e_up))) e_down], [P, D].

    Args:
        module: the experts.
        x_TD: tokens.
        token_P: token of each pair.
        expert_P: its expert, ascending.
        vectors: e of each token by the name of the matrix whose input it scales, [T, D] or [T, F].
    """
    experts = Experts(module)
    stacks = experts.matrices(detach=False)
    projected = [
        grouped((x_TD * vectors[part])[token_P], stacks[part], expert_P, stacks.get(f"{part}_bias"))
        for part in experts.inputs
    ]
    inner = experts.activated(projected) * vectors["down"][token_P]
    return grouped(inner, stacks["down"], expert_P, stacks.get("down_bias"))


def low_rank(module: Any, x_TD: torch.Tensor, token_P: torch.Tensor, number_P: torch.Tensor) -> torch.Tensor:
    """Return the outputs of low-rank experts, whose matrices are W_base + B A; those are never formed, [P, D].

    Args:
        module: the compressed experts.
        x_TD: tokens.
        token_P: token of each pair.
        number_P: its low-rank expert, ascending; their bases ascend too.
    """
    experts, base_P = Experts(module), module.low_base[number_P]
    # A token that chose several members of a base meets its gate and up projections once.
    both, place_P = torch.unique(base_P * len(x_TD) + token_P, return_inverse=True)
    x_UD, base_U, x_PD = x_TD[both % len(x_TD)], both // len(x_TD), x_TD[token_P]

    def base(part: str, inputs: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        return grouped(inputs, getattr(module, f"base_{part}"), group, getattr(module, f"base_{part}_bias", None))

    def own(part: str, inputs: torch.Tensor) -> torch.Tensor:
        if not module.slots.low_rows:
            return inputs.new_zeros(())
        if len(number_P) < len(module.low_row):  # as in decoding: only the parts of these pairs are read
            inner = inputs[:, None] @ module.stacked(f"low_{part}_in", number_P).transpose(1, 2)
            return (inner @ module.stacked(f"low_{part}_out", number_P))[:, 0]
        inner = grouped(inputs, module.stacked(f"low_{part}_in"), number_P)
        return grouped(inner, module.stacked(f"low_{part}_out"), number_P, transposed=True)

    projected = [base(part, x_UD, base_U)[place_P] + own(part, x_PD) for part in experts.inputs]
    inner = experts.activated(projected)
    return base("down", inner, base_P) + own("down", inner)


def row_table(ranks: list[int], device: torch.device) -> torch.Tensor:
    """Return the rows of each low-rank expert, [N, r]: counted through, with the number of all rows for none.

    Args:
        ranks: of each of them.
        device: where the table goes.
    """
    rank_N = torch.tensor(ranks, device=device)
    step_r = torch.arange(-(-max(ranks) // ALIGNMENT) * ALIGNMENT, device=device)
    start_N = rank_N.cumsum(0) - rank_N
    return torch.where(step_r < rank_N[:, None], start_N[:, None] + step_r, int(rank_N.sum()))
