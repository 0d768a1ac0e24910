"""Averages of experts, perhaps with their neurons matched first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from moetailor.answers.merged import clusters
from moetailor.fitting.align import permuted
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView

Matrices = dict[str, torch.Tensor]
# (layer, centre, member) -> the member's neuron for each neuron of the centre
Order = Callable[[LayerView, int, int], torch.Tensor]


def shares(weight: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """Return B_j = w_j / sum w of some experts, equal shares when nothing is known of them, float64 [members].

    Args:
        weight: one number an expert, [E].
        members: experts of one cluster.
    """
    given = weight[list(members)].double()
    return given / given.sum() if float(given.sum()) > 0 else torch.full_like(given, 1 / len(members))


def average(
    layer: LayerView, centre: int, members: Sequence[int], weight: torch.Tensor, order: Order | None = None
) -> Matrices:
    """Return W = sum_j B_j W_j of some experts' matrices, biases included.

    Args:
        layer: the layer.
        centre: the expert that the others' neurons are matched to.
        members: the experts.
        weight: one number an expert, [E].
        order: how neurons are matched; None leaves them as they lie.
    """
    total: Matrices = {}
    for member, share in zip(members, shares(weight, members).tolist(), strict=True):
        expert = layer.experts.expert(member)
        if order is not None and member != centre:
            expert = permuted(expert, order(layer, centre, member))
        for name, matrix in expert.items():
            total[name] = total[name].add_(matrix, alpha=share) if name in total else matrix * share
    return total


def stacked(experts: Iterable[Matrices], count: int) -> Matrices:
    """Return the matrices of several experts with a leading axis, as `build` gives them.

    Args:
        experts: made one after the other, each put in its place before the next one is.
        count: how many there are.
    """
    found: Matrices = {}
    for number, expert in enumerate(experts):
        for name, matrix in expert.items():
            if name not in found:
                found[name] = matrix.new_empty(count, *matrix.shape)
            found[name][number] = matrix
    return found


def averages(layer: LayerView, plan: LayerPlan, weight: torch.Tensor, order: Order | None = None) -> Matrices:
    """Return the average of every cluster of a plan, stacked in the order of the centres."""
    merged = clusters(plan.slots)
    return stacked((average(layer, centre, members, weight, order) for centre, members in merged.items()), len(merged))
