"""What dry runs foretell: FLOPs against those that torch counts, bytes against files, and nothing read or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import moetailor
from moetailor.answers import Constant, Drop, Fitted, LowRank, Narrow, Width
from moetailor.checkpoint.devices import give_back
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.original import looked_at
from moetailor.checkpoint.place import check_file
from moetailor.checkpoint.rates import Rates, peak_nbytes, resident_now
from moetailor.estimates.compiling import kinds_of
from moetailor.estimates.deciding import Sampled
from moetailor.estimates.estimate import Estimate, Host, duration, in_turn
from moetailor.estimates.running import of_calibration, run_of
from moetailor.estimates.sizes import cost_of
from moetailor.fitting import linear_maps
from moetailor.fitting.noise import held_out_errors
from moetailor.fitting.reduced_rank import Moments, Regression
from moetailor.fitting.widths import quantized
from moetailor.fitting.work import (
    of_held_out_maps,
    of_low_rank,
    of_map,
    of_noise,
    of_refitted,
    of_regression,
    of_width,
)
from moetailor.methods import mix_plain
from moetailor.methods.estimate import estimate_plan
from moetailor.methods.refitted import fitted
from moetailor.methods.registry import METHODS
from moetailor.methods.run import view_of
from moetailor.methods.subsets import best_subset
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work
from moetailor.transform.formats import FORMATS
from support import hub
from support.reference import REFERENCE, TEXT

MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]
RATES = Rates(products=100.0, elements=10.0, step=0.5, reading=4.0)
HELD_OUT = ["--data", REFERENCE / "heldout.jsonl", "--sequences", "2", "--length", "64"]


def counted(run: Callable[[], object]) -> int:
    """Return the FLOPs of matrix products that torch counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def most_taken(run: Callable[[], object]) -> int:
    """Return the bytes of memory that torch takes at most beside those that it has."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    taken = [event for event in events if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(taken, key=lambda event: event.start_ns())))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> moetailor.Calibration:
    """Return a calibration of the reference model on 2,048 tokens."""
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=8, length=256)
    return moetailor.calibrate(REFERENCE, tmp_path_factory.mktemp("made") / "calib", text=text, sensitivity=True)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_forward_pass_is_counted_as_torch_counts_it() -> None:
    with looked_at(REFERENCE) as original:
        cost = cost_of(original)
        model = original.load(dtype=torch.float32, device="cpu")
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    ids = torch.arange(2 * 96).view(2, 96)
    foretold = cost.forward(192, 96) + cost.head(192)
    # Eager attention meets all keys, where half of them count.
    whole = 2 * 192 * 96 * cost.attended * len(cost.layers)
    assert foretold.products + whole == pytest.approx(counted(lambda: model(input_ids=ids)), rel=0.01)
    assert cost.numbers == sum(part.numel() for part in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("tokens", "width", "rank"), [(900, 256, 32), (100, 256, 32), (900, 640, 64), (200, 640, 16)])
def test_a_regression_is_counted_as_torch_counts_it(tokens: int, width: int, rank: int) -> None:
    x, y = torch.randn(2, tokens, width)
    found = counted(lambda: Regression(Moments.of(x, y, torch.ones(tokens))).solve(rank, 0.01))
    assert of_regression(width, tokens, rank).products == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("widths", ["8,4", "3", "vq2,vq1"])
def test_rounding_is_counted_as_torch_counts_it(widths: str, made: moetailor.Calibration) -> None:
    """On the experts of the reference model, whose tokens are not spread evenly."""
    layer = view_of(made, 0, moetailor.ExpertWeights(REFERENCE))
    chosen = [Width.parse(word) for word in widths.split(",")]
    size = LayerSize(experts=32, top_k=4, shape=layer.shape, sampled=len(layer.sample.key))
    found = counted(lambda: held_out_errors(layer, range(32), chosen, dtype=torch.bfloat16))
    assert (32 * of_noise(size, chosen)).products == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("neurons", [96, 48])
def test_fits_of_experts_that_stay_are_counted_as_torch_counts_them(neurons: int, made: moetailor.Calibration) -> None:
    """Which counts no factors and no inverses, of which there are few here."""
    layer = view_of(made, 0, moetailor.ExpertWeights(REFERENCE))
    stays = Fitted() if neurons == 96 else Narrow(neurons)
    plan = LayerPlan(slots=tuple(stays if slot % 2 else Drop() for slot in range(32)))
    size = LayerSize(experts=32, top_k=4, shape=layer.shape, sampled=len(layer.sample.key))
    found = counted(lambda: fitted(layer, plan, rounds=2))
    work = of_refitted(size, 16, neurons, 2)
    assert work.products + work.doubles == pytest.approx(found, rel=0.15)


def test_own_parts_over_a_base_are_counted_as_torch_counts_them(made: moetailor.Calibration) -> None:
    """Which counts no factors and no eigenvectors."""
    layer = view_of(made, 0, moetailor.ExpertWeights(REFERENCE))
    ranks, base = mix_plain.low_ranks(layer.shape), mix_plain.base_of(layer)
    slots = [Constant(), *(LowRank(0, rank) for rank in ranks)]
    found = counted(lambda: [mix_plain._errors(layer, expert, base, slots) for expert in range(32)])
    found -= counted(lambda: [linear_maps.held_out_errors(layer, expert, [0], mix_plain.RIDGE) for expert in range(32)])
    size = LayerSize(experts=32, top_k=4, shape=layer.shape, sampled=len(layer.sample.key))
    work = 32 * of_low_rank(size, ranks)
    assert work.products + work.doubles == pytest.approx(found, rel=0.15)


# What is computed with the experts of a layer, and how it is counted.
TAKES: dict[str, tuple[Callable[[LayerView], object], Callable[[LayerSize], Work]]] = {
    "maps": (
        lambda layer: [linear_maps.map_error(layer, expert, 8, 0.01) for expert in range(32)],
        lambda size: of_map(size, 8),
    ),
    "maps on held-out tokens": (
        lambda layer: [linear_maps.held_out_errors(layer, expert, [0, 8], 0.01) for expert in range(32)],
        lambda size: of_held_out_maps(size, 8),
    ),
    "widths": (
        lambda layer: held_out_errors(layer, range(32), WIDTHS, dtype=torch.bfloat16),
        lambda size: of_noise(size, WIDTHS),
    ),
    "codes": (
        lambda layer: [*quantized(layer, EACH, layer.experts.matrices, STORAGES, dtype=torch.bfloat16)],
        lambda size: of_width(size, WIDTHS[1]),
    ),
    "fits": (lambda layer: fitted(layer, HALF, rounds=1), lambda size: of_refitted(size, 16, 96, 1)),
    "own parts": (
        lambda layer: [
            mix_plain._errors(layer, expert, mix_plain.base_of(layer), [Constant(), LowRank(0, 8)])
            for expert in range(32)
        ],
        lambda size: of_low_rank(size, [8]) + of_held_out_maps(size, 8),
    ),
    "subsets": (
        lambda layer: best_subset(layer, 16, "refit", exhaustive=0, samples=100, swaps=1, tokens=1024, seed=0),
        lambda size: METHODS["refit"]().work(size),
    ),
}
WIDTHS = [Width.parse("8"), Width.parse("4")]
STORAGES = WIDTHS[1].storages(ExpertShape(width=192, intermediate=96))
EACH = [{expert: 1.0} for expert in range(32)]
HALF = LayerPlan(slots=tuple(Fitted() if slot % 2 else Drop() for slot in range(32)))


@pytest.mark.parametrize("name", TAKES)
def test_memory_is_counted_as_torch_counts_it(name: str, made: moetailor.Calibration) -> None:
    """On the experts of the reference model, of which one has fifty times as many tokens as another."""
    layer, (run, count) = view_of(made, 0, moetailor.ExpertWeights(REFERENCE)), TAKES[name]
    size = Sampled.of(made).size(made.model.stacks[0], made.model)
    assert max(size.counts) > 50 * min(size.counts)
    assert sum(size.counts) == 4 * size.sampled == 4 * len(layer.sample.key)
    layer.inputs(torch.arange(1))
    assert float(layer.sums.count.sum()) == 4 * size.sampled  # so all that the layer keeps is read
    assert count(size).nbytes == pytest.approx(most_taken(lambda: run(layer)), rel=0.2)


def test_counts_of_a_damaged_calibration_are_refused_or_taken_for_what_they_may_be(
    made: moetailor.Calibration, tmp_path: Path
) -> None:
    shutil.copytree(made.folder, tmp_path / "calib")
    file, layer = tmp_path / "calib" / "layer-0000.safetensors", made.layers[0]
    tensors, damaged = load_file(file), moetailor.Calibration.open(tmp_path / "calib")
    tensors["sample.index"][0] = torch.tensor([-7, 1, 2, 99], dtype=torch.int32)
    save_file(tensors, file)
    assert damaged.sampled_counts(layer).sum() == 4 * len(tensors["sample.key"])
    del tensors["sample.index"]
    save_file(tensors, file)
    with pytest.raises(moetailor.CalibrationError, match=r"lacks sample\.index; delete it"):
        damaged.sampled_counts(layer)


def test_what_a_calibration_writes_is_foretold(made: moetailor.Calibration) -> None:
    host = Host(device="cpu", startup=5, rates=RATES, resident=10**9)
    text = moetailor.TextOptions(data=(), sequences=8, length=256)
    with looked_at(REFERENCE) as original:
        found = of_calibration(host, original, text=text, sample=moetailor.SampleOptions(), sensitivity=True)
    assert found.writes == pytest.approx(size_of(made.folder), rel=0.02)
    assert found.device_memory is None
    # Where a device has memory of its own, the process needs no more than files pass through.
    apart = replace(host, device="meta")
    found = of_calibration(apart, original, text=text, sample=moetailor.SampleOptions(), sensitivity=True)
    assert found.device_memory is not None
    assert "on the device" in found.lines()[1]


def test_what_a_batch_and_files_hold_in_memory() -> None:
    text = moetailor.TextOptions(data=(), sequences=8, length=256, batch_size=2)
    with looked_at(REFERENCE) as original:
        run, short = (
            run_of(original, text, stream=False, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")
        )
        shape, top_k = original.facts.stacks[0].shape, original.facts.top_k
    assert shape is not None
    # A pair's inputs, outputs and gated outputs; gate, up, their product, and one between.
    assert run.outputs == 2 * 256 * top_k * (3 * shape.width + 4 * shape.intermediate) * 4
    # The file is in bfloat16: in float32 no weight is its own.
    assert not run.mapped
    assert short.mapped


def test_times_are_work_by_rates() -> None:
    host = Host(device="cpu", startup=3.0, rates=RATES, resident=7)
    # 3 + 70 / (0.7 x 100) + 70 / (0.35 x 100) + 60 / (0.3 x 100) + 20 / 10 + 4 x 0.5 + 8 / 4
    work = Work(products=70, doubles=70, spectra=60, elements=20, steps=4)
    assert host.seconds(work, moved=8) == pytest.approx(3 + 1 + 2 + 2 + 2 + 2 + 2)
    assert 2 * work + Work(steps=1) == Work(products=140, doubles=140, spectra=120, elements=40, steps=9)
    assert (2 * Work(nbytes=5) + Work(nbytes=3)).nbytes == 5
    assert host.memory(5) == {"memory": 12}
    # Two stages start once, and the larger memory counts: the second's beside the code that the first one read.
    first = Estimate(verb="a", seconds=5.0, memory=7, reads=1, writes=2, meanwhile=3)
    second = Estimate(verb="b", seconds=9.0, memory=4, reads=10, writes=20, meanwhile=1, notes=("n",))
    both = in_turn("c", [first, second], 3.0)
    expected = Estimate(verb="c", seconds=11.0, memory=4 + 30 * 10**6, reads=11, writes=22, meanwhile=3, notes=("n",))
    assert both == expected
    assert in_turn("c", [first] * 9, 3.0).memory == 7 + 3 * 30 * 10**6


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h"), (400000, "111 h")]
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_every_verb_foretells_and_writes_nothing(run, made: moetailor.Calibration, tmp_path: Path) -> None:
    calib, plan, small = tmp_path / "calib", tmp_path / "plan.json", tmp_path / "small"
    shutil.copytree(made.folder, calib)
    code, _, err = run("plan", calib, "-o", plan, "--method", "mone", "--remove", "25%")
    assert code == 0
    assert " written, " in err.splitlines()[-2]
    code, _, err = run("apply", REFERENCE, plan, "-o", small, "--calibration", calib)
    assert code == 0
    took = err.splitlines()[-2]
    assert took.startswith("took ")
    assert took.endswith(" of memory at most")
    before = {file: file.stat().st_mtime for file in tmp_path.rglob("*")}
    out = tmp_path / "out"
    compare = ["compare", REFERENCE, "-o", out, "--held-out", REFERENCE / "heldout.jsonl", "--methods", "mone,reap"]
    for words in (
        ["calibrate", REFERENCE, "-o", out, *TEXT, "--sensitivity"],
        ["calibrate", REFERENCE, "-o", out, *TEXT, "--stream", "--dtype", "bfloat16"],
        ["plan", calib, "-o", out, "--method", "auto", "--remove", "25%"],
        ["plan", calib, "-o", out, "--method", "linear", "--remove", "25%", "-p", "ranks=chosen"],
        ["plan", calib, "-o", out, "--method", "auto", "--native", "--remove", "50%"],
        ["plan", calib, "-o", out, "--method", "mergemoe", "--remove", "25%"],
        ["apply", REFERENCE, plan, "-o", out, "--calibration", calib],
        ["evaluate", small, "--against", REFERENCE, *HELD_OUT],
        ["compress", REFERENCE, "-o", out, "--method", "auto", "--remove", "25%", *TEXT],
        [*compare, *TEXT, "--remove", "25%"],
        [*compare, *TEXT, "--remove", "25%", "--stream"],
        [*compare, "--calibration", calib, "--length", "256", "--sizes", "75%"],
    ):
        code, shown, err = run(*words, "--dry-run")
        assert (code, shown) == (0, ""), err
        lines = err.splitlines()
        told = [line for line in lines if line.startswith(("time:   ", "memory: ", "disk:   reads "))]
        assert len(told) == 3, err
        assert max(map(len, told)) <= 80, err
        assert ("nobody has counted what mergemoe computes" in lines[0]) == ("mergemoe" in words)
    assert {file: file.stat().st_mtime for file in tmp_path.rglob("*")} == before


def test_what_is_refused_is_refused_by_dry_runs(
    run, made: moetailor.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calib, plan, out = made.folder, tmp_path / "plan.json", tmp_path / "out"
    assert run("plan", calib, "-o", plan, "--method", "mone", "--remove", "25%")[0] == 0
    native = ["plan", calib, "-o", out, "--method", "auto", "--native", "--remove", "50%"]
    ruled = ["compress", REFERENCE, "-o", out, *TEXT, "--method", "reap", "--remove", "50%", "--allocation", "error"]
    for words, why in (
        (["calibrate", tmp_path / "no", "-o", out, *TEXT], "no: no such folder"),
        (
            ["calibrate", REFERENCE, "-o", out, *TEXT, "--length", "513"],
            "--length 513 is more than the model takes (512)",
        ),
        (["plan", calib, "-o", out, "--method", "easy_ep", "--remove", "25%"], "easy_ep reads gated_norm_shift"),
        (["plan", calib, "-o", tmp_path, "--method", "mone", "--remove", "25%"], "is a folder"),
        (["apply", REFERENCE, plan, "-o", out], "which are computed from the calibration; name it"),
        (["apply", REFERENCE, plan, "-o", REFERENCE, "--calibration", calib], "is the original itself"),
        (["evaluate", REFERENCE, "--against", tmp_path, *HELD_OUT], "no config.json"),
        (["compare", REFERENCE, "-o", out, "--held-out", plan], "give either calibration text"),
        ([*ruled, "--format", "gguf"], "--allocation error: layers keep different numbers of experts"),
        ([*ruled, "--format", "expanded"], "--allocation error: layers keep different numbers of experts"),
        ([*native, "--bits", "4"], "format native holds experts as they lie"),
        ([*native, "--allocation", "error"], "--allocation: refit here decides itself"),
        ([*native, "--layers", "0"], "format native"),
        (["fit", REFERENCE, "--memory", "2GB", "--choice", "1", "-o", made.folder, "--data", plan], "choose another"),
    ):
        code, _, err = run(*words, "--dry-run")
        assert code == 1
        assert why in err
        if words[: len(native)] == native:  # and before anything is planned
            with monkeypatch.context() as patch:
                patch.setattr(moetailor, "make_plan", lambda *_, **__: pytest.fail("planned"))
                code, _, err = run(*words)
            assert code == 1
            assert why in err


def test_an_evaluation_gives_its_estimate_as_json(run, tmp_path: Path) -> None:
    file = tmp_path / "estimate.json"
    code, _, err = run("evaluate", REFERENCE, "--against", REFERENCE, *HELD_OUT, "--dry-run", "--json", file)
    assert code == 0, err
    found = json.loads(file.read_text())
    # the hidden states of 2 x 64 tokens
    assert (found["verb"], found["reads"], found["meanwhile"]) == ("evaluate", 2 * 18536832, 2 * 64 * 192 * 4)
    assert found["seconds"] > 0
    # The command that it advises may write its scores there.
    assert "next: the same command without --dry-run" in err
    assert "nothing was made" not in err
    check_file(file, "scores")


def read_by(run: Callable, *words: object) -> float:
    """Return the megabytes that a dry run says will be read."""
    code, _, err = run(*words, "--dry-run")
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if line.startswith("disk:   reads "))
    return float(line.split()[2])


def test_a_dry_run_counts_what_is_not_recorded_yet(run, tmp_path: Path) -> None:
    """Sensitivities are another pass over the original, 18.54 MB, for an allocation too; what is there is not made."""
    small = [REFERENCE, "-o", tmp_path / "out", *TEXT, "--method", "random", "--remove", "25%"]
    uniform, by_error = (read_by(run, "compress", *small, "--allocation", rule) for rule in ("uniform", "error"))
    assert by_error - uniform == pytest.approx(18.54, abs=0.1)
    assert run("calibrate", REFERENCE, "-o", tmp_path / "out.calibration", *TEXT)[0] == 0
    assert uniform - read_by(run, "compress", *small) == pytest.approx(18.54, abs=0.1)
    assert by_error - read_by(run, "compress", *small, "--allocation", "error") == pytest.approx(18.54, abs=0.1)
    again = [REFERENCE, "-o", tmp_path / "out.calibration", *TEXT]
    assert read_by(run, "calibrate", *again) == 0
    assert read_by(run, "calibrate", *again, "--sensitivity") == pytest.approx(18.54, abs=0.1)


def test_a_dry_run_refuses_a_calibration_of_another_model(
    run, calibration: Callable[[str], moetailor.Calibration], tmp_path: Path
) -> None:
    shutil.copytree(calibration("olmoe").folder, tmp_path / "out.calibration")
    small = [REFERENCE, "-o", tmp_path / "out", *TEXT, "--method", "reap", "--remove", "25%"]
    code, _, err = run("compress", *small, "--dry-run")
    assert code == 1
    assert "not the model that was calibrated" in err


def test_a_row_that_will_be_refused_is_said(run, made: moetailor.Calibration, tmp_path: Path) -> None:
    words = ["compare", REFERENCE, "-o", tmp_path / "out", "--held-out", REFERENCE / "heldout.jsonl"]
    words += ["--calibration", made.folder, "--length", "256", "--methods", "reap,quantize@4,reap@4"]
    code, _, err = run(*words, "--sizes", "50%,25%", "--dry-run")
    assert code == 0, err
    # With 4 of 32 experts: 18,536,832 - 4 x 28 x (3 x 192 x 96 + 192) x 2
    assert "reap (size 25%): takes at least 6,107,520 bytes, 32.9% of the original's" in " ".join(err.split())
    assert "reap + 4 bits (size 50%): with every expert in 4 bits it takes" in " ".join(err.split())


def test_a_dry_run_of_a_comparison_counts_what_is_left(run, tmp_path: Path) -> None:
    words = ["compare", REFERENCE, "-o", tmp_path / "out", "--held-out", REFERENCE / "heldout.jsonl", *TEXT[:2]]
    words += ["--sequences", "4", "--held-out-sequences", "2", "--length", "64", "--remove", "25%"]
    words += ["--methods", "reap"]
    assert read_by(run, *words) > 3 * 18.5
    assert run(*words)[0] == 0
    # The calibration is there, and the row that lacks another method's; its original is run again.
    assert read_by(run, *words) == 0
    assert 18.5 < read_by(run, *words[:-1], "random") < 2 * 18.6


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("moetailor", ["quantize", "--remove", "0%", "--layers", "0,2"]),
        ("expanded", ["quantize", "--remove", "0%", "--layers", "0,2"]),
        ("expanded", ["reap", "--remove", "50%", "--bits", "4"]),
        ("native", ["camera", "--remove", "50%"]),
        ("native", ["reap", "--remove", "50%"]),
    ],
    ids=lambda words: "-".join(words[:1]) if isinstance(words, list) else words,
)
def test_what_an_apply_writes_is_foretold(
    form: str, method: list[str], run, made: moetailor.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, calib = tmp_path / "plan.json", tmp_path / "place" / "out", made.folder
    out.parent.mkdir()
    assert run("plan", calib, "-o", plan, "--method", *method)[0] == 0
    words = ["apply", REFERENCE, plan, "-o", out, "--calibration", calib, "--format", form]
    (line,) = (line for line in run(*words, "--dry-run")[2].splitlines() if line.startswith("disk:"))
    _, told, *more = line.removesuffix(" more on the way").split(", ")
    writes, meanwhile = (float(words.split()[-2]) * 1e6 for words in (told, *more, "0 MB")[:2])
    most = 0

    def before(delete: Callable) -> Callable:
        def look(*given: object, **options: object) -> object:
            nonlocal most
            most = max(most, size_of(out.parent))
            return delete(*given, **options)

        return look

    monkeypatch.setattr(Path, "unlink", before(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", before(shutil.rmtree))
    assert run(*words)[0] == 0
    assert writes == pytest.approx(size_of(out), rel=0.02)
    # Small files are written once most of what was on the way is gone.
    assert writes + meanwhile == pytest.approx(max(most, size_of(out)), rel=0.03)


def test_what_is_measured_already_is_not_counted(run, made: moetailor.Calibration, tmp_path: Path) -> None:
    calib = shutil.copytree(made.folder, tmp_path / "calib")
    words = ["plan", calib, "-o", tmp_path / "plan.json", "--method", "linear", "-p", "ranks=chosen", "--remove", "25%"]
    assert "measured already" not in run(*words, "--dry-run")[2]
    assert run(*words)[0] == 0
    told = "{} of 128 experts are measured already, and kept with the calibration"
    assert told.format(128) in run(*words, "--dry-run")[2].splitlines()
    next((calib / "measured").iterdir()).unlink()
    assert told.format(96) in run(*words, "--dry-run")[2].splitlines()


def test_a_dry_run_downloads_headers_alone(tmp_path: Path) -> None:
    with hub.serving(REFERENCE) as served:
        command = [*MOETAILOR, "calibrate", hub.NAME, "-o", "out", "--data", "text.jsonl", "--length", "256"]
        environment = os.environ | served.environment(tmp_path)
        (tmp_path / "text.jsonl").touch()
        ran = subprocess.run(
            [*command, "--dry-run"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert ran.returncode == 0, ran.stderr
    assert "after a download of 18.54 MB" in ran.stderr
    assert 0 < served.given["model.safetensors"] <= 100_001
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_methods_that_read_sums_alone_compute_nothing(made: moetailor.Calibration) -> None:
    size = LayerSize(experts=8, top_k=2, shape=made.model.stacks[0].shape, sampled=100)
    for name, method in METHODS.items():
        found = method().work(size)
        if method.reads_weights:
            assert found != Work() or name in ("camera", "quantize")  # which compute when they are applied
        else:
            assert found == Work()


def test_loops_count_until_some_were_compiled(tmp_path: Path) -> None:
    with looked_at(REFERENCE) as original:
        narrow, whole = (
            estimate_plan(original.facts, METHODS[name](), moetailor.Budget.parse(remove=remove))
            for name, remove in (("quantize", "0%"), ("mone", "25%"))
        )
    forms = (FORMATS["moetailor"], FORMATS["compressed-tensors"], None)
    fours = frozenset({(4, 0)})
    assert [kinds_of(narrow, form) for form in forms] == [fours, frozenset(), fours]
    assert kinds_of(whole) == frozenset()
    mixed = [kinds_of(replace(whole, method="auto", parameters={"bits": bits})) for bits in (True, False)]
    menu = [width for width in METHODS["auto"]().stays if isinstance(width, Width)]
    layers = {f"layer {width}": untouched(8).narrowed(width) for width in menu}
    assert mixed == [kinds_of(replace(narrow, layers=layers)), frozenset()]
    # Only the loop that was needed counts as kept, and for its own kind.
    lines = """
        import torch
        from moetailor.answers import Width
        from moetailor.checkpoint.experts import ExpertShape
        from moetailor.estimates.compiling import of_loops
        fours, both = frozenset({(4, 0)}), frozenset({(4, 0), (8, 4)})
        before = of_loops("cpu", both).steps, of_loops("meta", both).steps
        storage = Width.parse("4").storages(ExpertShape(width=32, intermediate=32))["up"]
        storage.decode(storage.pack(storage.nearest(torch.randn(1, 32, 32), torch.float32)), (1, 32, 32))
        after = of_loops("cpu", fours, ("weight",)), of_loops("cpu", fours), of_loops("cpu", both)
        print(*map(int, before), *(int(each.steps) for each in after), after[0].nbytes, after[1].nbytes)
    """
    run = dedent(lines)
    anew = subprocess.run(
        [sys.executable, "-c", run],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert anew.stdout.split() == ["400000", "0", "0", "100000", "300000", f"{60 * 10**6}", f"{165 * 10**6}"]


def test_memory_that_was_taken_is_seen() -> None:
    give_back()  # else what is freed and kept is taken first
    now, (before, _) = resident_now(), peak_nbytes()
    assert 0 < now <= before
    taken = torch.ones(before - now + 2**27, dtype=torch.uint8)
    assert peak_nbytes()[0] >= before + 2**26
    del taken
