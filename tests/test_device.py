"""Another device than the CPU, where there is one: plans and results are those of the CPU, to rounding."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetailor
from support.methods import REMOVING, TINY_PARAMETERS
from support.reference import REFERENCE
from support.tiny import load, logits, token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


@every_device
@pytest.mark.parametrize("method", sorted(moetailor.METHODS))
def test_every_method_plans_and_builds_there(
    method: str, device: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    measured = calibration("olmoe")
    budget = moetailor.Budget.parse(keep=6 if method in REMOVING else 8)
    parameters = TINY_PARAMETERS.get(method)
    plans = [moetailor.make_plan(measured, method, budget, parameters=parameters, device=d) for d in ("cpu", device)]
    assert [layer.pool for layer in plans[0].layers.values()] == [layer.pool for layer in plans[1].layers.values()]
    made = []
    for number, where in enumerate(("cpu", device)):
        out = tmp_path / str(number)
        moetailor.apply(plans[0], checkpoint("olmoe"), out, calibration=measured, device=where)
        made.append(logits(load(out)))
    # Of so few tokens some fits are nearly singular, and factors have no sign: what they give is compared.
    assert float((made[0] - made[1]).norm() / made[0].norm()) < 0.02


# Against the CPU itself it takes long and finds what other tests do.
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_bits_are_chosen_and_rounded_there(device: str, tmp_path: Path) -> None:
    """On the reference model: nearly all codes and widths are those of the CPU, and what is lost is the same."""
    data = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=24, length=256)
    held = moetailor.TextOptions(data=(str(REFERENCE / "heldout.jsonl"),), sequences=8, length=256)
    given: dict[str, Any] = {"text": data, "sensitivity": True, "dtype": "float32"}
    measured = moetailor.calibrate(REFERENCE, tmp_path / "c", device=device, **given)
    other = moetailor.calibrate(REFERENCE, tmp_path / "o", device="cpu", **given)
    for index in measured.layers:
        for name in ("gate_sq", "gate_sq_norm_sq"):
            one, two = (getattr(each.sums(index), name) for each in (measured, other))
            torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    assert measured.sensitivities() == pytest.approx(other.sensitivities(), rel=0.05)
    found = {}
    for where in ("cpu", device):
        plan = moetailor.make_plan(measured, "auto", moetailor.Budget.parse(size="40%"), device=where)
        out = moetailor.apply(plan, REFERENCE, tmp_path / where, calibration=measured, device=where, overwrite=True)
        found[where] = moetailor.evaluate(out, against=REFERENCE, text=held, device=where).overall.kl.mean
    assert found[device] == pytest.approx(found["cpu"], rel=0.1)


@every_device
def test_a_model_is_calibrated_there(device: str, checkpoint: Get, tmp_path: Path) -> None:
    batches = token_batches()
    made = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "a", text=batches, device=device, stream=True)
    other = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "b", text=batches, device="cpu")
    for index in made.layers:
        assert torch.equal(made.sums(index).count, other.sums(index).count)
        torch.testing.assert_close(
            made.sums(index).gate_sq_output, other.sums(index).gate_sq_output, rtol=1e-3, atol=1e-5
        )


@pytest.mark.slow
def test_the_script_for_gpus_runs_where_there_is_none() -> None:
    script = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--layers", "1"]
    root = Path(__file__).parents[1]
    ran = subprocess.run([*script, "--parts", "layers", "model"], cwd=root, check=True, capture_output=True, text=True)
    told = [line.split()[0] for line in ran.stdout.splitlines()]
    assert {"auto", "quantize,", "linear,", "mergemoe,"} < set(told)
    assert {"calibrate", "plan", "apply", "evaluate", "original", "result"} < set(told)
