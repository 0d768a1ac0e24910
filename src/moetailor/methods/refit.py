"""Refit: drop experts, and fit the down projections of those that stay to what all of them gave.

Not from a paper. The slots of dropped experts go, so the result is an ordinary checkpoint. Which experts stay is NAEE's
question, answered by exchanging one expert at a time; the router then sends every token to the best of those that stay.
With their gate and up projections as they are, the layer's output is linear in their down projections, so these are
fitted in closed form, one expert after the other for a few rounds, each to what the others leave of the original's
output:

    min over W_e of sum_t |F(x_t) - sum_(j != e) g'_tj f_j(x_t) - g'_te W_e h_e(x_t)|^2 + lambda |(W_e - W_e0) S|^2

with g' the gates among those that stay. One token in eight is never fitted: these tokens say how strong the ridge is,
and whether an expert is better left as it was.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import torch

from moetailor.answers import Answer, Drop, Fitted, Keep
from moetailor.errors import MoetailorWarning
from moetailor.fitting.held_out import EVERY
from moetailor.fitting.least_squares import RIDGES, Normal, ridge, ridge_errors
from moetailor.methods.merge import Matrices, stacked
from moetailor.methods.naee import best_subset
from moetailor.methods.registry import AtLeast, method
from moetailor.methods.routing import own_gates, routing_of
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


def build(layer: LayerView, plan: LayerPlan, *, rounds: int, **_: object) -> Matrices:
    """Return the experts that stay with their down projections fitted."""
    gates_TE, left_TD = _left(layer, plan)
    ones = {expert: layer.experts.one(expert) for expert in plan.rebuilt}
    downs = {expert: one["down"].to(left_TD) for expert, one in ones.items()}
    for _round in range(rounds):
        for expert, one in ones.items():
            token = gates_TE[:, expert].nonzero().flatten()
            hidden_TF = layer.experts.hidden(one, layer.sample.hidden[token]).to(left_TD)
            features_TF = gates_TE[token, expert, None].to(left_TD) * hidden_TF
            target_TD = left_TD[token] + features_TF @ downs[expert].T
            downs[expert] = _fitted(token, features_TF, target_TD, one["down"].to(left_TD), downs[expert])
            left_TD[token] = target_TD - features_TF @ downs[expert].T
    neurons = next(iter(ones.values()))["down"].shape[1]
    fitted_TE = gates_TE[~_held(torch.arange(len(gates_TE)))]
    scarce = [count for expert in ones if (count := int((fitted_TE[:, expert] > 0).sum())) < neurons]
    if scarce:
        warnings.warn(
            f"layer {layer.index}: {len(scarce)} of {len(ones)} experts were fitted on fewer tokens ({min(scarce)} at "
            f"least) than they have neurons ({neurons}); keep more with --sample-tokens",
            MoetailorWarning,
            stacklevel=2,
        )
    return stacked([one | {"down": downs[expert].to(one["down"])} for expert, one in ones.items()])


@method("refit", weights=True, slow=True, builds={"fitted"}, build=build)
def refit(
    layer: LayerView,
    keep: int,
    *,
    rounds: Annotated[int, AtLeast(1)] = 3,
    swaps: Annotated[int, AtLeast(0)] = 64,
    tokens: Annotated[int, AtLeast(1)] = 1024,
    seed: int = 0,
) -> LayerPlan:
    """Drop experts and fit the down projections of those that stay to the output of all: native, and fitted.

    Args:
        layer: the layer.
        keep: experts that stay.
        rounds: how often each of them is fitted.
        swaps: so many times the best exchange of a kept expert for a dropped one is made, as long as one helps.
        tokens: sampled tokens that subsets are compared on.
        seed: another seed starts at other subsets.
    """
    del rounds  # says how `build` fits
    kept = best_subset(layer, keep, "refit", exhaustive=0, samples=100, swaps=swaps, tokens=tokens, seed=seed)
    if len(kept) == layer.num_experts:
        return LayerPlan(slots=(Keep(),) * layer.num_experts)

    def slot(number: int) -> Answer:
        if number not in kept:
            return Drop()
        return Keep() if number in layer.protected else Fitted()

    return LayerPlan(slots=tuple(slot(number) for number in range(layer.num_experts)))


def _left(layer: LayerView, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gates among the experts that stay [T, E], and what these leave of the original's output [T, D]."""
    sample = layer.sample
    rule, known_T = routing_of(sample, layer.limits, layer.correction, f"refit, layer {layer.index}")
    stays_E = torch.zeros(layer.num_experts, dtype=torch.bool)
    stays_E[plan.kept_slots] = True
    gates_TE = rule.gates(stays_E[None])[0]
    # Where the rule does not give the router's own choice, nothing is known of another one.
    gates_TE[~known_T] = 0
    own_TE = own_gates(sample) * known_T[:, None]
    wide = torch.promote_types(layer.experts.dtype, torch.float32)
    left_TD = torch.zeros(sample.hidden.shape, dtype=wide, device=layer.experts.device)
    for expert in range(layer.num_experts):
        chose = own_TE[:, expert].nonzero().flatten()
        left_TD[chose] += own_TE[chose, expert, None].to(left_TD) * layer.outputs(expert, chose).to(left_TD)
        if stays_E[expert]:
            given = gates_TE[:, expert].nonzero().flatten()
            outputs = layer.experts.outputs(expert, sample.hidden[given])
            left_TD[given] -= gates_TE[given, expert, None].to(left_TD) * outputs.to(left_TD)
    return gates_TE, left_TD


def _fitted(
    token: torch.Tensor,
    features_TF: torch.Tensor,
    target_TD: torch.Tensor,
    original: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """Return the down projection of one expert, as strongly pulled to the original as held-out tokens say; the one of
    `before` where no fit helps these.
    """
    held = _held(token).to(features_TF.device)
    fit, choose = (Normal.zeros(len(original), original.shape[1], original.device) for _ in range(2))
    fit.add(features_TF[~held], target_TD[~held])
    choose.add(features_TF[held], target_TD[held])
    if not fit.tokens or not choose.tokens:
        return before
    errors = ridge_errors(fit, choose, original, RIDGES)
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    return ridge(fit, original, RIDGES[best]).to(original) if errors[best] < choose.error(before) else before


def _held(token: torch.Tensor) -> torch.Tensor:
    """Return which tokens are never fitted."""
    return token % EVERY == EVERY - 1
