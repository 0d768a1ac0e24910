"""Experts with extreme outputs, by hand and against numpy."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moetailor
from moetailor.methods.run import super_experts

GetCalibration = Callable[[str], moetailor.Calibration]


def measured(peaks: np.ndarray) -> Any:
    """Return what is asked of a calibration: the largest output of each expert, [layers, experts]."""
    return SimpleNamespace(
        layers=list(range(len(peaks))), sums=lambda layer: SimpleNamespace(norm_max=torch.from_numpy(peaks[layer]))
    )


def test_by_hand() -> None:
    # 8 layers of 50 experts: the quantile .995 of 400 values lies at place 397.005 of 0..399, between the third and
    # the second largest.
    peaks = np.ones((8, 50))
    peaks[6, 0], peaks[0, 3], peaks[5, 1] = 1000, 101, 50
    # The quantile is 50 + .005 x 51, a tenth of the largest 100: layers 6 and 7 are too late.
    assert super_experts(measured(peaks)) == {(0, 3)}
    peaks[0, 3] = 100
    assert super_experts(measured(peaks)) == set()
    # Many large ones: now the quantile decides, 61 + .005 of the way to the next.
    peaks[0, :20], peaks[5, 7], peaks[6, 0], peaks[2, 2] = 60, 61, 62, 63
    assert super_experts(measured(peaks)) == {(2, 2)}
    peaks[5, 7] = 62.5
    assert super_experts(measured(peaks)) == {(5, 7), (2, 2)}


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 9])
def test_against_numpy(layers: int) -> None:
    generator = np.random.default_rng(layers)
    for experts in (8, 64):
        peaks = generator.lognormal(sigma=1.5, size=(layers, experts))
        limit = max(np.quantile(peaks, 0.995), peaks.max() / 10)
        early = math.ceil(0.75 * layers)
        wanted = {(int(layer), int(expert)) for layer, expert in np.argwhere(peaks > limit) if layer < early}
        assert super_experts(measured(peaks)) == wanted


def test_they_stay_when_they_are_guarded(calibration: GetCalibration) -> None:
    made = calibration("olmoe")
    found = super_experts(made)
    assert found
    layer, expert = min(found)
    given = {"method": "random", "budget": moetailor.Budget.parse(keep=2)}
    without = [
        seed
        for seed in range(20)
        if expert not in moetailor.make_plan(made, parameters={"seed": seed}, **given).by_layer[layer].pool
    ]
    plan = moetailor.make_plan(made, parameters={"seed": without[0]}, guard_super_experts=True, **given)
    assert all(expert in plan.by_layer[layer].pool for layer, expert in found)
