"""Which methods drop an expert that no token reached before any that was: all that look at how experts are used."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.calibration.statistics import Sums
from moetailor.methods.choose import drop_lowest, top
from support.families import tiny_model
from support.hand import layer_of
from support.methods import REMOVING, TINY_PARAMETERS
from support.tiny import token_batches

DEAD = 0
"""The number that stays where nothing but a method's own score tells two experts apart."""
BLIND = {
    "camera": "every expert stays, with as many neurons as the others",
    "random": "nothing is looked at",
    "aimer": "nothing but weights is looked at",
    "hc_smoe": "experts are compared by what they give for all tokens, reached or not",
    "sub_moe": "experts are compared by what they give for all tokens, reached or not",
}
"""Methods whose definition knows no dead experts, and why."""
CHANGES: dict[str, dict[str, int]] = {"glm4_moe": {"n_group": 1, "topk_group": 1}, "gpt_oss": {}}
CASES = [(family, seed) for family in CHANGES for seed in (1, 3)]
Measured = tuple[moetailor.Calibration, moetailor.ExpertWeights]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Measured]:
    """Return the calibration of a tiny model in which a bias keeps one expert of each layer from being chosen."""
    made: dict[tuple[str, int], Measured] = {}

    def get(family: str, seed: int) -> Measured:
        if (family, seed) not in made:
            model = tiny_model(family, seed, **CHANGES[family])
            with torch.no_grad():
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    if name.endswith(("e_score_correction_bias", "router.bias")):
                        tensor[DEAD] = -1e4
            folder: Path = tmp_path_factory.mktemp("dead") / "calibration"
            text = token_batches(6, 16)
            calibration = moetailor.calibrate(model, folder, text=text, residual=True, sensitivity=True)
            made[family, seed] = calibration, moetailor.ExpertWeights(model)
        return made[family, seed]

    return get


def keeps_the_dead(method: str, calibration: moetailor.Calibration, weights: moetailor.ExpertWeights) -> bool:
    """Say whether the dead expert of any layer stays where two of each layer go."""
    budget = moetailor.Budget.parse(keep=calibration.model.stacks[0].num_experts - 2)
    plan = moetailor.make_plan(calibration, method, budget, parameters=TINY_PARAMETERS.get(method), weights=weights)
    return any(DEAD in layer.pool for layer in plan.layers.values())


@pytest.mark.parametrize("method", REMOVING)
def test_a_dead_expert_goes_before_any_that_was_reached(method: str, measured: Callable[[str, int], Measured]) -> None:
    kept = [keeps_the_dead(method, *measured(*case)) for case in CASES]
    assert any(kept) == (method in BLIND), kept


def test_a_correction_bias_leaves_the_dead_expert_likely(measured: Callable[[str, int], Measured]) -> None:
    """So that the sum of probabilities alone would keep it."""
    calibration, _ = measured("glm4_moe", 3)
    for layer in calibration.layers:
        sums = calibration.sums(layer)
        assert sums.count.nonzero().flatten().tolist() == list(range(1, len(sums.count)))
        assert float(sums.probability[DEAD]) > float(sums.probability.sort().values[1])


def test_of_equal_scores_the_one_with_more_tokens_stays() -> None:
    """As of one token and of none, whose outputs vary by nothing."""
    sums = Sums.zeros(6, 4)
    sums.count += torch.tensor([0, 0, 3, 1, 0, 2])
    scores = torch.tensor([0.0, 0, 0, 0, 0, -1])
    view = layer_of(sums)
    assert top(view, scores, 2) == [2, 3]
    assert top(view, scores, 3) == [0, 2, 3]
    assert top(replace(view, protected=frozenset({4})), scores, 2) == [2, 4]
    halves = drop_lowest(replace(view, groups=2), scores, 2)
    assert list(halves.pool) == [2, 3]
