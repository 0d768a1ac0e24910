"""Choosing which experts stay: exact counts, deterministic ties, protected experts and equal groups."""

from __future__ import annotations

import torch

from moefit.errors import PlanError
from moefit.planning.slots import LayerPlan, keep_only
from moefit.planning.view import LayerView


def top(layer: LayerView, scores: torch.Tensor, keep: int) -> list[int]:
    """Return the `keep` experts with the highest scores, ascending; of equal scores the lower number stays.

    Args:
        layer: its protected experts stay whatever they score.
        scores: one number an expert, [E].
        keep: how many stay.

    Raises:
        PlanError: more experts are protected than may stay.
    """
    if len(layer.protected) > keep:
        raise PlanError(
            f"layer {layer.index}: {len(layer.protected)} experts are protected, the budget keeps {keep}; protect fewer"
        )
    first = torch.tensor([expert in layer.protected for expert in range(layer.num_experts)])
    ranked = sorted(range(layer.num_experts), key=lambda e: (not first[e], -float(scores[e]), e))
    return sorted(ranked[:keep])


def drop_lowest(layer: LayerView, scores: torch.Tensor, keep: int) -> LayerPlan:
    """Return the plan that drops the slots with the lowest scores.

    A group-limited router needs the same number of experts in each group, so the lowest of each group go, and a number
    that does not divide is rounded towards keeping more.
    """
    groups, size = layer.groups, layer.num_experts // layer.groups
    if groups == 1:
        return keep_only(layer.num_experts, top(layer, scores, keep), "drop", scores.tolist())
    keep_each = kept_of_group(keep, groups)
    kept: list[int] = []
    for group in range(groups):
        members = list(range(group * size, (group + 1) * size))
        protected = [e for e in members if e in layer.protected]
        if len(protected) > keep_each:
            raise PlanError(
                f"layer {layer.index}, group {group}: {len(protected)} experts are protected, the budget keeps "
                f"{keep_each} of each group"
            )
        kept += sorted(members, key=lambda e: (e not in layer.protected, -float(scores[e]), e))[:keep_each]
    return keep_only(layer.num_experts, kept, "drop", scores.tolist())


def kept_of_group(keep: int, groups: int) -> int:
    """Return how many of each group stay when at least `keep` of a layer do."""
    return -(-keep // groups)
