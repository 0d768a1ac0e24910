"""Comparisons that stream: cells against those in memory, one layer open at a time, what lies on the disk meanwhile."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetailor
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.lock import growing
from moetailor.checkpoint.original import Original, looked_at
from moetailor.checkpoint.rates import Rates
from moetailor.comparison.bench import Bench
from moetailor.comparison.cells import Cell, cells_of
from moetailor.comparison.streamed import StreamedBench
from moetailor.comparison.whole import WholeBench
from moetailor.estimates.estimate import Host
from moetailor.estimates.together import of_comparison
from moetailor.evaluation.fidelity import Reference
from support.reference import REFERENCE
from support.tiny import token_batches

GetCalibration = Callable[[str], moetailor.Calibration]
CPU = {"device": "cpu", "dtype": torch.float32}
TEXT = ["--data", REFERENCE / "calibration.jsonl", "--sequences", "4", "--length", "64"]
WORDS = ["--held-out", REFERENCE / "heldout.jsonl", "--held-out-sequences", "2", "--methods", "mone,reap@4"]
UNKNOWN = {"expected": None, "measured": None}


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return how many decoder layers had weights at once, of all models that are streamed."""
    models: list[StreamedModel] = []
    found = [0]
    make, load = StreamedModel.__init__, StreamedModel.load

    def made(self: StreamedModel, *given: object, **options: object) -> None:
        make(self, *given, **options)  # type: ignore[arg-type]
        models.append(self)

    def loaded(self: StreamedModel, path: str) -> None:
        load(self, path)
        layers = [layer for one in models for layer in one.model.get_decoder().layers]
        found[0] = max(found[0], sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))

    monkeypatch.setattr(StreamedModel, "__init__", made)
    monkeypatch.setattr(StreamedModel, "load", loaded)
    return lambda: found[0]


def no_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Have a comparison find so many bytes free before it begins."""
    usage = type("Usage", (), {"free": free})()
    monkeypatch.setattr(
        "moetailor.comparison.streamed.shutil", type("", (), {"disk_usage": lambda _: usage, "rmtree": shutil.rmtree})
    )


def measured(kind: type[Bench], calibration: moetailor.Calibration, cells: list[Cell], place: Path) -> list[dict]:
    place.mkdir()
    original = Original(calibration.model.source)
    bench = kind(original, calibration, token_batches(3)[1:], place, place, **CPU)
    return [bench.measure(cell) for cell in cells]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_cells_are_those_in_memory(
    family: str,
    calibration: GetCalibration,
    tmp_path: Path,
    most: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stand-ins, few bits on top of a method, and widths that auto chose."""
    made = calibration(family)
    cells = cells_of(["mone", "reap@4", "auto"], remove=["50%"])
    whole = measured(WholeBench, made, cells, tmp_path / "whole")
    before = most()
    monkeypatch.setattr(Original, "load", lambda *_, **__: pytest.fail("loaded a model"))
    streamed = measured(StreamedBench, made, cells, tmp_path / "streamed")
    assert (before, most()) == (1, 1)
    assert set("".join(layer["slots"] for layer in whole[2]["layers"].values())) & set("2345678")
    for one, other in zip(whole, streamed, strict=True):
        for name in ("kl", "top1_agreement"):
            assert other["fidelity"][""][name] == pytest.approx(one["fidelity"][""][name], rel=1e-4)
        assert one["fidelity"][""]["kl"]["mean"] > 0
        assert (other["speed"], other["resident"]) == (None, None)
        assert other["layers"] == {index: layer | UNKNOWN for index, layer in one["layers"].items()}
        same = ("name", "method", "parameters", "bits", "budget", "nbytes", "native", "error")
        assert [other[name] for name in same] == [one[name] for name in same]
    plan = moetailor.make_plan(made, "auto", moetailor.Budget.parse(remove="50%"))
    assert [cell["expected_kl"] for cell in streamed] == [None, None, plan.expected]
    assert {path.name for path in (tmp_path / "streamed").iterdir()} == {"original.json", "reference"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int]]]:
    """Return the folder of a streamed comparison, and the bytes of each result and of all scratch when it had run."""
    out, scratch = tmp_path_factory.mktemp("streamed") / "out", tmp_path_factory.mktemp("scratch")
    beside, compare = [], Reference.compare

    def sizes(self: Reference, *given: Any) -> dict:
        found = compare(self, *given)
        (place,) = scratch.iterdir()
        parts = (place / "result", place)
        beside.append(tuple(sum(f.stat().st_size for f in part.rglob("*") if f.is_file()) for part in parts))
        return found

    texts = {
        name: moetailor.TextOptions(data=(str(REFERENCE / f"{file}.jsonl"),), sequences=count, length=64)
        for name, file, count in (("text", "calibration", 4), ("held_out", "heldout", 2))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "compare", sizes)
        patch.setattr(Original, "load", lambda *_, **__: pytest.fail("loaded a model"))
        asked: dict[str, Any] = texts | {"methods": ["mone", "reap@4"], "remove": ["25%", "95%"]}
        moetailor.compare(REFERENCE, out, stream=True, scratch=scratch, **asked)
    assert list(scratch.iterdir()) == []
    return out, beside


