"""Affine maps of low rank in place of experts: what they lose, and their tensors. Shapes: D model width, r rank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from moetailor.answers import Answer, Constant, Linear
from moetailor.errors import MoetailorWarning
from moetailor.fitting.constants import constant_errors, constants
from moetailor.fitting.held_out import held_out_masks
from moetailor.fitting.reduced_rank import Moments, Regression, centre_of, shared_inputs
from moetailor.fitting.tokens import Tokens, tokens_of
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView

# Where an expert has fewer tokens than this times the model's width, and than these, four folds choose instead of an
# eighth of them.
SCARCE, ENOUGH = 8, 2048


def map_of_rank(rank: int, shared: bool = False) -> Answer:
    """Return the answer that is a map of some rank: a constant where that is 0."""
    return Linear(rank, shared) if rank else Constant()


def map_error(layer: LayerView, expert: int, rank: int, ridge: float) -> float:
    """Return L_e(r) = sum_t g^2 |E_e(x_t) - S_e(x_t)|^2 / T of an expert's map S_e, on the tokens it is fitted to.

    Args:
        layer: the layer.
        expert: the expert.
        rank: r.
        ridge: see `Regression.solve`.
    """
    # What the constant leaves, from the sums of all tokens
    constant = float(constant_errors(layer.sums)[expert])
    regression = _regression(layer, expert) if rank else None
    if regression is None:
        return constant
    token, gate = layer.routed(expert)
    weight = gate.double().square().to(layer.experts.device)
    errors = regression.solve(rank, ridge).errors(layer.inputs(token), layer.outputs(expert, token), weight)
    # ... times the share of it that the map leaves on the sample
    return constant * float(errors[-1] / errors[0].clamp_min(1e-300))


def held_out_errors(layer: LayerView, expert: int, ranks: Sequence[int], ridge: float) -> torch.Tensor:
    """Return the layer's error for maps of some ranks, measured on tokens that were not fitted, float64 [ranks].

    An expert with too few tokens to hold some out is priced as one that only a constant can stand in for.

    Args:
        layer: the layer.
        expert: the expert.
        ranks: the ranks, 0 first.
        ridge: see `Regression.solve`.
    """
    tokens = tokens_of(layer, {expert: 1.0})
    constant = map_error(layer, expert, 0, ridge)
    total, x_TD = torch.zeros(len(ranks), dtype=torch.float64), layer.inputs(tokens.place)
    y_TD, weight_T = layer.outputs(expert, tokens.place).to(x_TD.dtype), tokens.weight.to(x_TD.device)
    centre = centre_of(x_TD[: tokens.own], y_TD[: tokens.own], weight_T[: tokens.own])

    def moments(at: slice | torch.Tensor) -> Moments:
        return Moments.of(x_TD[at], y_TD[at], weight_T[at], centre)

    others = moments(slice(tokens.own, None)) if len(x_TD) > tokens.own else None
    for chooses in folds(layer, tokens.place[: tokens.own]):
        if not bool(chooses.any()) or bool(chooses.all()):
            continue
        # An expert's own tokens are the first.
        fitted, judges = (mask.nonzero().flatten().to(x_TD.device) for mask in (~chooses, chooses))
        found = Regression(moments(fitted), others).solve(max(ranks), ridge)
        errors = found.errors(x_TD[judges], y_TD[judges], weight_T[judges]).cpu()
        total += torch.stack([errors[min(rank, len(errors) - 1)] for rank in ranks])
    return constant * total / total[0] if float(total[0]) > 0 else torch.full_like(total, constant)


def build_maps(layer: LayerView, plan: LayerPlan, ridge: float, shrinkage: float = 0.0) -> dict[str, torch.Tensor]:
    """Return the tensors of a plan's constants and linear maps, see `Constant` and `Linear`.

    Args:
        layer: the layer.
        plan: of it.
        ridge: see `Regression.solve`.
        shrinkage: pulls each map towards the layer's mean output as if that many tokens had given it.
    """
    every = constants(layer.sums, "optimal", shrinkage)
    maps = plan.of(Linear)
    built = {"constant": every[list(novices)]} if (novices := plan.of(Constant)) else {}
    if not maps:
        return built
    constant, common = every[list(maps)], None
    if any(answer.shared for answer in maps.values()):
        found = (_regression(layer, expert) for expert in maps)
        rank = max(answer.rank for answer in maps.values())
        common = shared_inputs((some for some in found if some), layer.shape.width, rank, ridge)
    inputs, outputs, scarce = [], [], []
    for at, (expert, answer) in enumerate(maps.items()):
        regression = _regression(layer, expert)
        inner, outer, mean = _factors(regression, answer.rank, ridge, common, layer)
        if regression is None or regression.tokens < answer.rank:
            scarce.append(expert)
        # like a novice's: pulled towards the layer's mean where few tokens say what the expert does
        count = float(layer.sums.count[expert])
        outer = outer * (count / (count + shrinkage)) if shrinkage else outer
        # c - m A B: the constant takes what the map gives for the mean input
        constant[at] -= ((mean @ inner) @ outer).cpu()
        inputs.append(inner.T)
        outputs.append(outer)
    if scarce:
        warnings.warn(
            f"layer {layer.index}: {len(scarce)} linear stand-ins have fewer sampled tokens than their rank (expert "
            f"{scarce[0]} first) and are of a lower rank in truth; keep more with "
            "`moetailor calibrate --sample-tokens`",
            MoetailorWarning,
            stacklevel=2,
        )
    factors = {"in": common.T.cpu() if common is not None else torch.cat(inputs), "out": torch.cat(outputs)}
    if next(iter(maps.values())).int8:  # where each row is a matrix with a scale of its own
        factors = {name: rows[:, None] for name, rows in factors.items()}
    return built | {"linear_constant": constant} | {f"linear_{name}": rows for name, rows in factors.items()}


def map_on(
    layer: LayerView, expert: int, tokens: Tokens, rank: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the map of an expert on some tokens: its constant [D] and both factors [r, D], float64.

    Args:
        layer: the layer.
        expert: the expert.
        tokens: at least one of its own.
        rank: r; rows that the tokens are too few for are zeros.
        ridge: see `Regression.solve`.
    """
    regression = _regression(layer, expert, tokens)
    inner, outer, mean = _factors(regression, rank, ridge, None, layer)
    assert regression is not None
    return regression.mean_out.double().cpu() - (mean @ inner) @ outer, inner.T, outer


