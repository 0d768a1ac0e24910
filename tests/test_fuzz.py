"""A few of the damaged checkpoints of benchmarks/fuzz_checkpoints.py, always the same ones."""

import importlib.util
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "fuzz_checkpoints.py"


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_checkpoints_are_refused_or_give_right_results(fuzzer: ModuleType, tmp_path: Path) -> None:
    found = {told: outcome for _, told, outcome in fuzzer.fuzz(0, range(20), fuzzer.make_bases(tmp_path))}
    assert {told: outcome for told, outcome in found.items() if fuzzer.bad(outcome)} == {}
    # Some get to the end, and some do not.
    ends = [outcome[-1][:2] for outcome in found.values()]
    assert ("apply", "ok") in ends
    assert ("calibrate", "refused") in ends


def raises() -> None:
    raise ValueError("oh")


def lasts() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "came"),
    [
        (lambda: iter([("apply", "ok", "")]), "ok"),
        (lambda: raises() or iter(()), "traceback"),
        (lambda: lasts() or iter(()), "hang"),
        (lambda: iter([("apply", "ok", str(len(bytearray(2**33))))]), "traceback"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL) or iter(()), "crash"),
    ],
    ids=["fine", "raises", "lasts", "eats memory", "dies"],
)
def test_the_fuzzer_sees_how_a_case_ends(
    fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch, work: object, came: str
) -> None:
    monkeypatch.setattr(fuzzer, "SECONDS", 2)
    outcome = fuzzer.forked(work)
    assert outcome[-1][1] == came
    assert fuzzer.bad(outcome) == (came != "ok")
