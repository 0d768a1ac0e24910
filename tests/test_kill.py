"""benchmarks/kill.py, a few kills of each verb; the benchmark itself does more."""

import subprocess
import sys
from pathlib import Path

import pytest

from kill import VERBS
from moetailor_cli import app

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_killed_verbs_run_again_end_as_if_nobody_had_stopped_them() -> None:
    """In a process of its own, which has no threads yet: its children could not go on with those."""
    command = [sys.executable, str(BENCHMARKS / "kill.py"), "--kills", "4"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert ran.stdout.endswith("60 kills, all well\n")


def test_every_verb_that_writes_is_killed() -> None:
    assert {verb.words[0] for verb in VERBS} == {verb.__name__ for verb in app.VERBS} - {
        "inspect",
        "methods",
        "show",
        "diff",
        "serve",
        "lm_eval",  # what it writes is the harness's
    }
