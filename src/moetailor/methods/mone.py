"""MoNE: mixture of novices and experts (arXiv:2507.00390).

Published: the experts whose outputs vary least, weighted by how often they are routed to, become novices: the constant
mean of their outputs.

Here: the same by default. Beyond it, by parameters: the exact squared error of the layer's output as the score, and the
constant that minimises it, sum g^2 y / sum g^2, in place of the mean; both cost nothing more and lose less.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from moetailor.answers import Constant
from moetailor.methods.choose import top
from moetailor.methods.registry import AtLeast, choice, method
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView

SCORES = ("fusion", "frequency", "variance", "exact")
FREQUENCIES = ("unconditional", "conditional")
NOVICES = ("mean", "gate_mean", "optimal", "zero")
NEEDS = {"tokens", "count", "gate", "gate_sq", "output", "gated_output", "gate_sq_output", "norm_sq", "gate_sq_norm_sq"}


def build(layer: LayerView, plan: LayerPlan, *, novice: str, shrinkage: float, **_: object) -> dict[str, torch.Tensor]:
    """Return the novices of the slots that a plan replaces, ``constant`` [n, D] in float64."""
    return {"constant": novices(layer, novice, shrinkage)[list(plan.of(Constant))]}


@method("mone", removed=Constant, paper="arXiv:2507.00390", needs=NEEDS, builds={"constant"}, build=build)
def mone(
    layer: LayerView,
    keep: int,
    *,
    score: Literal["fusion", "frequency", "variance", "exact"] = "fusion",
    frequency: Literal["unconditional", "conditional"] = "unconditional",
    novice: Literal["mean", "gate_mean", "optimal", "zero"] = "mean",
    shrinkage: Annotated[float, AtLeast(0)] = 0.0,
) -> LayerPlan:
    """Replace the experts whose outputs vary least, weighted by routing, by constant vectors.

    Args:
        layer: the layer.
        keep: experts that stay.
        score: ``fusion`` (paper), its parts ``frequency`` or ``variance`` alone, or ``exact``: the squared error of the
            layer's output when the expert becomes its optimal constant.
        frequency: ``unconditional`` (the released code) divides the sum of gates by all tokens, ``conditional`` (the
            paper's formula) by the tokens routed to the expert.
        novice: ``mean`` (paper), ``gate_mean``, ``optimal`` (minimises the squared error of the layer's output), or
            ``zero`` (an ablation).
        shrinkage: pulls each novice towards the layer's mean output as if that many tokens had given it; for experts
            that few tokens reach.
    """
    choice("novice", novice, NOVICES)
    scores = _scores(layer, score, frequency)
    return keep_only(layer.num_experts, top(layer, scores, keep), Constant(), scores.tolist())


def _scores(layer: LayerView, score: str, frequency: str) -> torch.Tensor:
    sums, count = layer.sums, layer.sums.count
    total = sums.tokens if choice("frequency", frequency, FREQUENCIES) == "unconditional" else count.clamp_min(1)
    # phi_freq = sum_x g / T
    often = sums.gate / total
    # phi_var^2 = (sum |y|^2 - |sum y|^2 / n) / (n - 1), the trace of the covariance of the outputs
    spread = (sums.norm_sq - sums.output.square().sum(1) / count.clamp_min(1)).clamp_min(0) / (count - 1).clamp_min(1)
    # L_e = (sum g^2 |y|^2 - |sum g^2 y|^2 / sum g^2) / T
    energy = sums.gate_sq_output.square().sum(1) / sums.gate_sq.clamp_min(1e-300)
    exact = (sums.gate_sq_norm_sq - energy).clamp_min(0) / sums.tokens
    by_name = {"fusion": spread.sqrt() * often, "frequency": often, "variance": spread.sqrt(), "exact": exact}
    return by_name[choice("score", score, SCORES)]


def novices(layer: LayerView, novice: str = "optimal", shrinkage: float = 0.0) -> torch.Tensor:
    """Return a constant for every expert of a layer, float64 [E, D]; zero for one that no token reached.

    Args:
        layer: the layer.
        novice: ``mean`` = sum y / n, ``gate_mean`` = sum g y / sum g, ``optimal`` = sum g^2 y / sum g^2, or ``zero``.
        shrinkage: c = (n c_e + kappa c_layer) / (n + kappa), with kappa this number and c_layer the same mean over all
            experts.
    """
    sums = layer.sums
    output, weight = {
        "mean": (sums.output, sums.count),
        "gate_mean": (sums.gated_output, sums.gate),
        "optimal": (sums.gate_sq_output, sums.gate_sq),
        "zero": (torch.zeros_like(sums.output), sums.count),
    }[choice("novice", novice, NOVICES)]
    constant = output / torch.where(weight > 0, weight, torch.ones_like(weight))[:, None]
    if shrinkage:
        everyone = output.sum(0) / weight.sum().clamp_min(1e-300)
        share = (sums.count / (sums.count + shrinkage))[:, None]
        constant = share * constant + (1 - share) * everyone
    return constant
