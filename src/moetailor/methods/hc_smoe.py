"""HC-SMoE: hierarchical clusters of experts by their mean outputs (arXiv:2410.08589).

Published: an expert is described by the mean of its outputs over all calibration tokens, routed to it or not;
agglomerative clustering with average linkage; usage-weighted average of the weights in their own neuron order.

Here: the same, with the mean over sampled tokens. The released scripts ask for a clustering by a misspelt name and run
k-means instead, so their numbers are not this method's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.answers import Merged
from moetailor.fitting.averages import averages
from moetailor.fitting.cluster import Linkage, agglomerate
from moetailor.methods.merge import clustered
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class HCSMoE(Method):
    """Merge experts whose mean outputs lie near each other, by hierarchical clustering.

    Attributes:
        linkage: how the distance of two clusters follows from those of their members; ``average`` (paper).
        tokens: sampled tokens that every expert is run on.
    """

    linkage: Linkage = "average"
    tokens: Annotated[int, AtLeast(1)] = 2048

    name = "hc_smoe"
    paper = "arXiv:2410.08589"
    replaces_with = Merged
    needs = frozenset({"count"})
    reads_weights = True
    builds = frozenset({"merged"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Cluster the experts of one layer."""

        def split(rows: torch.Tensor, count: int) -> torch.Tensor:
            return agglomerate(rows, count, self.linkage)

        return clustered(layer, keep, mean_outputs(layer, self.tokens), split)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the usage-weighted average of each cluster."""
        return averages(layer, plan, layer.sums.count)


def mean_outputs(layer: LayerView, tokens: int) -> torch.Tensor:
    """Return the mean output of every expert over the same sampled tokens, routed or not, float64 [E, D]."""
    x_TD = layer.sample.hidden[:tokens]
    found = torch.empty(layer.num_experts, x_TD.shape[1], dtype=torch.float64)
    for expert, mean in enumerate(found):
        mean.copy_(layer.experts.outputs(expert, x_TD).double().mean(0))
    return found
