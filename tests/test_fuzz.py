"""A handful of the damaged artifacts of benchmarks/fuzz_artifacts.py, which runs as many as one likes."""

import contextlib
from pathlib import Path

import pytest

from fuzz_artifacts import judge, make_world, run_case


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        make_world(folder)
    return folder


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_artifact_is_refused_or_does_no_harm(seed: int, world: Path, tmp_path: Path) -> None:
    ended = run_case(world, seed, tmp_path)
    assert ended.good, ended


def test_the_judge(tmp_path: Path) -> None:
    """What each verdict rests on."""
    (tmp_path / "kept").write_text("a")
    (tmp_path / "new").write_text("a")
    before, plan = {"kept": b"a"}, ("plan",)

    def verdict(code: int | None, said: str = "", arguments: tuple = ("apply",), before: dict = before) -> str:
        return judge(code, said, arguments, before, tmp_path)

    assert verdict(0) == "harmless"
    assert verdict(1, "error: no", before=before | {"new": b"a"}) == "refused"
    assert verdict(None) == "hang"
    assert verdict(-9) == "crash by signal 9"
    assert verdict(99, "error: no") == "traceback"
    assert verdict(1, "error: no\nTraceback (most recent call last):") == "traceback"
    assert verdict(2) == "exit status 2"
    assert verdict(1, "no") == "silent"
    assert verdict(0, arguments=plan) == "changed new"
    assert verdict(0, before={"kept": b"b", "new": b"a"}) == "changed kept"
    assert verdict(1, "error: no") == "left new"
