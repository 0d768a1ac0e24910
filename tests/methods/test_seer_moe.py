"""SEER-MoE's counts on layers worked by hand."""

import pytest
import torch

import moetailor
from moetailor.calibration.statistics import Sums
from moetailor.methods.seer_moe import SeerMoE
from moetailor.planning.view import LayerView
from support.hand import layer_of


def layer(count: list[float], probability: list[float] | None = None, **fields: object) -> LayerView:
    sums = Sums.zeros(len(count), 1)
    sums.count += torch.tensor(count)
    sums.probability += torch.tensor(probability or count)
    return layer_of(sums, **fields)


def pools(layers: list[LayerView], keeps: list[int], **parameters: str) -> list[list[int]]:
    return [plan.pool for plan in SeerMoE.of(parameters).plan_layers(layers, keeps)]


def test_soft_and_hard_counts_rank_differently() -> None:
    view = layer([9, 8, 2, 1], [1.0, 5.0, 3.0, 4.0])
    assert pools([view], [2], count="hard") == [[0, 1]]
    assert pools([view], [2], count="soft") == [[1, 3]]


def test_an_expert_that_no_token_reached_goes_first_however_likely_it_was() -> None:
    view = layer([0, 8, 1, 3], [9.0, 5.0, 3.0, 4.0])
    assert pools([view], [3], count="soft") == [[1, 2, 3]]
    assert pools([view], [2], count="soft") == [[1, 3]]
    # Shares without it: .42 .25 .33, and .8 .1 .1: of six that are reached five stay, and no dead one.
    layers = [view, layer([8, 0, 1, 1], [8.0, 90.0, 1.0, 1.0])]
    assert pools(layers, [3, 2], ranking="global", count="soft") == [[1, 2, 3], [0, 2]]


def test_the_global_ranking_compares_shares_and_leaves_every_layer_its_top_k() -> None:
    # Shares: .5 .3 .2 0 and .97 .01 .01 .01, the second layer counted ten times as often. Of four that stay, each
    # layer's best two are sure with top-2; with top-1 the first layer takes .5 .3 .2 and the second .97.
    layers = [layer([5, 3, 2, 0], index=0), layer([970, 10, 10, 10], index=1)]
    assert pools(layers, [2, 2], ranking="global") == [[0, 1, 2], [0]]
    for view in layers:
        view.top_k = 2
    assert pools(layers, [2, 2], ranking="global") == [[0, 1], [0, 1]]
    assert pools(layers, [3, 3], ranking="global") == [[0, 1, 2], [0, 1, 2]]


def test_protected_experts_stay_in_the_global_ranking() -> None:
    layers = [layer([5, 3, 2, 0], protected=frozenset({3})), layer([970, 10, 10, 10], protected=frozenset({2, 3}))]
    # three of four are given away; the last is the best share of all, .97
    assert pools(layers, [2, 2], ranking="global") == [[3], [0, 2, 3]]


def test_groups_refuse_the_global_ranking() -> None:
    with pytest.raises(moetailor.PlanError, match="layer 0 chooses among 2 groups, of which the same number must stay"):
        pools([layer([5, 3, 2, 0], groups=2)], [2], ranking="global")
