"""Experts that stay with their down projections fitted to what all experts of a layer gave, see `Refit`.

Shapes: T sampled tokens, E experts, F neurons, n of them that stay, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moetailor.answers import Narrow
from moetailor.fitting.held_out import held_out
from moetailor.fitting.least_squares import RIDGES, NormalEquations, ridge, ridge_errors
from moetailor.fitting.neurons import least_missed
from moetailor.methods.routing import own_gates, routing_of
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@dataclass(kw_only=True)
class Fit:
    """What was fitted in one layer.

    Attributes:
        gates: of the experts that stay, [T, E].
        missing: what they lack of the original's output, [T, D].
        stays: the neurons that stay of each, ascending [n], or all.
        downs: their down projections, [D, n].
    """

    gates: torch.Tensor
    missing: torch.Tensor
    stays: dict[int, torch.Tensor | slice] = field(default_factory=dict)
    downs: dict[int, torch.Tensor] = field(default_factory=dict)


def fitted(layer: LayerView, plan: LayerPlan, rounds: int) -> Fit:
    """Return the fitted down projections of the experts that stay, and what they then lack.

    Args:
        layer: the layer.
        plan: which experts stay, perhaps with fewer neurons.
        rounds: how often each is fitted.

    Raises:
        PlanError: what the router would do is not known.
    """
    gates_TE, missing_TD = missing_output(layer, plan)
    narrow, every, found = plan.of(Narrow), slice(None), Fit(gates=gates_TE, missing=missing_TD)
    for _round in range(rounds):
        for expert in narrow or plan.rebuilt:
            matrices = layer.experts.expert(expert)
            original = matrices["down"].to(missing_TD)
            token = gates_TE[:, expert].nonzero().flatten()
            gate_T = gates_TE[token, expert].to(missing_TD)
            hidden_TF = layer.experts.hidden(matrices, layer.inputs(token)).to(missing_TD)
            features_TF = gate_T[:, None] * hidden_TF
            if expert not in found.downs:  # it gives what it gave
                target_TD = missing_TD[token] + features_TF @ original.T
                stays = least_missed(hidden_TF, gate_T.square(), original, narrow[expert].neurons) if narrow else every
                found.stays[expert], before = stays, original[:, stays]
            else:
                stays, before = found.stays[expert], found.downs[expert]
                target_TD = missing_TD[token] + features_TF[:, stays] @ before.T
            features_TF = features_TF[:, stays]
            found.downs[expert] = fitted_down(token, features_TF, target_TD, original[:, stays], before)
            missing_TD[token] = target_TD - features_TF @ found.downs[expert].T
    return found


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
