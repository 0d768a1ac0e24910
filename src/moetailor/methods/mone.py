"""MoNE: mixture of novices and experts (arXiv:2507.00390).

Published: the experts whose outputs vary least, weighted by how often they are routed to, become novices: the constant
mean of their outputs.

Here: the same by default. Beyond it, by parameters: the exact squared error of the layer's output as the score, and the
constant that minimises it, sum g^2 y / sum g^2, in place of the mean; both cost nothing more and lose less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from moetailor.answers import Constant
from moetailor.fitting.constants import Mean, constant_errors, constants
from moetailor.methods.choose import top
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class MoNE(Method):
    """Replace the experts whose outputs vary least, weighted by routing, by constant vectors.

    Attributes:
        score: ``fusion`` (paper), its parts ``frequency`` or ``variance`` alone, or ``exact``: the squared error of the
            layer's output when the expert becomes its optimal constant.
        frequency: ``unconditional`` (the released code) divides the sum of gates by all tokens, ``conditional`` (the
            paper's formula) by the tokens routed to the expert.
        novice: ``mean`` (paper), ``gate_mean``, ``optimal`` (minimises the squared error of the layer's output), or
            ``zero`` (an ablation).
        shrinkage: pulls each novice towards the layer's mean output as if that many tokens had given it; for experts
            that few tokens reach.
    """

    score: Literal["fusion", "frequency", "variance", "exact"] = "fusion"
    frequency: Literal["unconditional", "conditional"] = "unconditional"
    novice: Mean = "mean"
    shrinkage: Annotated[float, AtLeast(0)] = 0.0

    name = "mone"
    paper = "arXiv:2507.00390"
    replaces_with = Constant
    needs = frozenset(
        {"tokens", "count", "gate", "gate_sq", "output", "gated_output", "gate_sq_output", "norm_sq", "gate_sq_norm_sq"}
    )
    builds = frozenset({"constant"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Keep the experts with the highest scores."""
        scores = self._scores(layer)
        return keep_only(layer.num_experts, top(layer, scores, keep), Constant(), scores.tolist())

    def _scores(self, layer: LayerView) -> torch.Tensor:
        sums, count = layer.sums, layer.sums.count
        if self.score == "exact":
            return constant_errors(sums)
        # phi_freq = sum_x g / T
        often = sums.gate / (sums.tokens if self.frequency == "unconditional" else count.clamp_min(1))
        # phi_var^2 = (sum |y|^2 - |sum y|^2 / n) / (n - 1), the trace of the covariance of the outputs
        squares = (sums.norm_sq - sums.output.square().sum(1) / count.clamp_min(1)).clamp_min(0)
        deviation = (squares / (count - 1).clamp_min(1)).sqrt()
        return {"fusion": deviation * often, "frequency": often, "variance": deviation}[self.score]

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the novices of the slots that the plan replaces, ``constant`` [n, D] in float64."""
        novices = list(plan.of(Constant))
        return {"constant": constants(layer.sums, self.novice, self.shrinkage)[novices]} if novices else {}
