"""Choosing which experts stay: exact counts, deterministic ties, protected experts and equal groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from moetailor.answers import Drop
from moetailor.errors import PlanError
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView


def top(layer: LayerView, scores: torch.Tensor, keep: int) -> list[int]:
    """Return the `keep` experts with the highest scores, ascending.

    Of equal scores that with more tokens stays, so that what no token reached goes first; then the lower number.

    Args:
        layer: its protected experts stay whatever they score.
        scores: one number an expert, [E].
        keep: how many stay.

    Raises:
        PlanError: more experts are protected than may stay.
    """
    refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
    return sorted(_ranked(layer, scores, range(layer.num_experts))[:keep])


def refuse_protected(index: int, protected: Collection[int], experts: int, keep: int, groups: int = 1) -> None:
    """Refuse more protected experts than may stay.

    Args:
        index: number of the decoder layer.
        protected: its protected experts.
        experts: all its experts.
        keep: how many stay.
        groups: groups of which the same number stays.

    Raises:
        PlanError: see the message.
    """
    if groups == 1 and len(protected) > keep:
        raise PlanError(
            f"layer {index}: {len(protected)} experts are protected, the budget keeps {keep}; protect fewer"
        )
    for group in range(groups if groups > 1 else 0):
        inside = sum(expert * groups // experts == group for expert in protected)
        if inside > kept_of_group(keep, groups):
            raise PlanError(
                f"layer {index}, group {group}: {inside} experts are protected, the budget keeps "
                f"{kept_of_group(keep, groups)} of each group; protect fewer"
            )


def drop_lowest(layer: LayerView, scores: torch.Tensor, keep: int) -> LayerPlan:
    """Return the plan that drops the slots with the lowest scores.

    A group-limited router needs the same number of experts in each group, so the lowest of each group go, and a number
    that does not divide is rounded towards keeping more.
    """
    groups, size = layer.groups, layer.num_experts // layer.groups
    if groups == 1:
        return keep_only(layer.num_experts, top(layer, scores, keep), Drop(), scores.tolist())
    refuse_protected(layer.index, layer.protected, layer.num_experts, keep, groups)
    keep_each = kept_of_group(keep, groups)
    kept: list[int] = []
    for group in range(groups):
        kept += _ranked(layer, scores, range(group * size, (group + 1) * size))[:keep_each]
    return keep_only(layer.num_experts, kept, Drop(), scores.tolist())


def _ranked(layer: LayerView, scores: torch.Tensor, experts: Iterable[int]) -> list[int]:
    """Return experts, those first that stay first, see `top`."""
    score, count = scores.tolist(), layer.sums.count.tolist()
    return sorted(experts, key=lambda e: (e not in layer.protected, -score[e], -count[e], e))


def global_keeps(
    layers: Sequence[LayerView], scores: Sequence[torch.Tensor], keeps: Sequence[int], *, least: int | None = None
) -> list[int]:
    """Return how many experts each layer keeps when the best of all layers together stay; of equals the earlier.

    Args:
        layers: the layers; their protected experts stay.
        scores: one number an expert of each layer, compared as shares of the layer's sum.
        keeps: experts that would stay in each; as many stay in all.
        least: experts that every layer keeps at least; the router's top-k when None.
    """
    shares = [score / score.sum().clamp_min(1e-300) for score in scores]
    return best_of_all(layers, shares, sum(keeps), [layer.top_k if least is None else least for layer in layers])


def best_of_all(
    layers: Sequence[LayerView], worths: Sequence[torch.Tensor], keep: int, least: Sequence[int], *, groups: int = 1
) -> list[int]:
    """Return how many experts each layer keeps when all layers are ranked together and the most valuable experts stay.

    Where losses add up no allocation loses less: within a layer the experts that lose least go first, so that each
    further removal costs at least as much as the one before. Of equal ones that of the earlier layer stays.

    Args:
        layers: the layers; their protected experts stay.
        worths: what is lost with each expert of each layer, [E].
        keep: experts that stay in all.
        least: experts that each layer keeps at least.
        groups: groups of which the same number stays.
    """
    every: list[tuple[bool, float, int]] = []
    for number, (layer, worth, must) in enumerate(zip(layers, worths, least, strict=True)):
        protected = torch.tensor([expert in layer.protected for expert in range(layer.num_experts)])
        ranked = (
            worth.double().masked_fill(protected, float("inf")).view(groups, -1).sort(dim=1, descending=True).values
        )
        # The n-th best of all groups stay or go together.
        every += [(place * groups >= must, -value, number) for place, value in enumerate(ranked.sum(0).tolist())]
    kept = [number for *_, number in sorted(every)[: keep // groups]]
    return [groups * kept.count(number) for number in range(len(layers))]


def kept_of_group(keep: int, groups: int) -> int:
    """Return how many of each group stay when at least `keep` of a layer do."""
    return -(-keep // groups)
