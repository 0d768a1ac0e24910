"""Permutations of neurons: an expert computes the same in any order of its neurons, an average of experts does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment


def match(cost: torch.Tensor) -> torch.Tensor:
    """Return for each row the column assigned to it, each column once, at the least total cost (Hungarian), [F].

    Args:
        cost: [F, F].
    """
    _, columns = linear_sum_assignment(cost.double().cpu().numpy())
    return torch.from_numpy(columns)


def neuron_distance(features: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the squared Euclidean distances of two experts' neurons, [F, F].

    Args:
        features: a row for each neuron, [F, anything].
        other: the same for the other expert.
    """
    return torch.cdist(features.double(), other.double()).square()


def neuron_weights(expert: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return an expert's weights with a row for each neuron, [F, 2 D or 3 D]; see `Experts` for the names."""
    parts = [expert[name] for name in ("gate", "up") if name in expert]
    return torch.cat([*parts, expert["down"].T], 1)


def permuted(expert: Mapping[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return an expert with its neurons in another order; it computes the same.

    Args:
        expert: its matrices, see `Experts`.
        order: neuron of the old expert in each place of the new one, [F].
    """
    order = order.to(expert["down"].device)
    axes = {"down": 1, "down_bias": None}
    moved = {name: axes.get(name, 0) for name in expert}
    return {
        name: expert[name] if axis is None else expert[name].index_select(axis, order) for name, axis in moved.items()
    }
