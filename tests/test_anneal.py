"""Annealing: the schedule by hand, the original at the start to the bit, the replacement alone at the end."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moetailor
from moetailor.answers import Constant, LowRank
from moetailor.recovery.anneal import Annealing, beta
from moetailor.runtime.experts import CompressedExperts
from support.tiny import anatomy_of, eager, load, logits

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "nemotron_h"]


def test_the_schedules_by_hand() -> None:
    assert [beta(step, 100, 0.2) for step in (0, 5, 10, 20, 21, 99)] == [1, 0.75, 0.5, 0, 0, 0]
    assert beta(0, 7, 1.0) == 1
    assert beta(7, 7, 1.0) == 0
    for gamma in (1.0, 3.0, 5.0):
        values = [beta(step, 10, 1.0, gamma) for step in range(11)]
        assert values[0] == 1
        assert values[-1] == 0
        assert values == sorted(values, reverse=True)
        assert values[5] == pytest.approx((math.exp(-gamma / 2) - math.exp(-gamma)) / (1 - math.exp(-gamma)))
        assert values[5] < 0.5
    assert beta(3, 10, 1.0, 1e-7) == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_shares_that_mean_nothing_are_refused(share: float) -> None:
    with pytest.raises(moetailor.MoetailorError, match="above 0 and at most 1"):
        moetailor.RecoveryOptions(anneal=share).check()


def models(
    name: str, start: str, checkpoint: Get, calibration: GetCalibration
) -> tuple[torch.nn.Module, torch.nn.Module, Annealing]:
    teacher = load(checkpoint(name))
    anatomy = anatomy_of(teacher)
    keep = calibration(name).model.stacks[0].num_experts - 2
    plan = moetailor.make_plan(
        calibration(name),
        "lightmoe",
        moetailor.Budget.parse(keep=keep),
        parameters={"rank": 2, "bases": 2, "select": "count", "start": start},
    )
    student = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    return student, teacher, Annealing(anatomy, 0.5)


@pytest.mark.parametrize("start", ["zero", "svd"])
@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_original_to_the_bit_to_the_replacement(
    name: str, start: str, checkpoint: Get, calibration: GetCalibration
) -> None:
    student, teacher, annealing = models(name, start, checkpoint, calibration)
    alone, original = logits(student), logits(teacher)
    assert not torch.allclose(alone, original, atol=1e-3)
    annealing.attach(student, teacher)
    assert torch.equal(logits(student), alone)
    annealing.on_train_begin(None, None, None)
    assert torch.equal(logits(student), original)
    annealing.on_step_begin(None, SimpleNamespace(global_step=5, max_steps=20), None)
    assert not any(torch.allclose(logits(student), end, atol=1e-3) for end in (alone, original))
    annealing.on_step_begin(None, SimpleNamespace(global_step=10, max_steps=20), None)
    assert all(part.instead is None for part in student.modules() if isinstance(part, CompressedExperts))
    assert torch.equal(logits(student), alone)


def test_between_the_ends_the_weights_are_the_formula(checkpoint: Get, calibration: GetCalibration) -> None:
    student, teacher, annealing = models("olmoe", "zero", checkpoint, calibration)
    for part in student.modules():
        if isinstance(part, CompressedExperts):
            for name in ("gate", "up", "down"):
                torch.nn.init.normal_(getattr(part, f"low_rank_{name}_out"))
    annealing.attach(student, teacher)
    mixture = annealing._mixtures[0]
    mixture.beta = 0.25
    module, weights = mixture.module, mixture.weights()
    slot = next(iter(module.slots.of(LowRank)))
    number = int(module.low_rank_slot[slot])
    rows = slice(2 * number, 2 * number + 2)
    own = module.low_rank_down_out[rows].T @ module.low_rank_down_in[rows]
    base = module.low_rank_base_down[module.low_rank_base[number]]
    # Own parts that were not zero at the start are faded in with the base.
    expected = 0.25 * mixture.original.down_proj[slot] + 0.75 * (base + own)
    torch.testing.assert_close(weights["down_proj"][slot], expected)


def test_all_that_trains_gets_a_gradient_and_the_originals_go(checkpoint: Get, calibration: GetCalibration) -> None:
    student, teacher, annealing = models("olmoe", "zero", checkpoint, calibration)
    annealing.attach(student, teacher)
    annealing.on_train_begin(None, None, None)
    annealing.on_step_begin(None, SimpleNamespace(global_step=1, max_steps=20), None)
    teacher.requires_grad_(False)
    student(torch.randint(3, 128, (4, 12)), use_cache=False).logits.square().sum().backward()
    module = next(part for part in student.modules() if isinstance(part, CompressedExperts))
    trained = [f"low_rank_base_{part}" for part in ("gate", "up", "down")]
    trained += [f"low_rank_{part}_out" for part in ("gate", "up", "down")]
    for name in (*trained, "down_proj"):
        assert float(getattr(module, name).grad.abs().sum()) > 0, name
    gone = weakref.ref(teacher)
    del teacher
    gc.collect()
    assert annealing._mixtures
    annealing.on_step_begin(None, SimpleNamespace(global_step=10, max_steps=20), None)
    gc.collect()
    assert gone() is None


def test_without_low_rank_experts_there_is_nothing_to_anneal(checkpoint: Get) -> None:
    model = load(checkpoint("olmoe"))
    with pytest.raises(moetailor.MoetailorError, match="no low-rank experts"):
        Annealing(anatomy_of(model), 0.2).attach(model, model)


def test_other_answers_cannot_be_annealed(checkpoint: Get, calibration: GetCalibration) -> None:
    plan = moetailor.make_plan(
        calibration("olmoe"),
        "lightmoe",
        moetailor.Budget.parse(keep=6),
        parameters={"rank": 2, "bases": 2, "select": "count"},
    )
    teacher = load(checkpoint("olmoe"))
    student = eager(moetailor.apply(plan, load(checkpoint("olmoe")), calibration=calibration("olmoe")))
    for part in student.modules():
        if isinstance(part, CompressedExperts):
            rows, answers = (-1, *part.slots.rows[1:]), (Constant(), *part.slots.answers[1:])
            part.slots = replace(part.slots, rows=rows, answers=answers)
    with pytest.raises(moetailor.MoetailorError, match="1 slots with other answers and 0 dropped ones"):
        Annealing(anatomy_of(teacher), 0.2).attach(student, teacher)
