"""M-SMoE: merge experts into the most used ones, guided by the router (arXiv:2310.01334).

Published: neurons are matched by permutation, the most used experts of the whole model are dominant (so layers keep
different numbers of them), every other expert joins the dominant one whose router logits are most like its own, and
weights are averaged by usage.

Here: the same. `budget` says whether the number of dominant experts is the same in every layer, which is what a budget
of experts a layer asks for and what later papers report as better, or set for all layers together as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from moetailor.answers import Merged
from moetailor.fitting.align import match, neuron_distance, neuron_weights
from moetailor.fitting.averages import averages
from moetailor.fitting.cluster import nearest
from moetailor.methods.choose import global_keeps, top
from moetailor.methods.method import JointMethod
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class MSMoE(JointMethod):
    """Merge every expert into the most used one whose router logits are most like its own.

    Attributes:
        budget: ``layer`` keeps as many in each, ``global`` (paper) the most used of all layers together, at least one
            in each.
        align: match neurons by their weights before averaging (paper).
    """

    budget: Literal["layer", "global"] = "layer"
    align: bool = True

    name = "m_smoe"
    paper = "arXiv:2310.01334"
    replaces_with = Merged
    needs = frozenset({"count"})
    reads_weights = True
    builds = frozenset({"merged"})

    @property
    def decides_counts(self) -> bool:
        """Whether the budget is one of all layers."""
        return self.budget == "global"

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Choose dominant experts in all layers, then group the others around them."""
        if self.budget == "global":
            keeps = global_keeps(layers, [layer.sums.count for layer in layers], keeps, least=1)
        for layer, keep in zip(layers, keeps, strict=True):
            dominant = top(layer, layer.sums.count, keep)
            columns = F.normalize(layer.sample.logits.double(), dim=0)
            centres = nearest(1 - columns.T @ columns, dominant)
            yield merge_into(centres, layer.sums.count.tolist(), unchanged=layer.protected)
            layer.close()

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the usage-weighted average of each cluster, neurons matched to those of its centre."""
        return averages(layer, plan, layer.sums.count, _same_weights if self.align else None)


def _same_weights(layer: LayerView, centre: int, member: int) -> torch.Tensor:
    rows = [neuron_weights(layer.experts.expert(expert)) for expert in (centre, member)]
    return match(neuron_distance(*rows))
