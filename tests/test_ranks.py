"""Work shared out between processes gives the plan of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moetailor
from moetailor import ranks
from moetailor.calibration import kept

GetCalibration = Callable[[str], moetailor.Calibration]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]


def copied(calibration: GetCalibration, to: Path) -> Path:
    shutil.copytree(calibration("olmoe").folder, to, ignore=shutil.ignore_patterns(kept.FOLDER))
    return to


@pytest.mark.parametrize("method", ["auto", pytest.param("mone", marks=pytest.mark.slow)])
def test_two_processes_make_the_plan_of_one(method: str, calibration: GetCalibration, tmp_path: Path) -> None:
    folder = copied(calibration, tmp_path / "two")
    given = ["--method", method, "--remove", "60%", "--device", "cpu"]
    command = [*TORCHRUN, "--nproc-per-node=2", *MOETAILOR, "plan", str(folder), "-o", str(tmp_path / "two.json")]
    ran = subprocess.run([*command, *given], check=True, capture_output=True, text=True)
    assert ran.stdout.count("two.json") + ran.stderr.count("the plan is in") == 1  # one of them speaks
    measured = moetailor.Calibration.open(copied(calibration, tmp_path / "one"))
    alone = moetailor.make_plan(measured, method, moetailor.Budget.parse(remove="60%"), device="cpu")
    assert moetailor.Plan.load(tmp_path / "two.json") == alone
    if method == "auto":
        names = [sorted(os.listdir(tmp_path / name / kept.FOLDER)) for name in ("one", "two")]
        assert names[0] == names[1]
        assert len(names[0]) == len(measured.layers)


@pytest.mark.slow
def test_processes_that_differ_are_refused(calibration: GetCalibration, tmp_path: Path) -> None:
    folder = copied(calibration, tmp_path / "c")
    out = tmp_path / "plan.json"
    threads = "OMP_NUM_THREADS=$((1 + RANK)) exec " + " ".join(f"'{word}'" for word in MOETAILOR)
    command = f"{threads} plan {folder} -o {out} --method mone --remove 50%"
    run = [*TORCHRUN, "--nproc-per-node=2", "bash", "-c", command]
    ran = subprocess.run(run, check=False, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "processes differ in their threads: 1 and 2; start all alike" in ran.stderr
    assert not out.exists()


def test_one_process_shares_nothing() -> None:
    with ranks.shared(threads=1) as first:
        assert first
        assert list(ranks.each([1, 2, 3], lambda item: item * item)) == [1, 4, 9]


def test_an_environment_of_processes_that_nobody_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(moetailor.MoetailorError, match=r"speaks of several processes .*; start them with torchrun"):
        with ranks.shared():
            pass
