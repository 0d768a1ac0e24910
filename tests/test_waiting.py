"""What is seen while a verb runs where there is no terminal: plain lines, and what a stopped run left."""

import itertools
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moetailor
from moetailor.calibration import run as calibration_run
from moetailor_cli import output
from moetailor_cli.waiting import Lines
from support.reference import REFERENCE, TEXT


def test_a_line_every_half_minute_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """A step takes 10 seconds; the rate is that of what this run did itself, here from 100 of 160 on."""
    now = itertools.count(0, 10)
    lines = Lines(lambda: float(next(now)))
    for done in range(100, 111):
        lines.tell("calibrate", done, 160)
    lines.tell("plan", 1, 2)
    shown = capsys.readouterr()
    # At 30, 60 and 90 s: 2, 5 and 8 steps after the first one.
    assert shown.err.splitlines() == [
        "calibrate: 102 of 160, 64%, 10 min left",
        "calibrate: 105 of 160, 66%, 9 min left",
        "calibrate: 108 of 160, 68%, 9 min left",
        "plan: 1 of 2, 50%",
    ]
    assert shown.out == ""


def test_lines_are_left_out_where_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    now = itertools.count(0, 40)
    output.set_quiet(True)
    Lines(lambda: float(next(now))).tell("plan", 1, 2)
    output.set_quiet(False)
    assert capsys.readouterr().err == ""


def test_without_a_terminal_nothing_steers_one(run, tmp_path: Path) -> None:
    """And in one there are bars."""
    words = ["calibrate", str(REFERENCE), *TEXT, "-o"]
    code, shown, err = run(*words, tmp_path / "calib")
    assert code == 0, err
    assert re.search("[\x1b\r]", shown + err) is None
    told = f"import sys; sys.argv = ['moetailor', *{[*words, str(tmp_path / 'other')]}]"
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", f"{told}\nfrom moetailor_cli.app import main; main()"]
    subprocess.run(command, stderr=follower, env=os.environ | {"TERM": "xterm"}, check=True)
    os.close(follower)
    assert b"\x1b[" in os.read(leader, 2**20)
    os.close(leader)


def test_a_run_that_goes_on_says_so(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["calibrate", REFERENCE, "-o", tmp_path / "calib", *TEXT]
    noted, made = calibration_run.note, []

    def stopped(*given: object) -> None:
        noted(*given)
        made.append(given)
        if len(made) == 3:  # the fingerprint, and two layers
            raise moetailor.CalibrationError("stopped here")

    monkeypatch.setattr(calibration_run, "note", stopped)
    code, _, err = run(*words)
    assert (code, "resumes" in err) == (1, False)
    monkeypatch.undo()
    code, _, err = run(*words)
    assert code == 0, err
    assert "resumes: 2 of 4 layers are there" in err
    assert "resumes" not in run(*words)[2]  # nothing is left to do


def test_from_python_it_is_a_note_of_the_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    from moetailor.progress import resumed

    noted: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: noted.append(record.getMessage()))
    logger = logging.getLogger("moetailor")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    resumed(0, 4, "layers")
    resumed(1234, 2000, "rows")
    logger.setLevel(before)
    logger.removeHandler(handler)
    assert noted == ["resumes: 1,234 of 2,000 rows are there"]