def folds(layer: LayerView, token: torch.Tensor) -> list[torch.Tensor]:
    """Return masks of an expert's tokens, each of those that judge what was fitted to the others, bool [T]."""
    return held_out_masks(token, min(SCARCE * layer.sample.hidden.shape[1], ENOUGH))


def _regression(layer: LayerView, expert: int, tokens: Tokens | None = None) -> Regression | None:
    """Return the regression of an expert's outputs on its sampled tokens, or on some; None without tokens."""
    tokens = tokens or tokens_of(layer, {expert: 1.0})
    if not tokens.own:
        return None
    x_TD = layer.inputs(tokens.place)
    y_TD, weight_T = layer.outputs(expert, tokens.place).to(x_TD.dtype), tokens.weight.to(x_TD.device)
    own = Moments.of(x_TD[: tokens.own], y_TD[: tokens.own], weight_T[: tokens.own])
    if len(x_TD) == tokens.own:
        return Regression(own)
    return Regression(own, Moments.of(x_TD[tokens.own :], y_TD[tokens.own :], weight_T[tokens.own :], own.centre))


def _factors(
    regression: Regression | None, rank: int, ridge: float, common: torch.Tensor | None, layer: LayerView
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A [D, r], B [r, D] and m [D] of a map of exactly the rank, padded with zeros where tokens are too few."""
    width = layer.sample.hidden.shape[1]
    if regression is None:
        empty = torch.zeros(width, rank, dtype=torch.float64)
        return empty, empty.T, torch.zeros(width, dtype=torch.float64)
    found = regression.solve(rank, ridge) if common is None else regression.solve_with(common[:, :rank], ridge)
    inner, outer = found.inner.double().cpu(), found.outer.double().cpu()
    missing = rank - inner.shape[1]
    return pad(inner, (0, missing)), pad(outer, (0, 0, 0, missing)), found.mean_in.double().cpu()
