"""Clusters of experts that merge into the most used of each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moetailor.fitting.cluster import centres_of, nearest
from moetailor.methods.choose import refuse_protected
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView


def clustered(
    layer: LayerView, keep: int, features: torch.Tensor, split: Callable[[torch.Tensor, int], torch.Tensor]
) -> LayerPlan:
    """Return the plan that merges clusters of experts into the most used of each.

    Protected experts stay alone, unless nothing else may stay: then the others are answered by the nearest of them.

    Args:
        layer: the layer.
        keep: experts that stay.
        features: what experts are compared by, [E, anything].
        split: (features, number of clusters) -> cluster of each row.
    """
    refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
    count, protected = layer.sums.count, sorted(layer.protected)
    rest = [expert for expert in range(layer.num_experts) if expert not in layer.protected]
    if len(protected) < keep:
        centres = list(range(layer.num_experts))
        for expert, at in zip(rest, centres_of(split(features[rest], keep - len(protected)), count[rest]), strict=True):
            centres[expert] = rest[at]
    else:
        centres = nearest(torch.cdist(features, features), protected)
    return merge_into(centres, count.tolist(), unchanged=layer.protected)
