"""Which experts belong together: clusters and the centre of each, from distances or from features."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.cluster.vq import kmeans2

Linkage = Literal["average", "single", "complete", "ward"]


def nearest(distance: torch.Tensor, centres: Sequence[int]) -> list[int]:
    """Return the nearest of some centres for each expert; a centre is its own, of equal ones the lower number wins.

    Args:
        distance: [E, E], from row to column.
        centres: experts that are centres, ascending.
    """
    chosen = [centres[int(at)] for at in distance[:, list(centres)].argmin(1)]
    return [number if number in set(centres) else centre for number, centre in enumerate(chosen)]


def agglomerate(features: torch.Tensor, count: int, method: Linkage = "average") -> torch.Tensor:
    """Return the cluster of each row after merging the two nearest clusters until `count` are left, [E].

    Args:
        features: one row for each expert, [E, D]; distances are Euclidean.
        count: clusters wanted.
        method: scipy's linkage between clusters.
    """
    if count >= len(features):
        return torch.arange(len(features))
    tree = linkage(features.double().numpy(), method=method)
    return _renumbered(torch.from_numpy(fcluster(tree, count, criterion="maxclust")))


def k_means(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return the cluster of each row by k-means on directions, [E]; every cluster has a member.

    Args:
        features: one row for each expert, [E, D]; scaled to unit length, so that distance is that of the cosine.
        count: clusters wanted.
        seed: for the first centres.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    if count >= len(unit):
        return torch.arange(len(unit))
    _, found = kmeans2(unit.numpy(), count, minit="++", rng=seed, missing="warn")
    cluster = torch.from_numpy(found).long()
    # A cluster that ran empty takes the row that is furthest from the middle of a cluster of several.
    for empty in sorted(set(range(count)) - set(cluster.tolist())):
        sizes = torch.bincount(cluster, minlength=count)
        middle = torch.zeros(count, unit.shape[1], dtype=unit.dtype).index_add_(0, cluster, unit)
        middle /= sizes.clamp_min(1)[:, None]
        far = (unit - middle[cluster]).square().sum(1).masked_fill(sizes[cluster] == 1, -1)
        cluster[int(far.argmax())] = empty
    return _renumbered(cluster)


def centres_of(cluster: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """Return for each expert the member of its cluster with the largest weight; of equal ones the lower number wins.

    Args:
        cluster: cluster of each expert, [E].
        weight: one number an expert, [E].
    """
    best: dict[int, int] = {}
    for expert, number in enumerate(cluster.tolist()):
        if number not in best or float(weight[expert]) > float(weight[best[number]]):
            best[number] = expert
    return [best[number] for number in cluster.tolist()]


def medoids(cost: torch.Tensor, count: int, forced: Collection[int] = (), swaps: int = 200) -> list[int]:
    """Return `count` experts that answer for all at the least total cost: greedy choice, then swaps (PAM).

    Minimises sum_e min_{p chosen} cost[e, p]. The result is ascending and depends on nothing but the arguments.

    Args:
        cost: what is lost when p answers for e, [E, E], 0 on the diagonal.
        count: how many to choose.
        forced: experts that must be among them.
        swaps: the most exchanges that are tried after the greedy choice.
    """
    chosen = sorted(forced)
    while len(chosen) < count:
        now = cost[:, chosen].min(1).values if chosen else torch.full((len(cost),), torch.inf, dtype=cost.dtype)
        total = torch.minimum(cost, now[:, None]).sum(0)
        total[chosen] = torch.inf
        chosen.append(int(total.argmin()))
    for _ in range(swaps):
        best, exchange = float(cost[:, chosen].min(1).values.sum()), None
        for out in sorted(set(chosen) - set(forced)):
            rest = [p for p in chosen if p != out]
            now = cost[:, rest].min(1).values if rest else torch.full((len(cost),), torch.inf, dtype=cost.dtype)
            total = torch.minimum(cost, now[:, None]).sum(0)
            total[chosen] = torch.inf
            into = int(total.argmin())
            if float(total[into]) < best - 1e-12 * abs(best):
                best, exchange = float(total[into]), (out, into)
        if exchange is None:
            break
        chosen = [p for p in chosen if p != exchange[0]] + [exchange[1]]
    return sorted(chosen)


def _renumbered(cluster: torch.Tensor) -> torch.Tensor:
    """Number clusters in the order of their first members."""
    order = {number: at for at, number in enumerate(dict.fromkeys(cluster.tolist()))}
    return torch.tensor([order[number] for number in cluster.tolist()])