def test_what_was_not_measured_is_said(done: tuple[Path, list], run, monkeypatch: pytest.MonkeyPatch) -> None:
    out, beside = done
    names = {path.name for path in out.iterdir()}
    assert names == {"calibration", "cells", "comparison.json", "original.json", "report.html", "results.json"}
    results = json.loads((out / "results.json").read_text())
    cells = [(cell["name"], cell["budget"]) for cell in results["cells"] if cell["error"] is None]
    assert sorted(cells) == [("mone", "remove 25%"), ("mone", "remove 95%"), ("reap + 4 bits", "remove 25%")]
    assert len(beside) == len(cells)
    perplexity = results["original"]["perplexity"]
    speeds = dict.fromkeys(("prefill", "decode", "prefill_low", "decode_low", "resident"))
    assert results["original"] == {"perplexity": perplexity} | speeds
    page = (out / "report.html").read_text()
    for said in (
        "bytes in memory, prefill and decode were not measured, as models were streamed",
        "Errors of layers were not measured, as models were streamed",
        "No KL was expected: no method said one",
        "cpu, streamed, ",
    ):
        assert said in " ".join(page.split()), said
    assert run("report", out)[0] == 0
    assert (out / "report.html").read_text() == page
    # Nothing is measured again, and no room needed; cells in memory are of another comparison.
    no_room(monkeypatch, 0)
    words = ["compare", REFERENCE, "-o", out, *TEXT, "--batch-size", "4", *WORDS, "--remove", "25%,95%"]
    code, shown, err = run(*words, "--stream")
    assert code == 0, err
    assert max(map(len, shown.splitlines())) <= 80
    assert "reap + 4 bits (95% removed): model.layers.0: plan leaves 2 slots" in shown
    assert len(beside) == len(cells)
    code, _, err = run(*words)
    assert code == 1
    assert "holds a comparison with another way of running; choose another folder or delete it" in err


def test_what_lies_on_the_disk_meanwhile_is_foretold(done: tuple[Path, list[tuple[int, int]]]) -> None:
    out, beside = done
    rates = Rates(products=1e9, elements=1e9, step=1e-6, reading=None)
    host = Host(device="cpu", startup=5, rates=rates, resident=10**9)
    given: dict[str, Any] = {"held_out": moetailor.TextOptions(data=(), sequences=2, length=64), "text": None}
    given |= {"calibration": moetailor.Calibration.open(out / "calibration"), "sample": moetailor.SampleOptions()}
    cells, states = cells_of(["mone"], remove=["25%"]), 2 * 64 * 192 * 4
    with looked_at(REFERENCE) as original:
        found = of_comparison(host, original, cells, stream=True, **given)
        whole = of_comparison(host, original, cells, **given)
    assert (found.writes, whole.meanwhile) == (whole.writes, states)
    result, place = max(beside)
    assert found.meanwhile == pytest.approx(place, rel=0.05)
    assert found.meanwhile == pytest.approx(result + 3 * states, rel=0.01)
    assert found.memory < whole.memory


def test_a_result_is_deleted_whatever_happens(
    calibration: GetCalibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, (cell,) = tmp_path / "place", cells_of(["mone"], remove=["50%"])
    seen = []

    def stopped(self: Reference, *_: object) -> dict:
        seen.append((place / "result" / "config.json").is_file())
        raise KeyboardInterrupt

    monkeypatch.setattr(Reference, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured(StreamedBench, calibration("olmoe"), [cell], place)
    assert seen == [True]
    assert {path.name for path in place.iterdir()} == {"original.json", "reference"}


def test_what_a_killed_run_left_is_deleted(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["compare", REFERENCE, "-o", out, *TEXT, *WORDS, "--remove", "25%", "--stream"]
    assert run(*words)[0] == 0
    before = {path for path in out.rglob("*")}
    for more, left in (([], ["result", "unfinished"]), (["--scratch", tmp_path / "scratch"], ["result", "reference"])):
        with growing(out) as work:
            for name in left:
                (work / name).mkdir()
                (work / name / "model.safetensors").write_bytes(b"left")
        next((out / "cells").glob("mone*")).unlink()
        code, _, err = run(*words, *more)
        assert code == 0, err
        assert [cell["error"] for cell in json.loads((out / "results.json").read_text())["cells"]] == [None, None]
        assert {path for path in out.rglob("*")} == before


def test_no_room_is_said_before_anything_is_measured(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    words = ["compare", REFERENCE, "-o", out, *TEXT, *WORDS, "--remove", "25%", "--stream"]
    # mone with 24 of 32 experts: 18,536,832 - 4 x 8 x (3 x 192 x 96 - 192) x 2, and its constants once more in files of
    # their own; reap in 4 bits takes less.
    largest, states = 15_010_176 + 4 * 8 * 192 * 2, 3 * 2 * 64 * 192 * 4
    free = largest + states - 1
    no_room(monkeypatch, free)
    code, _, err = run(*words)
    assert code == 1
    assert f"writing the largest result takes {largest:,} bytes and hidden states {states:,}, {free:,} are free" in err
    assert "name a folder with more room with --scratch" in err
    assert not (out / "calibration").exists()
    # camera's experts of 48 neurons lie there three times while they are written: compressed, alone, and in the end.
    rest, experts = 18_536_832 - 4 * 32 * 3 * 192 * 96 * 2, 4 * 32 * 3 * 192 * 48 * 2
    code, _, err = run(*words[:-4], "camera", "--remove", "50%", "--stream")
    assert code == 1
    assert f"writing the largest result takes {2 * rest + 3 * experts:,} bytes" in err
