"""benchmarks/kill.py, a few kills of each verb; the benchmark itself does more."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """Return the benchmark as a module and a place where its verbs can run."""
    sys.path.insert(0, str(BENCHMARKS))
    import kill

    place = kill.Bench(kill.REFERENCE, tmp_path_factory.mktemp("kills"))
    place.make()
    yield kill, place
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(13))
def test_a_killed_verb_run_again_ends_as_if_nobody_had_stopped_it(bench, number: int) -> None:
    kill, place = bench
    assert kill.torture(place, kill.VERBS[number], 4, seed=0) == []


@pytest.mark.slow
def test_every_verb_that_writes_is_killed(bench) -> None:
    from moetailor_cli.app import VERBS

    kill, _ = bench
    assert len(kill.VERBS) == 13
    killed = {verb.words[0] for verb in kill.VERBS}
    assert killed == {verb.__name__ for verb in VERBS} - {"inspect", "methods", "show", "diff"}
