"""Work shared out between processes gives what one of them gives alone, byte for byte."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import moetailor
from moetailor import ranks
from moetailor.calibration import kept
from moetailor_cli import output
from support.reference import REFERENCE
from support.tiny import load

GetCalibration = Callable[[str], moetailor.Calibration]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]
# The command, in which one process dies when it comes to a function for the second time.
DYING = """
import os
import {module}
from moetailor_cli.app import main

real, calls = {module}.{function}, []

def dying(*arguments):
    calls.append(arguments)
    if int(os.environ["RANK"]) == {rank} and len(calls) == 2:
        os._exit(9)
    return real(*arguments)

{module}.{function} = dying
main()
"""
# Four batches, of two sizes: in another order their sums are others in the last bits.
TEXT = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=7, length=32, batch_size=2)
CALIBRATE = ["calibrate", REFERENCE, "--data", TEXT.data[0], "--sequences", 7, "--length", 32, "--batch-size", 2]


def torchrun(processes: int, *words: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    verb = [sys.executable, "-c", code] if code else MOETAILOR
    command = [*TORCHRUN, f"--nproc-per-node={processes}", *verb, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def dying(module: str, function: str, rank: int) -> str:
    return DYING.format(module=f"moetailor.{module}", function=function, rank=rank)


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds but the times, and the settings that the command line writes behind the rest."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for name in ("calibration.json", "moetailor_provenance.json"):
        if name in found:
            found[name] = re.sub(rb',\n  "settings": \{.*\n  \}\n\}\n$', b"\n}\n", found[name], flags=re.DOTALL)
    return found


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


@pytest.mark.parametrize(
    ("processes", "how"),
    [
        (2, {"residual": True, "sensitivity": True}),
        pytest.param(2, {"stream": True, "sensitivity": True}, marks=pytest.mark.slow),
        pytest.param(4, {"states": "disk", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_processes_make_the_calibration_of_one(processes: int, how: dict[str, Any], tmp_path: Path) -> None:
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in how.items()]
    ran = torchrun(processes, *CALIBRATE, "-o", tmp_path / "shared", *options)
    assert ran.returncode == 0, ran.stderr
    assert (ran.stdout + ran.stderr).count("tokens through 4 MoE layers") == 1  # one of them speaks
    alone = moetailor.calibrate(REFERENCE, tmp_path / "alone", text=TEXT, **how)
    assert contents(tmp_path / "shared") == contents(alone.folder)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "stream"), [(0, False), (1, True)])
def test_a_calibration_whose_process_died_goes_on(rank: int, stream: bool, tmp_path: Path) -> None:
    """With another number of processes than it began with; the first layer is not measured again."""
    options = ["--stream"] if stream else []
    out, code = tmp_path / "stopped", dying("calibration.run", "check_weights", rank)
    assert torchrun(3, *CALIBRATE, "-o", out, *options, code=code).returncode != 0
    began = (out / "layer-0000.safetensors").stat().st_mtime_ns
    assert not (out / "layer-0001.safetensors").exists()
    assert torchrun(2, *CALIBRATE, "-o", out, *options).returncode == 0
    assert (out / "layer-0000.safetensors").stat().st_mtime_ns == began
    assert contents(out) == contents(moetailor.calibrate(REFERENCE, tmp_path / "whole", text=TEXT).folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the reference model in several shards."""
    folder = tmp_path_factory.mktemp("sharded") / "original"
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("model.safetensors", "*.jsonl"))
    load(REFERENCE).save_pretrained(folder, max_shard_size="5MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def measured(sharded: Path) -> moetailor.Calibration:
    return moetailor.calibrate(sharded, sharded.with_name("calibration"), text=TEXT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mone", {}),
        pytest.param("mergemoe", {}, marks=pytest.mark.slow),
        pytest.param("mone", {"propagate": "compressed"}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_the_result_of_one(
    method: str, options: dict[str, Any], measured: moetailor.Calibration, sharded: Path, tmp_path: Path
) -> None:
    plan = moetailor.make_plan(measured, method, moetailor.Budget.parse(remove="50%"))
    plan.save(tmp_path / "plan.json")
    words = ["apply", sharded, tmp_path / "plan.json", "-o", tmp_path / "two", "--calibration", measured.folder]
    ran = torchrun(2, *words, *(f"--{name}={value}" for name, value in options.items()))
    assert ran.returncode == 0, ran.stderr
    assert (ran.stdout + ran.stderr).count("the original has") == 1
    alone = moetailor.apply(plan, sharded, tmp_path / "one", calibration=measured, **options)
    assert contents(tmp_path / "two") == contents(alone)
    assert sorted(os.listdir(tmp_path)) == ["one", "plan.json", "two", "two.log"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "module", "function"), [(0, "checkpoint.writer", "_copy"), (1, "transform.disk", "save_tensors")]
)
def test_of_a_result_whose_process_died_nothing_stays(
    rank: int, module: str, function: str, measured: moetailor.Calibration, sharded: Path, tmp_path: Path
) -> None:
    plan = moetailor.make_plan(measured, "mone", moetailor.Budget.parse(remove="50%"))
    plan.save(tmp_path / "plan.json")
    before = contents(sharded)
    words = ["apply", sharded, tmp_path / "plan.json", "-o", tmp_path / "out", "--calibration", measured.folder]
    assert torchrun(2, *words, code=dying(module, function, rank)).returncode != 0
    assert not (tmp_path / "out").exists()
    alone = moetailor.apply(plan, sharded, tmp_path / "out", calibration=measured)
    assert contents(alone) == contents(moetailor.apply(plan, sharded, tmp_path / "one", calibration=measured))
    assert contents(sharded) == before
    assert sorted(os.listdir(tmp_path)) == ["one", "out", "plan.json"]


@pytest.mark.slow
def test_two_processes_compress_as_one_does(tmp_path: Path) -> None:
    words = ["compress", *CALIBRATE[1:], "--method", "mone", "--remove", "50%", "-o"]
    assert torchrun(2, *words, tmp_path / "two").returncode == 0
    subprocess.run([*MOETAILOR, *map(str, words), tmp_path / "one"], check=True)
    for name in ("", ".calibration"):
        assert contents(tmp_path / f"two{name}") == contents(tmp_path / f"one{name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (
            "OMP_NUM_THREADS=$((1 + RANK)) moetailor plan {calib} -o {out} --method mone --remove 50%",
            "threads: 1 and 2; start all alike",
        ),
        ("moetailor {calibrate} -o {out}$RANK", "folder: {out}0 and {out}1; start all alike"),
        ("moetailor {calibrate} -o {out} --sequences $((7 + RANK))", "text: "),
        ("moetailor plan {calib} -o {out} --method mone --remove $((50 - 25 * RANK))%", "budget: "),
        ("moetailor plan {calib} -o {out} --method auto --remove 50% --protect 0:$RANK", "protected experts: "),
    ],
)
def test_processes_that_differ_are_refused(
    command: str, told: str, calibration: GetCalibration, tmp_path: Path
) -> None:
    folder = copied(calibration, tmp_path / "c")
    out = tmp_path / "out"
    given = {"out": out, "calib": folder, "calibrate": " ".join(map(str, CALIBRATE))}
    moetailor = " ".join(f"'{word}'" for word in MOETAILOR)
    run = [*TORCHRUN, "--nproc-per-node=2", "bash", "-c", command.format(**given).replace("moetailor", moetailor)]
    ran = subprocess.run(run, check=False, capture_output=True, text=True)
    assert ran.returncode != 0
    assert f"processes differ in their {told.format(**given)}" in ran.stderr
    assert not out.exists()


def test_one_process_shares_nothing() -> None:
    with ranks.shared(folder="c") as first:
        assert first
        assert list(ranks.each([1, 2, 3], lambda item: item * item)) == [1, 4, 9]


@pytest.mark.parametrize("count", ["", "1"])
def test_one_process_is_alone_whatever_its_rank_is_said_to_be(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("RANK", "1")
    assert output.speaks()
    with ranks.shared() as first:
        assert first


def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(moetailor.MoetailorError, match="WORLD_SIZE=two: is no number of processes; start them with"):
        with ranks.shared():
            pass


def test_a_process_does_not_wait_for_ever_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))
    with pytest.raises(moetailor.MoetailorError, match=r"speaks of several processes .*; start them with torchrun"):
        with ranks.shared():
            pass


def test_an_environment_of_processes_that_nobody_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(moetailor.MoetailorError, match=r"speaks of several processes .*; start them with torchrun"):
        with ranks.shared():
            pass
