"""MoNE on outputs worked by hand, and the identity that makes the exact score exact."""

import pytest
import torch

import moetailor
from moetailor.answers import Constant
from moetailor.fitting.constants import constants
from moetailor.methods.mone import MoNE
from support.hand import layer_of, sums_of

# Expert 0 sees y = 1 and 3 with gates 1 and .5; expert 1 sees y = 10 twice; expert 2 nothing. Four tokens.
PAIRS = [(0, 1.0, [1.0, 0.0]), (0, 0.5, [3.0, 0.0]), (1, 0.2, [0.0, 10.0]), (1, 0.4, [0.0, 10.0])]
LAYER = layer_of(sums_of(PAIRS, experts=3, tokens=4))


def test_scores_of_the_paper() -> None:
    # phi_freq: sum g / T = 1.5/4, .6/4, 0; unbiased variance of {1, 3} is 2, of {10, 10} 0
    assert MoNE(score="frequency").plan(LAYER, 1).scores == pytest.approx((0.375, 0.15, 0))
    assert MoNE(score="frequency", frequency="conditional").plan(LAYER, 1).scores == pytest.approx((0.75, 0.3, 0))
    assert MoNE(score="variance").plan(LAYER, 1).scores == pytest.approx((2**0.5, 0, 0), abs=1e-5)
    assert MoNE().plan(LAYER, 1).scores == pytest.approx((0.375 * 2**0.5, 0, 0), abs=1e-5)


def test_low_scores_become_constants_and_keep_their_slots() -> None:
    plan = MoNE().plan(LAYER, 1)
    assert plan.pool == [0]
    assert list(plan.of(Constant)) == [1, 2]
    assert plan.kept_slots == [0, 1, 2]


def test_where_all_stay_nothing_is_built() -> None:
    """As where a share is less than one expert, and what stays is rounded."""
    assert MoNE().build(LAYER, MoNE().plan(LAYER, 3)) == {}
    assert MoNE().build(LAYER, MoNE().plan(LAYER, 1)).keys() == {"constant"}


def test_novices_by_hand() -> None:
    # mean (1 + 3) / 2; gate mean (1 + 1.5) / 1.5; g^2 mean (1 + .75) / 1.25; never routed: zero
    for name, expected in (("mean", 2.0), ("gate_mean", 2.5 / 1.5), ("optimal", 1.75 / 1.25), ("zero", 0.0)):
        found = constants(LAYER.sums, name)
        assert found[0, 0] == pytest.approx(expected)
        assert found[2].tolist() == [0, 0]


def test_the_exact_score_is_the_error_of_the_layers_output() -> None:
    generator = torch.Generator().manual_seed(0)
    gates, outputs = torch.rand(50, generator=generator), torch.randn(50, 5, generator=generator, dtype=torch.float64)
    pairs = [(0, float(g), y.tolist()) for g, y in zip(gates, outputs, strict=True)]
    layer = layer_of(sums_of(pairs, experts=1, tokens=80))
    constant = constants(layer.sums, "optimal")[0]
    error = sum(float(g) ** 2 * float((y - constant).square().sum()) for g, y in zip(gates, outputs, strict=True)) / 80
    assert MoNE(score="exact").plan(layer, 1).scores[0] == pytest.approx(error, rel=1e-5)
    for other in ("mean", "gate_mean"):
        worse = constants(layer.sums, other)[0]
        assert (
            sum(float(g) ** 2 * float((y - worse).square().sum()) for g, y in zip(gates, outputs, strict=True)) / 80
            > error
        )


def test_shrinkage_pulls_towards_the_layers_mean() -> None:
    # layer mean of y over four pairs: (1 + 3) / 4 = 1 and (10 + 10) / 4 = 5; n = 2, kappa = 2: half of each
    found = constants(LAYER.sums, "mean", shrinkage=2.0)
    assert found[0].tolist() == pytest.approx([0.5 * 2 + 0.5 * 1, 0.5 * 5])
    assert found[2].tolist() == pytest.approx([1, 5])


def test_build_gives_the_planned_slots_in_order() -> None:
    plan = MoNE().plan(LAYER, 1)
    tensors = MoNE(novice="mean").build(LAYER, plan)
    assert tensors["constant"].tolist() == [[0, 10], [0, 0]]


def test_one_token_has_no_variance() -> None:
    layer = layer_of(sums_of([(0, 1.0, [5.0]), (1, 1.0, [5.0])], experts=2, tokens=2))
    assert MoNE(score="variance").plan(layer, 1).scores == (0, 0)


@pytest.mark.parametrize("parameter", ["score", "frequency", "novice"])
def test_unknown_words_are_refused(parameter: str) -> None:
    with pytest.raises(moetailor.PlanError, match=rf"parameter {parameter}=nonsense"):
        MoNE(**{parameter: "nonsense"})
