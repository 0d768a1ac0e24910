"""Clusters, centres, permutations and choices, against enumeration and by hand."""

import itertools
import warnings

import pytest
import torch

from moetailor.fitting.align import match, neuron_distance, neuron_weights, permuted
from moetailor.fitting.cluster import agglomerate, centres_of, k_means, medoids, nearest

POINTS = torch.tensor([[0.0], [1.0], [10.0], [11.5], [30.0]])


def test_nearest_takes_the_lower_number_of_equals_and_centres_are_their_own() -> None:
    distance = torch.tensor([[0.0, 1.0, 1.0], [0.0, 5.0, 5.0], [2.0, 2.0, 0.0]])
    assert nearest(distance, [1, 2]) == [1, 1, 2]


def test_agglomeration_by_hand() -> None:
    assert agglomerate(POINTS, 3).tolist() == [0, 0, 1, 1, 2]
    assert agglomerate(POINTS, 2).tolist() == [0, 0, 0, 0, 1]
    assert agglomerate(POINTS, 9).tolist() == [0, 1, 2, 3, 4]


def test_linkages_differ() -> None:
    # a chain of steps 2, 2.1, 2.2 and 2.7: single linkage follows it, complete linkage cuts it in the middle
    chain = torch.tensor([[0.0], [2.0], [4.1], [6.3], [9.0], [10.0]])
    assert agglomerate(chain, 2, "single").tolist() == [0, 0, 0, 0, 1, 1]
    assert agglomerate(chain, 2, "complete").tolist() == [0, 0, 1, 1, 1, 1]


def test_k_means_sees_directions_and_leaves_no_cluster_empty() -> None:
    rays = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 2.0], [0.1, 9.0]])
    assert k_means(rays, 2, 0).tolist() == [0, 0, 1, 1]
    same = torch.ones(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy says that a cluster is empty
        assert sorted(set(k_means(same, 4, 0).tolist())) == [0, 1, 2, 3]


def test_the_centre_has_the_largest_weight() -> None:
    assert centres_of(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 3.0, 2.0, 2.0, 1.0])) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(5))
def test_medoids_are_near_the_best_of_all_choices(seed: int) -> None:
    cost = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).fill_diagonal_(0)
    best = min(float(cost[:, list(some)].min(1).values.sum()) for some in itertools.combinations(range(9), 4))
    found = medoids(cost, 4)
    assert found == sorted(set(found))
    assert len(found) == 4
    assert float(cost[:, found].min(1).values.sum()) <= 1.1 * best
    assert {2, 7} <= set(medoids(cost, 4, forced=[7, 2]))


def test_matching_is_the_cheapest_permutation() -> None:
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    best = min(sum(float(cost[i, p]) for i, p in enumerate(order)) for order in itertools.permutations(range(5)))
    assert float(cost[torch.arange(5), match(cost)].sum()) == pytest.approx(best)


def test_a_permuted_expert_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    one = {name: torch.randn(shape, generator=generator) for name, shape in (("gate", (4, 3)), ("up", (4, 3)))}
    one |= {"down": torch.randn(3, 4, generator=generator), "down_bias": torch.randn(3, generator=generator)}
    order = torch.tensor([2, 0, 3, 1])
    other = permuted(one, order)
    assert torch.equal(other["down"], one["down"][:, order])
    back = permuted(other, match(neuron_distance(neuron_weights(one), neuron_weights(other))))
    assert all(torch.equal(back[name], one[name]) for name in one)
