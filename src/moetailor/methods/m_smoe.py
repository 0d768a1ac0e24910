"""M-SMoE: merge experts into the most used ones, guided by the router (arXiv:2310.01334).

Published: neurons are matched by permutation, the most used experts of the whole model are dominant (so layers keep
different numbers of them), every other expert joins the dominant one whose router logits are most like its own, and
weights are averaged by usage.

Here: the same. `budget` says whether the number of dominant experts is the same in every layer, which is what a budget
of experts a layer asks for and what later papers report as better, or set for all layers together as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from moetailor.answers import Merged
from moetailor.fitting.align import match, neuron_distance, neuron_weights
from moetailor.fitting.cluster import nearest
from moetailor.methods.choose import global_keeps, top
from moetailor.methods.merge import Matrices, averages
from moetailor.methods.registry import method
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView


def build(layer: LayerView, plan: LayerPlan, *, align: bool, **_: object) -> Matrices:
    """Return the usage-weighted average of each cluster, neurons matched to those of its centre."""
    return averages(layer, plan, layer.sums.count, _same_weights if align else None)


@method(
    "m_smoe",
    removed=Merged,
    paper="arXiv:2310.01334",
    needs={"count"},
    weights=True,
    scoped=True,
    spreads=lambda *, budget, **_: budget == "global",
    builds={"merged"},
    build=build,
)
def m_smoe(
    layers: Sequence[LayerView],
    keeps: Sequence[int],
    *,
    budget: Literal["layer", "global"] = "layer",
    align: bool = True,
) -> Iterator[LayerPlan]:
    """Merge every expert into the most used one whose router logits are most like its own.

    Args:
        layers: the layers.
        keeps: experts that stay in each.
        budget: ``layer`` keeps as many in each, ``global`` (paper) the most used of all layers together, at least one
            in each.
        align: match neurons by their weights before averaging (paper).
    """
    if budget == "global":
        keeps = global_keeps(layers, [layer.sums.count for layer in layers], keeps, least=1)
    for layer, keep in zip(layers, keeps, strict=True):
        dominant = top(layer, layer.sums.count, keep)
        columns = F.normalize(layer.sample.logits.double(), dim=0)
        centres = nearest(1 - columns.T @ columns, dominant)
        yield merge_into(centres, layer.sums.count.tolist(), unchanged=layer.protected)
        layer.close()


def _same_weights(layer: LayerView, centre: int, member: int) -> torch.Tensor:
    rows = [neuron_weights(layer.experts.one(expert)) for expert in (centre, member)]
    return match(neuron_distance(*rows))
