"""Logs beside artifacts: the command, what was said, and which stages began."""

import json
import re
import shlex
from pathlib import Path

import pytest

from moetailor.errors import UnwritableError
from moetailor_cli import log
from support.reference import REFERENCE, TEXT

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)")


def said(file: Path) -> list[str]:
    """Return the lines of a log without their times."""
    return [match[1] for line in file.read_text().splitlines() if (match := LINE.fullmatch(line))]


def test_what_is_made_has_its_log_beside_it(run, tmp_path: Path) -> None:
    calib, file, out = tmp_path / "calib of it", tmp_path / "plan.json", tmp_path / "out"
    code, _, err = run("calibrate", REFERENCE, "-o", calib, *TEXT)
    assert code == 0
    command, versions, *lines = said(tmp_path / "calib of it.log")
    assert command == f"$ moetailor calibrate {REFERENCE} -o '{calib}' {shlex.join(map(str, TEXT))}"
    assert versions.startswith("moetailor ")
    assert lines[0] == "calibrate"
    assert [line for line in lines if line in err.splitlines()] == err.splitlines()
    assert run("plan", calib, "-o", file, "-m", "mone", "--remove", "25%", "--quiet")[::2] == (0, "")
    assert "the plan is in" in said(tmp_path / "plan.json.log")[-1]
    assert run("apply", REFERENCE, file, "-o", out, "--calibration", calib)[0] == 0
    assert [line for line in said(tmp_path / "out.log") if line in ("fit", "write", "verify")] == [
        "fit",
        "write",
        "verify",
    ]
    assert "mone" not in (tmp_path / "calib of it.log").read_text().partition("next: ")[0]


def test_a_second_run_is_written_behind_the_first(run, tmp_path: Path) -> None:
    calib = tmp_path / "calib"
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT)[0] == 0
    first = (tmp_path / "calib.log").read_text()
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT, "--sensitivity")[0] == 0
    assert (tmp_path / "calib.log").read_text().startswith(first + "\n")
    assert "sensitivity" in said(tmp_path / "calib.log")


def test_what_makes_nothing_leaves_no_log(run, tmp_path: Path) -> None:
    where = ("calibrate", REFERENCE, "-o", tmp_path / "calib", *TEXT)
    assert run(*where, "--dry-run")[0] == 0
    assert run(*where, "--length", "1000000")[0] == 1
    assert run("inspect", REFERENCE)[0] == 0
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_log_stays_and_a_log_that_cannot_be_written_is_no_fault(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calib, other = tmp_path / "calib", tmp_path / "calib.log"
    other.write_text("what the shell sent here\n")
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT)[0] == 0
    assert other.read_text() == "what the shell sent here\n"

    def full(artifact: Path) -> None:
        raise UnwritableError(artifact, OSError(28, "No space left on device"))

    monkeypatch.setattr(log, "keep", full)
    code, _, err = run("plan", calib, "-o", tmp_path / "plan.json", "-m", "mone", "--remove", "25%")
    assert code == 0
    assert "no log was kept: " in err
    assert (tmp_path / "plan.json").is_file()


def test_scores_keep_their_settings_and_a_log(run, tmp_path: Path) -> None:
    calib, out, file = tmp_path / "calib", tmp_path / "out", tmp_path / "scores.json"
    made = ("compress", REFERENCE, "-m", "reap", "--remove", "25%", "-o", out, "--calibration", calib, *TEXT)
    assert run(*made)[0] == 0
    text = ("--data", TEXT[1], "--sequences", "2", "--length", "16")
    code, _, err = run("evaluate", out, "--against", REFERENCE, *text, "--json", file)
    assert code == 0, err
    assert json.loads(file.read_text())["settings"]["length"] == 16
    assert [line for line in said(tmp_path / "scores.json.log") if line in ("original", "compressed")] == [
        "original",
        "compressed",
    ]
