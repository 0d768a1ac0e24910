"""The pruning scores on one layer worked by hand.

Four experts, six tokens, outputs with norms 3, 4 and 5:
expert 0: g .5 |y| 5, g .5 |y| 5      count 2  gate 1.0  norm 10  mean norm 5    mean g|y| 2.5   mean |y|^2 25
expert 1: g .9 |y| 3                  count 1  gate 0.9  norm  3  mean norm 3    mean g|y| 2.7   mean |y|^2  9
expert 2: g .1 |y| 4, x3              count 3  gate 0.3  norm 12  mean norm 4    mean g|y| 0.4   mean |y|^2 16
expert 3: no token
"""

import pytest

import moetailor
from moetailor.methods.random import Random
from moetailor.planning.view import LayerView
from support.hand import layer_of, sums_of

PAIRS = [
    (0, 0.5, [3.0, 4.0]),
    (0, 0.5, [-4.0, 3.0]),
    (1, 0.9, [0.0, 3.0]),
    (2, 0.1, [4.0, 0.0]),
    (2, 0.1, [0.0, 4.0]),
    (2, 0.1, [-4.0, 0.0]),
]


def hand_layer(**fields: object) -> LayerView:
    return layer_of(sums_of(PAIRS, experts=4, tokens=6), **fields)


@pytest.mark.parametrize(
    ("method", "scores", "kept"),
    [
        ("frequency", (2, 1, 3, 0), [0, 2]),
        ("soft_frequency", (1.0, 0.9, 0.3, 0), [0, 1]),
        ("ean", (10, 3, 12, 0), [0, 2]),
        ("man", (5, 3, 4, 0), [0, 2]),
        ("msan", (25, 9, 16, 0), [0, 2]),
        ("reap", (2.5, 2.7, 0.4, 0), [0, 1]),
    ],
)
def test_scores_and_choice(method: str, scores: tuple, kept: list[int]) -> None:
    plan = moetailor.METHODS[method]().plan(hand_layer(), 2)
    assert plan.scores == pytest.approx(scores)
    assert plan.pool == kept
    assert plan.kept_slots == kept  # the other slots are dropped


def test_ties_keep_the_lower_number() -> None:
    pairs = [(expert, 1.0, [1.0, 0.0]) for expert in range(4)]
    assert moetailor.METHODS["ean"]().plan(layer_of(sums_of(pairs, 4, 4)), 2).pool == [0, 1]


def test_groups_lose_the_same_number() -> None:
    # groups (0, 1) and (2, 3); by frequency alone 1 and 3 would go, and they are the lowest of their groups
    assert moetailor.METHODS["frequency"]().plan(hand_layer(groups=2), 2).pool == [0, 2]
    # soft frequency would keep 0 and 1; each group keeps one
    assert moetailor.METHODS["soft_frequency"]().plan(hand_layer(groups=2), 2).pool == [0, 2]
    # three of four cannot be kept evenly: rounded towards keeping more
    assert moetailor.METHODS["frequency"]().plan(hand_layer(groups=2), 3).pool == [0, 1, 2, 3]


def test_protected_experts_stay() -> None:
    assert moetailor.METHODS["frequency"]().plan(hand_layer(protected=frozenset({3})), 2).pool == [2, 3]
    with pytest.raises(moetailor.PlanError, match="2 experts are protected, the budget keeps 1"):
        moetailor.METHODS["frequency"]().plan(hand_layer(protected=frozenset({0, 3})), 1)


def test_random_depends_on_the_seed_and_the_layer_only() -> None:
    layer = layer_of(sums_of([(e, 1.0, [1.0]) for e in range(32)], 32, 32))
    other = layer_of(layer.sums, index=1)
    assert Random(seed=3).plan(layer, 16) == Random(seed=3).plan(layer, 16)
    assert Random(seed=3).plan(layer, 16) != Random(seed=4).plan(layer, 16)
    assert Random(seed=3).plan(layer, 16).pool != Random(seed=3).plan(other, 16).pool
