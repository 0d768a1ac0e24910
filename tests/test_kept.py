"""What planning measured is kept: measured once, whatever is asked for, and never taken for another calibration's."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moetailor
from moetailor import ranks
from moetailor.calibration import kept
from moetailor.checkpoint.lock import claimed
from moetailor.errors import UnwritableError
from moetailor.methods import mix_bits

GetCalibration = Callable[[str], moetailor.Calibration]
PLANS = {
    "auto": ("auto", {}),
    "auto, nothing rounded": ("auto", {"bits": False}),
    "linear": ("linear", {"rank": 4, "ranks": "chosen"}),
}


@pytest.fixture
def measured(calibration: GetCalibration, tmp_path: Path) -> moetailor.Calibration:
    """Return a calibration of its own, of which nothing is kept."""
    folder = tmp_path / "calibration"
    shutil.copytree(calibration("olmoe").folder, folder, ignore=shutil.ignore_patterns(kept.FOLDER))
    return moetailor.Calibration.open(folder)


def planned(measured: moetailor.Calibration, name: str = "auto", remove: str = "60%", **more: Any) -> moetailor.Plan:
    method, parameters = PLANS[name]
    budget = moetailor.Budget.parse(remove=remove)
    return moetailor.make_plan(measured, method, budget, parameters=parameters, device="cpu", **more)


@pytest.mark.parametrize("name", PLANS)
def test_each_expert_is_measured_once(
    name: str, measured: moetailor.Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = planned(measured, name)
    other = planned(measured, name, "30%")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    for where in ("moetailor.fitting.linear_maps", "moetailor.methods.linear", "moetailor.methods.mix_bits"):
        monkeypatch.setattr(f"{where}.held_out_errors", refuse)
    assert planned(measured, name) == first
    assert planned(measured, name, "30%") == other != first
    with pytest.raises(AssertionError, match="measured again"):
        planned(moetailor.Calibration.open(shutil.copytree(measured.folder, tmp_path / "b", ignore=_kept)), name)


def test_of_a_model_that_was_calibrated_in_memory_nothing_is_kept(measured: moetailor.Calibration) -> None:
    """Whether weights on the disk are its own cannot be told: what was measured on them may be of others."""
    source = moetailor.ExpertWeights(measured.model.source)
    in_memory = replace(measured, model=replace(measured.model, fingerprint={"memory": "0"}))
    assert planned(in_memory, weights=source).layers == planned(measured, weights=source).layers
    found = {file.name for file in (measured.folder / kept.FOLDER).iterdir()}
    shutil.rmtree(measured.folder / kept.FOLDER)
    planned(in_memory, weights=source)
    assert found
    assert not (measured.folder / kept.FOLDER).exists()


def _kept(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == kept.FOLDER]


def test_a_run_that_was_stopped_goes_on(
    measured: moetailor.Calibration, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moetailor")
    seen: list[int] = []
    inner, limit = mix_bits.held_out_errors, 6
    monkeypatch.setattr(mix_bits, "at_once", lambda layer: 3)

    def measure(layer: Any, experts: Sequence[int], *given: Any, **named: Any) -> torch.Tensor:
        if len(seen) >= limit:
            raise KeyboardInterrupt
        seen.extend(experts)
        return inner(layer, experts, *given, **named)

    monkeypatch.setattr(mix_bits, "held_out_errors", measure)
    with pytest.raises(KeyboardInterrupt):
        planned(measured)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert not caplog.messages
    limit = 1000
    told: list[int] = []
    found = planned(measured, progress=lambda done, _: told.append(done))
    total = sum(stack.num_experts for stack in measured.model.stacks)
    # What was there is told with the first that was not: the time left is that of what is measured now.
    assert told[:2] == [8, 11]
    assert caplog.messages == [f"resumes: 6 of {total} experts are there"]
    # Nothing is left to go on with.
    assert planned(measured, remove="30%") != found
    assert len(caplog.messages) == 1
    assert seen == [expert for stack in measured.model.stacks for expert in range(stack.num_experts)]
    shutil.rmtree(measured.folder / kept.FOLDER)
    assert planned(measured) == found


def test_what_is_damaged_or_of_another_calibration_is_refused(measured: moetailor.Calibration, tmp_path: Path) -> None:
    planned(measured)
    file = min((measured.folder / kept.FOLDER).iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(
        moetailor.CalibrationError, match=r"damaged, or of another calibration; delete it, and it is mea"
    ):
        planned(measured)
    file.write_bytes(whole[:40])
    with pytest.raises(moetailor.CalibrationError, match=r"cannot be read .*; delete it, and it is measured again"):
        planned(measured)
    # The file of the next layer under the name of this one
    file.write_bytes(max((measured.folder / kept.FOLDER).iterdir()).read_bytes())
    with pytest.raises(moetailor.CalibrationError, match="of another calibration"):
        planned(measured)


def test_a_folder_that_cannot_be_written_will_do(measured: moetailor.Calibration) -> None:
    (measured.folder / kept.FOLDER).write_text("no folder")
    with pytest.warns(moetailor.MoetailorWarning, match=r"measured: cannot be written \(File exists\), so what"):
        found = planned(measured)
    (measured.folder / kept.FOLDER).unlink()
    assert planned(measured) == found


def test_a_full_disk_stops_a_plan_that_could_not_be_written_either(
    measured: moetailor.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, _: object) -> None:
        raise UnwritableError(file, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(kept, "write_tensors", full)
    with pytest.raises(UnwritableError, match=r"No space left on device.*; make room and run the same command again"):
        planned(measured)


def test_what_two_runs_measure_is_kept_together(measured: moetailor.Calibration) -> None:
    ours, theirs = (kept.Kept(measured, measured.layers[0]) for _ in range(2))
    none = torch.full((4, 2), torch.nan, dtype=torch.float64)
    first, second = none.clone(), none.clone()
    first[:2], second[1:3] = 1.0, 2.0
    ours.write({}, first)
    together = theirs.write({}, second)
    assert together[:3].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert bool(together[3].isnan().all())
    torch.testing.assert_close(ours.read({}), together, rtol=0, atol=0, equal_nan=True)


def test_a_run_waits_while_another_one_writes(measured: moetailor.Calibration) -> None:
    def hold() -> None:
        with claimed(file):
            held.set()
            time.sleep(0.3)
            let_go.value = time.monotonic()

    rows, held, let_go = torch.ones(4, 2, dtype=torch.float64), multiprocessing.Event(), multiprocessing.Value("d")
    here = kept.Kept(measured, measured.layers[0])
    here.write({}, rows)
    (file,) = (measured.folder / kept.FOLDER).iterdir()
    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    assert held.wait(10)
    here.write({}, 2 * rows)
    assert 0 < let_go.value < time.monotonic()
    other.join()
    assert torch.equal(here.read({}), 2 * rows)


def test_a_process_of_several_tells_of_all(measured: moetailor.Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did of its part, as much of all: else the time left would be twice as long, and end at a half."""
    monkeypatch.setattr(ranks, "_count", 2)
    monkeypatch.setattr(ranks, "each", lambda items, work: map(work, items))
    total = sum(stack.num_experts for stack in measured.model.stacks)
    told: list[tuple[int, int]] = []
    planned(measured, "linear", progress=lambda done, every: told.append((done, every)))
    assert told[:2] == [(2, total), (4, total)]
    assert told[-1] == (total, total)


def test_progress_goes_by_experts(measured: moetailor.Calibration) -> None:
    total = sum(stack.num_experts for stack in measured.model.stacks)
    for kept_before in (False, True):
        told: list[tuple[int, int]] = []
        planned(measured, progress=lambda done, every, told=told: told.append((done, every)))
        assert told[-1] == (total, total)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert (0 < told[0][0] < total) != kept_before
