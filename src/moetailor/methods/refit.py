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
from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.answers import Answer, Drop, Fitted, Keep
from moetailor.errors import MoetailorWarning
from moetailor.fitting.averages import stacked
from moetailor.fitting.held_out import held_out
from moetailor.fitting.least_squares import RIDGES, NormalEquations, ridge, ridge_errors
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.methods.routing import own_gates, routing_of
from moetailor.methods.subsets import best_subset
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Refit(Method):
    """Drop experts and fit the down projections of those that stay to the output of all: native, and fitted.

    Attributes:
        rounds: how often each of them is fitted.
        swaps: so many times the best exchange of a kept expert for a dropped one is made, as long as one helps.
        tokens: sampled tokens that subsets are compared on.
        seed: another seed starts at other subsets.
    """

    rounds: Annotated[int, AtLeast(1)] = 3
    swaps: Annotated[int, AtLeast(0)] = 64
    tokens: Annotated[int, AtLeast(1)] = 1024
    seed: int = 0

    name = "refit"
    reads_weights = True
    slow = True
    builds = frozenset({"fitted"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Choose the experts of one layer."""
        options = {"swaps": self.swaps, "tokens": self.tokens, "seed": self.seed}
        kept = best_subset(layer, keep, self.name, exhaustive=0, samples=100, **options)
        if len(kept) == layer.num_experts:
            return untouched(layer.num_experts)

        def slot(number: int) -> Answer:
            if number not in kept:
                return Drop()
            return Keep() if number in layer.protected else Fitted()

        return LayerPlan(slots=tuple(slot(number) for number in range(layer.num_experts)))

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the experts that stay with their down projections fitted."""
        downs = self._downs(layer, plan)
        fitted = (
            layer.experts.expert(expert) | {"down": downs.pop(expert).to(layer.experts.dtype)}
            for expert in plan.rebuilt
        )
        return stacked(fitted, len(plan.rebuilt))

    def _downs(self, layer: LayerView, plan: LayerPlan) -> dict[int, torch.Tensor]:
        """Return the fitted down projections; what is only there to fit them goes before the experts are stacked."""
        gates_TE, missing_TD = missing_output(layer, plan)
        downs: dict[int, torch.Tensor] = {}
        for _round in range(self.rounds):
            for expert in plan.rebuilt:
                matrices = layer.experts.expert(expert)
                original = matrices["down"].to(missing_TD)
                before = downs.get(expert, original)
                token = gates_TE[:, expert].nonzero().flatten()
                hidden_TF = layer.experts.hidden(matrices, layer.inputs(token)).to(missing_TD)
                features_TF = gates_TE[token, expert, None].to(missing_TD) * hidden_TF
                target_TD = missing_TD[token] + features_TF @ before.T
                downs[expert] = fitted_down(token, features_TF, target_TD, original, before)
                missing_TD[token] = target_TD - features_TF @ downs[expert].T
        neurons = layer.experts.shape.intermediate
        fitted_TE = gates_TE[~held_out(torch.arange(len(gates_TE)))]
        scarce = [count for expert in downs if (count := int((fitted_TE[:, expert] > 0).sum())) < neurons]
        if scarce:
            warnings.warn(
                f"layer {layer.index}: {len(scarce)} of {len(downs)} experts were fitted on fewer tokens "
                f"({min(scarce)} at least) than they have neurons ({neurons}); "
                "keep more with `moetailor calibrate --sample-tokens`",
                MoetailorWarning,
                stacklevel=3,
            )
        return downs


def missing_output(layer: LayerView, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gates among the experts that stay [T, E], and what these lack of the original's output [T, D].

    Args:
        layer: the layer.
        plan: which experts stay.

    Raises:
        PlanError: what the router would do is not known.
    """
    sample = layer.sample
    rule, known_T = routing_of(sample, layer.limits, layer.correction, f"refit, layer {layer.index}")
    stays_E = torch.zeros(layer.num_experts, dtype=torch.bool)
    stays_E[plan.kept_slots] = True
    gates_TE = rule.gates(stays_E[None])[0]
    # Where the rule does not give the router's own choice, nothing is known of another one.
    gates_TE[~known_T] = 0
    own_TE = own_gates(sample) * known_T[:, None]
    wide = torch.promote_types(layer.experts.dtype, torch.float32)
    missing_TD = torch.zeros(sample.hidden.shape, dtype=wide, device=layer.experts.device)
    for expert in range(layer.num_experts):
        chose = own_TE[:, expert].nonzero().flatten()
        missing_TD[chose] += own_TE[chose, expert, None].to(missing_TD) * layer.outputs(expert, chose).to(missing_TD)
        if stays_E[expert]:
            given = gates_TE[:, expert].nonzero().flatten()
            outputs = layer.experts.outputs(expert, layer.inputs(given))
            missing_TD[given] -= gates_TE[given, expert, None].to(missing_TD) * outputs.to(missing_TD)
    return gates_TE, missing_TD


def fitted_down(
    token: torch.Tensor,
    features_TF: torch.Tensor,
    target_TD: torch.Tensor,
    original: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """Return the down projection of one expert, as strongly pulled to the original as held-out tokens say; the one of
    `before` where no fit helps these.

    Args:
        token: places in the sample, [T].
        features_TF: what it is applied to there.
        target_TD: what it should give.
        original: the one of the original, [D, F].
        before: the one so far, [D, F].
    """
    chooses = held_out(token).to(features_TF.device)
    fit, choose = (NormalEquations.zeros(len(original), original.shape[1], original.device) for _ in range(2))
    fit.add(features_TF[~chooses], target_TD[~chooses])
    choose.add(features_TF[chooses], target_TD[chooses])
    if not fit.tokens or not choose.tokens:
        return before
    errors = ridge_errors(fit, choose, original, RIDGES)
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    return ridge(fit, original, RIDGES[best]).to(original) if errors[best] < choose.error(before) else before
