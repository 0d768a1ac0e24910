"""The command line from end to end, as a person uses it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moetailor
from moetailor_cli.app import _stoppable
from support.reference import REFERENCE, TEXT


def test_stage_by_stage(run, tmp_path: Path) -> None:
    calib, plan, out, scores = (tmp_path / name for name in ("calib", "plan.json", "out", "scores.json"))
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT)[0] == 0
    code, _, err = run("plan", calib, "-o", plan, "--method", "mone", "--remove", "25%", "-p", "score=exact")
    assert code == 0
    assert "24 of 32 experts stay, 8 constant" in err
    assert moetailor.Plan.load(plan).parameters["score"] == "exact"
    code, _, err = run("apply", REFERENCE, plan, "-o", out, "--calibration", calib)
    assert code == 0
    assert "15.01 MB, the original has 18.54 MB" in err
    heldout = ["--data", REFERENCE / "heldout.jsonl", "--sequences", "2", "--length", "64"]
    code, shown, _ = run("evaluate", out, "--against", REFERENCE, *heldout, "--json", scores)
    assert code == 0
    assert "perplexity" in shown
    found = json.loads(scores.read_text())
    assert 0 < found["kl"]["mean"] < 0.1
    assert found["bytes"] == {"original": 18536832, "compressed": 15010176}


def test_compress_is_the_same_as_the_stages(run, tmp_path: Path) -> None:
    code, _, err = run("compress", REFERENCE, "-o", tmp_path / "out", "--method", "reap", "--remove", "50%", *TEXT)
    assert code == 0
    assert "opened again and run once" in err
    calibration = moetailor.Calibration.open(tmp_path / "out.calibration")
    plan = moetailor.make_plan(calibration, "reap", moetailor.Budget.parse(remove="50%"))
    assert moetailor.Plan.load(tmp_path / "out" / "moetailor_plan.json") == plan


def test_compare_prints_a_ranking_and_what_failed(run, tmp_path: Path) -> None:
    out, held_out = tmp_path / "out", ["--held-out", REFERENCE / "heldout.jsonl", "--held-out-sequences", "2"]
    words = ["compare", REFERENCE, "-o", out, *TEXT, *held_out, "--methods", "mone,reap", "--remove", "25%,95%"]
    code, shown, err = run(*words, "--methods", "linear:rank=2:ranks=chosen")
    assert code == 0, err
    assert f"results are in {out / 'results.json'}" in err
    results = json.loads((out / "results.json").read_text())
    first, second = (shown.index(f"{ratio} removed") for ratio in ("25%", "95%"))
    best = [results["cells"][number]["name"] for number in results["groups"]["25% removed"]]
    places = [shown.index(name.partition(":")[0], first, second) for name in best]
    assert places == sorted(places)
    assert shown.index("reap (95% removed): model.layers.0: plan leaves 2 slots but the router picks 4") > second
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert f"{results['cells'][0]['fidelity']['']['kl']['mean']:.3g}" in shown
    sized = [*words[:-4], "--methods", "reap,quantize:rounding=nearest@4", "--sizes", "75%,30%"]
    code, shown, err = run(*sized)
    assert code == 0, err
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "at most 75% of the bytes"
    # Bits alone are smaller here, and lose less.
    assert [line[:16] for line in lines[2:4]] == ["*4 bits nearest ", " reap           "]
    # With 4 of 32 experts: 18,536,832 - 4 x 28 x (3 x 192 x 96 + 192) x 2
    assert "reap (30%): takes at least 6,107,520 bytes, 32.9% of the original's" in lines
    results = json.loads((out / "results.json").read_text())
    assert " ".join(lines[-2:]).endswith(results["recommendation"][-60:])
    code, _, err = run(*words[:-2], "--sizes", "75%", "--remove", "25%")
    assert code == 1
    assert "--remove and --sizes: rows are of equal ratios or of equal bytes; give one of them" in err
    code, _, err = run(*words, "--length", "32")
    assert code == 1
    assert "holds a comparison with another held-out text; choose another folder or delete it" in err
    code, shown, err = run(*words[:-4], "--methods", "reap", "--remove", "95%")
    assert code == 1
    assert "reap (95% removed): model.layers.0: plan leaves 2 slots but the router picks 4" in shown
    assert "error: no row could be measured" in err


def test_recover_trains_what_was_compressed(run, tmp_path: Path) -> None:
    small, out, scores = tmp_path / "small", tmp_path / "out", tmp_path / "scores.json"
    assert run("compress", REFERENCE, "-o", small, "--method", "mone", "--remove", "50%", *TEXT)[0] == 0
    held = tmp_path / "held.jsonl"
    held.write_text("".join((REFERENCE / "heldout.jsonl").read_text().splitlines(keepends=True)[:1]))
    words = ["recover", small, "--teacher", REFERENCE, *TEXT[:2], "--held-out", held, "-o", out, "--json", scores]
    trained = ["--train", "router,standins", "--loss", "both", "--steps", "3", "--length", "64", "--lr", "1e-3"]
    code, shown, err = run(*words, *trained, "--batch-size", "2", "--device", "cpu")
    assert (code, out.is_dir()) == (0, True), err
    assert "held out, kd" in shown
    assert "3 steps, 384 tokens" in err
    found = json.loads(scores.read_text())
    assert len(found["losses"]) == 3
    assert set(found["before"]) == set(found["after"]) == {"task", "kd"}
    code, _, err = run(*words[:2], *TEXT[:2], "-o", tmp_path / "again", "--loss", "task", "--train", "all,every")
    assert code == 1
    assert "--train 'every'. Known: all, experts, rest, router, standins" in err


def test_a_dry_run_reads_no_data_and_writes_nothing(run, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("no row of a text")
    data = ["--data", tmp_path / "data.jsonl", "--length", "256"]
    words = ["compress", REFERENCE, "-o", tmp_path / "out", "--method", "reap", "--remove", "25%", "--dry-run", *data]
    code, _, err = run(*words)
    assert code == 0
    assert "14,985,600 of 18,536,832 bytes, format native" in err
    assert list(tmp_path.iterdir()) == [tmp_path / "data.jsonl"]


def test_inspect_as_text_and_as_json(run) -> None:
    code, shown, _ = run("inspect", REFERENCE)
    assert code == 0
    for fact in ("olmoe", "32", "110.59 kB", "18.54 MB", "9.27 M"):
        assert fact in shown
    code, shown, _ = run("inspect", REFERENCE, "--json")
    found = json.loads(shown)
    assert code == 0
    assert found["top_k"] == 4
    assert found["routed_parameters"] == 4 * 32 * 3 * 192 * 96
    # embeddings and attention, and four of 32 experts
    assert found["active_parameters"] == found["parameters"] - found["routed_parameters"] * 28 // 32
    assert found["moe"][0] == {
        "layer": 0,
        "slots": 32,
        "experts": 32,
        "stand_ins": 0,
        "ranks": [],
        "runs": 4,
        "borrowed": 0,
        "expert_bytes": 110592,
    }


def test_methods_are_listed_in_80_columns_and_shown_one_by_one(run) -> None:
    code, shown, _ = run("methods")
    assert code == 0
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    starts = [line.split()[0] for line in lines[1:] if line and not line.startswith(" ")]
    assert starts[: len(moetailor.METHODS)] == sorted(moetailor.METHODS)
    (linear,) = (line for line in lines if line.startswith("linear "))
    assert linear.split("  ")[0] == "linear"
    assert "constant, linear" in linear
    code, shown, _ = run("methods", "LightMoE")
    assert code == 0
    for told in ("-p base=average", "average, mean, least_squares or dominant", "paper: arXiv:2603.12645"):
        assert told in shown
    for told in ("-p rank=16  a whole number, at least 0", "--remove is a share of all bytes"):
        assert told in shown
    assert "`" not in shown
    code, _, err = run("methods", "lihgtmoe")
    assert code == 1
    assert "no method 'lihgtmoe'; did you mean 'lightmoe'?" in err


def test_a_method_is_found_however_it_is_capitalised(run, tmp_path: Path) -> None:
    words = ["compress", REFERENCE, "-o", tmp_path / "out", "--data", "some/dataset", "--dry-run"]
    words += ["--length", "256"]
    code, _, err = run(*words, "--method", "Compressed_Experts")  # which may go without a budget
    assert code == 0, err
    assert "compressed_experts keeps" in err
    assert run(*words, "--method", "AUTO", "--native", "--remove", "25%")[0] == 0


def test_uniform_layers_for_engines(run, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ["-p", "widths=8,4", "-p", "group=32", "-p", "codes=int", "--size", "55%"]
    given = ["--method", "Auto", "--uniform-layers", *words, "--format", "compressed-tensors", *TEXT]
    code, _, err = run("compress", REFERENCE, "-o", out, *given)
    assert code == 0, err
    folder = tmp_path / "out.calibration"
    assert run("plan", folder, "-o", tmp_path / "plan.json", "-m", "auto", "--uniform-layers", *words)[0] == 0
    made = moetailor.Plan.load(tmp_path / "plan.json")
    assert made.parameters["uniform_layers"]
    assert made.layers == moetailor.Plan.load(out / "moetailor_plan.json").layers
    bits = [{width.bits for width in layer.widths.values()} for layer in made.layers.values()]
    assert sorted(map(sorted, bits)) == [[4], [4], [8], [8]]
    recipe = ["--calibration", folder, "--format", "gguf"]
    code, _, err = run("apply", REFERENCE, tmp_path / "plan.json", "-o", tmp_path / "native", *recipe)
    assert code == 0, err
    types = (tmp_path / "native" / "tensor-types.txt").read_text().split()
    assert sorted(line.partition("=")[2] for line in types) == ["iq4_nl"] * 6 + ["q8_0"] * 6
    code, shown, err = run("inspect", out)
    assert code == 0, err
    assert "experts are int4, groups of 32, int8, groups of 32" in " ".join(shown.split())
    code, _, err = run("evaluate", out, "--against", REFERENCE, *TEXT)
    assert code == 0, err
    code, _, err = run("plan", folder, "-o", tmp_path / "p.json", "-m", "reap", "--uniform-layers", "--remove", "25%")
    assert code == 2
    assert "--uniform-layers: says how auto chooses bits" in " ".join(err.split())
    odd = ("-m", "auto", "--uniform-layers", "-p", "uniform_layers=false", "--size", "40%")
    code, _, err = run("plan", folder, "-o", tmp_path / "p.json", *odd)
    assert code == 2
    assert "uniform_layers=false: leave one of them out" in " ".join(err.replace("│", " ").split())


def test_wrong_usage_exits_with_2_and_wrong_input_with_1(run, tmp_path: Path) -> None:
    assert run("plan")[0] == 2
    words = ["plan", tmp_path, "-o", tmp_path / "p", "-m", "mone", "--remove", "25%", "-p"]
    assert run(*words, "novice")[0] == 2
    code, _, err = run(*words, "score=exact", "-p", "score=frequency")
    assert (code, "--param score: is given twice; give it once" in " ".join(err.split())) == (2, True)
    code, _, err = run(*words, "score=exact", "--batch-memory", "0")
    assert (code, "--batch-memory 0: nothing can be computed in no memory" in " ".join(err.split())) == (2, True)
    code, _, err = run("inspect", tmp_path)
    assert code == 1
    assert "Traceback" not in err
    assert "no config.json" in err


def test_version(run) -> None:
    assert run("--version")[1].strip() == f"moetailor {moetailor.__version__}"


# The tests themselves may run under nohup.
FRESH = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from moetailor_cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)],
)
def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    """Evaluation has the log-probabilities of all words among the temporary files, which may be many bytes.

    In a process of its own: a child of this one could not go on with threads that torch has started here.
    """
    (tmp_path / "tmp").mkdir()
    text = ["--data", str(REFERENCE / "heldout.jsonl"), "--sequences", "64", "--length", "64"]
    words = ["evaluate", str(REFERENCE), "--against", str(REFERENCE), *text, "--json", str(tmp_path / "scores.json")]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, *words]
    child, deadline = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL), time.monotonic() + 120
    while not list(tmp_path.glob("tmp/moetailor-*/*.safetensors")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait() == code
    assert sorted(os.listdir(tmp_path)) == ["tmp"]
    assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_destructor_swallows_still_ends_the_run(number: int) -> None:
    class Killing:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            for _ in range(100):  # the signal's handler runs in here
                pass

    def go() -> None:
        with _stoppable():
            Killing()
            time.sleep(30)

    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            go()
    finally:
        signal.signal(number, before)


def test_signals_that_are_ignored_stay_so(run) -> None:
    """As under nohup; and whoever calls main has the handlers back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("--version")[0] == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
