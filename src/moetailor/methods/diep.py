"""DiEP: differentiable expert pruning, layer by layer.

Published: which experts stay is relaxed to numbers, alpha inside a layer and beta between layers, learned by gradient
steps on what the pruned model loses together with a regulariser; experts are ranked by alpha times beta over the whole
model, so that layers keep different numbers.

Here: alpha only, from the abstract: the full text, with its exact loss and regulariser, was not at hand, so both are
ours. The loss is the squared error of the layer's output on sampled tokens with the gates that they had: neither the
choice nor the gates are made anew for a relaxed mask, which would follow no router's rule. It is a quadratic form of
alpha, so that a step costs no token. The regulariser is the squared distance of alpha's sum from the budget. Such
losses say nothing about layers against each other, so there is no beta and every layer keeps as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.fitting.distances import output_gram
from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.methods.routing import own_gates
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView

# Step of Adam, on the logits of the mask.
RATE = 0.05


@register
@dataclass(frozen=True, kw_only=True)
class Diep(Method):
    """Drop the experts whose relaxed mask ends lowest after gradient steps on the layer's output.

    Attributes:
        steps: gradient steps.
        pull: weight of the regulariser against the share of the output's energy that is lost.
        tokens: sampled tokens that every expert is run on.
    """

    steps: Annotated[int, AtLeast(1)] = 300
    pull: Annotated[float, AtLeast(0)] = 10.0
    tokens: Annotated[int, AtLeast(1)] = 1024

    name = "diep"
    reads_weights = True

    @torch.enable_grad()
    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Learn the mask of one layer."""
        # G_ij = sum_t g_i g_j <f_i(x_t), f_j(x_t)>
        gram = output_gram(layer, self.tokens, own_gates(layer.sample)[: self.tokens])
        energy = gram.sum().clamp_min(1e-300)
        share = min(keep / layer.num_experts, 0.99)
        relaxed = torch.full((layer.num_experts,), share, dtype=torch.float64).logit().requires_grad_()
        optimiser = torch.optim.Adam([relaxed], lr=RATE)
        for _ in range(self.steps):
            alpha = relaxed.sigmoid()
            # sum_t |sum_i (1 - alpha_i) g_i f_i(x_t)|^2 / sum_t |sum_i g_i f_i(x_t)|^2
            lost = (1 - alpha) @ gram @ (1 - alpha) / energy
            # ((sum_i alpha_i - keep) / E)^2
            excess = (alpha.mean() - keep / layer.num_experts).square()
            optimiser.zero_grad()
            (lost + self.pull * excess).backward()
            optimiser.step()
        return drop_lowest(layer, relaxed.detach().sigmoid(), keep)
