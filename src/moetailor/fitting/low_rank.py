"""Low-rank experts: bases that several experts share, and the low-rank parts that make up for what these lack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetailor.answers import LowRank
from moetailor.fitting.averages import Matrices, average, shares, stacked
from moetailor.fitting.held_out import held_out_masks
from moetailor.fitting.least_squares import SCARCE, NormalEquations, chosen_ridge
from moetailor.fitting.tokens import tokens_of
from moetailor.fitting.whitened import approximate, second_moment
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView


def low_rank_nbytes(layer: LayerView, rank: int) -> int:
    """Return the bytes of the low-rank part of one expert: rows and columns of each matrix for each rank."""
    with_part, alone = (answers_nbytes([LowRank(0, rank)], layer.shape, layer.dtype) for rank in (rank, 0))
    return with_part - alone


def built_on(layer: LayerView, plan: LayerPlan, bases: Sequence[Matrices], start: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the low-rank experts of a plan, see `LowRank`, for its bases.

    Args:
        layer: the layer.
        plan: of it.
        bases: the matrices of each base, in the order of `bases_of`.
        start: of the low-rank parts, see `LightMoE`.
    """
    generator = torch.Generator().manual_seed(layer.index)
    parts = [
        _low_rank_part(layer, member, matrices, rank, start, generator)
        for matrices, members in zip(bases, bases_of(plan).values(), strict=True)
        for member, rank in members.items()
        if rank
    ]
    found = {f"low_rank_base_{name}": stack for name, stack in stacked(bases, len(bases)).items()}
    return found | {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def bases_of(plan: LayerPlan) -> dict[int, dict[int, int]]:
    """Return the members of each base, by the one that it is named after, with the ranks of their low-rank parts."""
    found: dict[int, dict[int, int]] = {}
    for slot, answer in enumerate(plan.slots):
        if isinstance(answer, LowRank):
            found.setdefault(answer.base, {})[slot] = answer.rank
    return dict(sorted(found.items()))


def base_of(layer: LayerView, named: int, members: Sequence[int], base: str) -> Matrices:
    """Return the matrices of a base, biases included.

    Args:
        layer: the layer.
        named: the member that it is named after.
        members: the experts that it is made of.
        base: see `LightMoE`.
    """
    if base == "dominant":
        return layer.experts.expert(named)
    found = average(layer, named, members, torch.ones(layer.num_experts) if base == "mean" else layer.sums.gate)
    if base in ("average", "mean"):
        return found
    # min over W of sum_n G_n tr (W_n - W) C_n (W_n - W)^T:  W = (sum G_n W_n C_n) (sum G_n C_n)^-1
    share = shares(layer.sums.gate, members).tolist()
    experts = [layer.experts.expert(member) for member in members]
    for part in parts_of(layer):
        moments = [moment_of(layer, member, expert, part) for member, expert in zip(members, experts, strict=True)]
        total = sum((c * weight for c, weight in zip(moments, share, strict=True)), torch.zeros_like(moments[0]))
        seen = [expert[part].double() @ c * w for expert, c, w in zip(experts, moments, share, strict=True)]
        found[part] = torch.linalg.solve(total, sum(seen[1:], seen[0]).T).T.to(found[part])
    return found


def moment_of(
    layer: LayerView, expert: int, matrices: Matrices, part: str, held: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the second moment of what a matrix of an expert is applied to, by squared gates.

    Args:
        layer: the layer.
        expert: the expert.
        matrices: its matrices.
        part: which of them.
        held: mask of its sampled tokens that do not count; none when None.
    """
    tokens = tokens_of(layer, {expert: 1.0})
    if held is not None:
        tokens = tokens.but(held)
    seen = layer.inputs(tokens.place).to(matrices["up"])
    return second_moment(layer.experts.hidden(matrices, seen) if part == "down" else seen, tokens.weight)


def moments_of(
    layer: LayerView, expert: int, matrices: Matrices, held: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return that of each matrix of an expert; gate and up have the same. Arguments as of `moment_of`."""
    inputs, inner = (moment_of(layer, expert, matrices, part, held) for part in ("up", "down"))
    return dict.fromkeys(layer.experts.inputs, inputs) | {"down": inner}


def parts_of(layer: LayerView) -> Sequence[str]:
    """Return the names of an expert's matrices."""
    return (*layer.experts.inputs, "down")


def _low_rank_part(
    layer: LayerView, member: int, base: Matrices, rank: int, start: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the low-rank part of one expert, rows of A and columns of B of each matrix, [rank, in] and [rank, out]."""
    found, matrices, reduced = {}, layer.experts.expert(member), dict(base)
    for part in parts_of(layer):
        if start == "zero":
            rows, columns = matrices[part].shape
            inner, outer = torch.randn(rank, columns, generator=generator) / columns**0.5, torch.zeros(rank, rows)
            found |= {f"low_rank_{part}_in": inner, f"low_rank_{part}_out": outer}
            continue
        if start == "fitted" and part == "down":  # the last one: the other matrices are reduced by now
            matrices = reduced | {"down": _fitted_down(layer, member, matrices, reduced)}
        near = approximate(apart(matrices, base, part), moment_of(layer, member, matrices, part))
        if start == "fitted":
            reduced[part] = (base[part] + near.matrix(rank)).to(base[part])
        inner, outer = near.factors(rank)
        found |= {f"low_rank_{part}_in": inner.cpu(), f"low_rank_{part}_out": outer.cpu()}
    return found


def _fitted_down(layer: LayerView, member: int, matrices: Matrices, reduced: Matrices) -> torch.Tensor:
    """Return the down projection that gives best what an expert gave, from what the reduced other matrices give.

    min over W of sum_t g_t^2 |y_t - b - W h_t|^2 + lambda |W - W_down|^2, with lambda chosen on tokens that were held
    out; where no fit helps these, W_down itself. What the base lacks of it is then approximated on these h.
    """
    tokens = tokens_of(layer, {member: 1.0})
    if not tokens.own:
        return matrices["down"]
    hidden = layer.experts.hidden(reduced, layer.inputs(tokens.place).to(matrices["up"]))
    wanted = layer.outputs(member, tokens.place) - reduced.get("down_bias", 0)
    weight = tokens.weight.to(hidden.device)

    def equations(which: torch.Tensor) -> NormalEquations:
        found = NormalEquations.zeros(wanted.shape[1], hidden.shape[1], hidden.device)
        found.add(hidden[which], wanted[which], weight[which])
        return found

    masks = held_out_masks(tokens.place[: tokens.own], SCARCE * hidden.shape[1])
    every = equations(torch.ones_like(tokens.place, dtype=torch.bool))
    return chosen_ridge(every, [equations(~tokens.rest(mask)) for mask in masks], matrices["down"])


def apart(matrices: Matrices, base: Matrices, part: str) -> torch.Tensor:
    """Return what a base lacks of a matrix of an expert, float64."""
    return matrices[part].double() - base[part].double()
