"""The comparison: cells against the stages done by hand, layer errors against slow references, resuming, refusals."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import (
    ANSWERS,
    Auxiliary,
    Borrowed,
    Constant,
    Drop,
    Fitted,
    Keep,
    Linear,
    LowRank,
    Merged,
    Remap,
)
from moetailor.calibration.statistics import sample_keys
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.models import load_tokenizer
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.comparison import compare as compare_module
from moetailor.comparison.bench import Bench
from moetailor.comparison.cells import cells_of
from moetailor.comparison.probe import Probe
from moetailor.comparison.results import letters, ranked, spearman, usage
from moetailor.methods.run import view_of
from moetailor.planning.layer_plan import LayerPlan
from support.families import tiny_model
from support.tiny import token_batches

REFERENCE = Path(__file__).parent.parent / "examples" / "reference-moe"
Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
TEXT = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=4, length=64)
HELD_OUT = moetailor.TextOptions(data=(str(REFERENCE / "heldout.jsonl"),), sequences=4, length=64, batch_size=2)


def run(out: Path, methods: str = "mone,conmoe:scope=2", remove: str = "25%,50%", **given: Any) -> dict:
    options = {"model": REFERENCE, "text": TEXT, "held_out": HELD_OUT} | given
    return moetailor.compare(out=out, methods=methods.split(","), remove=remove.split(","), **options)


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """Measure speeds for a moment only: what they are is no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetailor.comparison.bench.NEW_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Return the folder and the results of one small comparison."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, run(out)


def timeless(results: dict) -> dict:
    """Return results without what no two runs share: seconds and tokens a second."""
    if isinstance(results, list):
        return [timeless(entry) for entry in results]
    if not isinstance(results, dict):
        return results
    gone = ("seconds", "speed", "prefill", "decode", "folder")
    return {key: timeless(value) for key, value in results.items() if key not in gone}


def test_a_cell_has_the_numbers_of_the_stages_done_by_hand(tmp_path: Path) -> None:
    # In float32, so that nothing that is computed is rounded on its way to disk.
    original, out = tmp_path / "original", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).save_pretrained(original)
    load_tokenizer(REFERENCE).save_pretrained(original)
    results = run(out, "mone,linear:rank=2,reap", "50%", model=original)
    calibration = moetailor.Calibration.open(out / "calibration")
    for cell in results["cells"]:
        small = tmp_path / cell["method"]
        budget = moetailor.Budget.parse(remove="50%")
        plan = moetailor.make_plan(calibration, cell["method"], budget, parameters=cell["parameters"])
        moetailor.apply(plan, original, small, calibration=calibration)
        scores = moetailor.evaluate(small, original, text=HELD_OUT)
        domains = {name: part.to_json() for name, part in scores.domains.items()}
        assert cell["fidelity"] == {"": scores.overall.to_json()} | domains
        assert (cell["nbytes"], cell["native"]) == (plan.nbytes, plan.native)
        assert (results["original"]["resident"], cell["resident"]) == scores.resident
        assert [cell["layers"][str(index)]["slots"] for index in plan.by_layer] == list(
            map(letters, plan.by_layer.values())
        )
    perplexity = {name: part["original"]["perplexity"] for name, part in cell["fidelity"].items()}
    assert results["original"]["perplexity"] == perplexity


def test_what_is_written_is_what_is_returned_and_nothing_else_stays(done: tuple[Path, dict]) -> None:
    folder, results = done
    assert json.loads((folder / "results.json").read_text()) == results
    found = {path.name for path in folder.iterdir()}
    assert found == {"calibration", "cells", "comparison.json", "original.json", "report.html", "results.json"}
    order = [(cell["ratio"], cell["fidelity"][""]["kl"]["mean"]) for cell in results["cells"]]
    assert order == sorted(order)
    assert sum(results["heldout"]["domains"].values()) == results["cells"][0]["fidelity"][""]["tokens"]


def test_killed_in_the_middle_and_run_again_gives_the_same(
    done: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, measure, measured = Bench.measure, 0, []

    def stop_after_two(self: Bench, cell: object, *rest: object) -> dict:
        nonlocal measure
        measure += 1
        if measure > 2:
            raise KeyboardInterrupt
        return whole(self, cell, *rest)

    monkeypatch.setattr(Bench, "measure", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
    assert (tmp_path / "out" / ".moetailor" / "reference").is_dir()
    monkeypatch.setattr(Bench, "measure", lambda self, cell, *rest: measured.append(cell) or whole(self, cell, *rest))
    resumed = run(tmp_path / "out")
    assert [cell.method for cell in measured] == ["mone", "conmoe"]
    assert timeless(resumed) == timeless(done[1])


def test_a_finished_comparison_runs_nothing_and_takes_more_methods(
    done: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    measured, whole = [], Bench.measure
    monkeypatch.setattr(
        Bench, "measure", lambda self, cell, *rest: measured.append(cell.method) or whole(self, cell, *rest)
    )
    monkeypatch.setattr(Original, "load", lambda *_, **__: pytest.fail("loaded a model"))
    assert timeless(run(out)) == timeless(done[1])
    assert measured == []
    monkeypatch.undo()
    more = run(out, methods="mone,conmoe:scope=2,reap", remove="50%")
    assert {cell["method"] for cell in more["cells"]} == {"mone", "conmoe", "reap"}


def test_a_failing_cell_is_a_row_that_says_why_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: Bench) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Bench, "copy", exhausted)
    results = run(tmp_path / "out", methods="reap", remove="25%,95%")
    few = "model.layers.0: plan leaves 2 slots but the router picks 4 per token; keep at least 4"
    assert [cell["error"] for cell in results["cells"]] == ["CUDA out of memory. Tried to allocate 2 GiB", few]
    assert results["cells"][0]["fidelity"] is None
    assert results["spearman"] is None
    monkeypatch.undo()
    again = run(tmp_path / "out", methods="reap", remove="25%,95%")
    assert [cell["error"] for cell in again["cells"]] == [None, few]


def test_the_original_stays_what_it_is(calibration: GetCalibration, checkpoint: Get) -> None:
    """Every kind of answer is applied to a copy that shares the tensors; neither may be written to."""
    model = tiny_model("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = calibration("olmoe")
    bench = Bench.__new__(Bench)
    bench.__dict__["model"] = model
    for method in ("mone", "linear", "mergemoe", "ream", "conmoe", "reap", "auto"):
        plan = moetailor.make_plan(made, method, moetailor.Budget.parse(keep=5))
        compressed = moetailor.apply(plan, bench.copy(), calibration=made)
        assert compressed.config is not model.config
        shared = {tensor.data_ptr() for tensor in model.parameters()}
        assert any(tensor.data_ptr() in shared for tensor in compressed.parameters())
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert type(model.get_submodule("model.layers.0.mlp.experts")).__name__ == "OlmoeExperts"


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "nemotron_h_latent", "granitemoe"])
def test_layer_errors_equal_a_slow_reference(family: str, calibration: GetCalibration) -> None:
    made, model = calibration(family), tiny_model(family)
    anatomy, held_out = discover(model.config, model), token_batches(3)[1:]
    probe = Probe(model, anatomy.layers, made.batches(), held_out)
    nothing = probe.errors(tiny_model(family))
    assert all((error.expected, error.measured) == (0, 0) for error in nothing.values())
    half = moetailor.Budget.parse(remove="50%")
    plan = moetailor.make_plan(made, "conmoe", half, parameters={"scope": 2})
    compressed = moetailor.apply(plan, tiny_model(family), calibration=made)
    found = probe.errors(compressed)
    for index, layer in anatomy.layers.items():
        wanted, given, energy = 0.0, 0.0, 0.0
        for hidden, slots, gates in calls(model, layer.experts, made.batches()):
            with torch.no_grad():
                true = model.get_submodule(layer.experts)(hidden, slots, gates)
            # The gates of the original serve: nothing before the experts changes, and no slot is dropped.
            with torch.no_grad():
                other = compressed.get_submodule(layer.experts)(hidden, slots, gates)
            for t in range(len(true)):
                wanted += float((true[t].double() - other[t].double()).square().sum())
                energy += float(true[t].double().square().sum())
        tokens = sum(batch.input_ids.numel() for batch in made.batches())
        assert found[index].expected == pytest.approx(wanted / tokens, rel=1e-4)
        assert found[index].energy[0] == pytest.approx(energy / tokens, rel=1e-4)
        for mine, theirs in zip(
            calls(model, layer.experts, held_out), calls(compressed, layer.experts, held_out), strict=True
        ):
            with torch.no_grad():
                true, other = (
                    m.get_submodule(layer.experts)(*arguments) for m, arguments in ((model, mine), (compressed, theirs))
                )
            given += float((true.double() - other.double()).square().sum())
        tokens = sum(batch.input_ids.numel() for batch in held_out)
        assert found[index].measured == pytest.approx(given / tokens, rel=1e-4)
    assert sum(error.expected for error in found.values()) > 0


def test_layer_errors_are_of_the_tokens_that_count(calibration: GetCalibration) -> None:
    """As sensitivities are: by these the errors are multiplied."""
    made, model = calibration("olmoe"), tiny_model("olmoe")
    layers = discover(model.config, model).layers
    whole, other = token_batches()
    ids = torch.cat([other.input_ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    padded = moetailor.Batch.of(ids, (torch.arange(17) < 12).long()[None])
    counted = whole.counted.clone()
    counted[0, :3], counted[1, 7] = False, False
    text = [replace(whole, counted=counted), replace(padded, counted=padded.counted & (torch.arange(17) != 2))]
    plan = moetailor.make_plan(made, "conmoe", moetailor.Budget.parse(remove="50%"), parameters={"scope": 2})
    compressed = moetailor.apply(plan, tiny_model("olmoe"), calibration=made)
    found = Probe(model, layers, text, text[1:]).errors(compressed)
    places = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11], [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    for index, layer in layers.items():
        own, there = (m.get_submodule(layer.experts) for m in (model, compressed))
        errors, squares = [], []
        with torch.no_grad():
            for (hidden, slots, gates), at in zip(calls(model, layer.experts, [whole, other]), places, strict=True):
                true, given = own(hidden, slots, gates)[at], there(hidden, slots, gates)[at]
                errors += (true - given).double().square().sum(1).tolist()
                squares += true.double().square().sum(1).tolist()
            ((true, given),) = (
                (own(*mine)[places[2]], there(*theirs)[places[2]])
                for mine, theirs in zip(
                    calls(model, layer.experts, [other]), calls(compressed, layer.experts, [other]), strict=True
                )
            )
        assert len(errors) == 31
        assert found[index].expected == pytest.approx(sum(errors) / 31, rel=1e-4)
        assert found[index].energy[0] == pytest.approx(sum(squares) / 31, rel=1e-4)
        assert found[index].energy[1] == pytest.approx(sum(squares[20:]) / 11, rel=1e-4)
        assert found[index].measured == pytest.approx(float((true - given).square().sum()) / 11, rel=1e-4)
    assert sum(error.expected for error in found.values()) > 0


def calls(model: torch.nn.Module, path: str, batches: list[moetailor.Batch]) -> list[tuple[torch.Tensor, ...]]:
    """Return the arguments of the calls of an experts module that come from its own layer, one sequence at a time."""
    seen: list[tuple[torch.Tensor, ...]] = []
    for batch in batches:
        for ids in batch.input_ids:
            here: list[tuple[torch.Tensor, ...]] = []
            handle = model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, here=here: here.append(args)
            )
            with torch.no_grad():
                model(input_ids=ids[None], use_cache=False)
            handle.remove()
            # Visits to guests bring one slot of a token at a time, the layer's own call all top-k of them.
            (own,) = (args for args in here if args[1].shape[1] > 1)
            seen.append(own)
    return seen


def test_usage_equals_a_loop_over_sampled_tokens(tmp_path: Path) -> None:
    text = replace(TEXT, sequences=16, batch_size=3)
    calibration = moetailor.calibrate(
        REFERENCE, tmp_path / "c", text=text, sample=moetailor.SampleOptions(tokens=100, seed=3)
    )
    batches = moetailor.read_batches(text, load_tokenizer(REFERENCE))
    by_key = {}
    for batch in batches:
        keys = sample_keys(batch.document, batch.position, 3)
        for row in range(len(keys)):
            for place in range(keys.shape[1]):
                by_key[int(keys[row, place])] = batch.domains[int(batch.domain[row, place])]
    found, (domains, _) = usage(calibration), calibration.domains
    for layer in calibration.layers:
        sample = calibration.sample(layer)
        assert len(sample.key) == 100
        view = view_of(calibration, layer, ExpertWeights(str(REFERENCE)))
        assert [domains[number] for number in view.domains.tolist()] == [by_key[key] for key in sample.key.tolist()]
        counts: dict[str, Counter] = {}
        for key, experts in zip(sample.key.tolist(), sample.index.tolist(), strict=True):
            for name in ("", by_key[key]):
                counts.setdefault(name, Counter()).update(experts)
        assert {name for name in found[str(layer)] if sum(found[str(layer)][name])} == set(counts)
        for name, count in counts.items():
            shares = [count[expert] / count.total() for expert in range(32)]
            assert found[str(layer)][name] == pytest.approx(shares, rel=1e-6)
    assert len(counts) > 2


def test_letters() -> None:
    every = (Keep(), Drop(), Constant(), Linear(2), Merged(4), Fitted(), Drop(4), Remap(0, 0.5), Borrowed(3, 1))
    assert letters(LayerPlan(slots=(*every, LowRank(9), Auxiliary(main=1)))) == "#.clmf.><bv"
    assert len({kind.letter for kind in ANSWERS.values()}) == len({kind.kind for kind in ANSWERS.values()})


def row(ratio: str, kl: float | None, expected: float | None = None) -> dict:
    fidelity = None if kl is None else {"": {"kl": {"mean": kl}}}
    return {"ratio": ratio, "error": "no" if kl is None else None, "fidelity": fidelity, "expected_kl": expected}


def test_ranking_and_correlation() -> None:
    cells = [row("10%", None), row("10%", 2.0), row("10%", 1.0), row("50%", 0.5)]
    assert [(cell["ratio"], cell["error"] or cell["fidelity"][""]["kl"]["mean"]) for cell in ranked(cells)] == [
        ("10%", 1.0),
        ("10%", 2.0),
        ("10%", "no"),
        ("50%", 0.5),
    ]
    assert spearman(cells) is None
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 x 15)
    known = [row("10%", 1.0, 0.1), row("10%", 3.0, 0.2), row("10%", 2.0, 0.3), row("50%", 4.0, 9.0), row("50%", None)]
    assert spearman(known) == {"": pytest.approx(0.8), "10%": pytest.approx(0.5)}


def test_all_is_what_is_neither_trained_nor_slow() -> None:
    found = {cell.method for cell in cells_of(["all"], ["25%"])}
    assert found == set(moetailor.METHODS) - {"compressed_experts", "lightmoe", "naee", "quantize", "refit"}
    cells = cells_of(["mone", "all", "linear:rank=4:ranks=chosen", "mone:score=fusion", "naee"], ["50%", "0.5", "10%"])
    assert [cell.ratio for cell in cells] == sorted([cell.ratio for cell in cells])
    assert {cell.ratio for cell in cells} == {"10%", "50%"}
    half = [(cell.method, cell.parameters) for cell in cells if cell.ratio == "50%"]
    assert [name for name, _ in half].count("mone") == 1
    assert len(half) == len(found) + 2
    assert {given["rank"] for name, given in half if name == "linear"} == {4, 8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "mnoe"}, "--methods mnoe: no method 'mnoe'; did you mean 'mone'"),
        ({"methods": "linear:rank"}, "--methods linear:rank: write parameters as linear:parameter=value"),
        ({"methods": "linear:rnak=2"}, "no parameter 'rnak'; did you mean 'rank'"),
        ({"remove": "25%,lots"}, "--remove lots: not a share"),
        ({"remove": "25%,110%"}, "--remove 110%: must be at least 0% and below 100%"),
        ({"held_out": moetailor.TextOptions(data=())}, "no held-out text"),
        ({"text": None}, "either calibration text"),
        ({"held_out": moetailor.TextOptions(data=("nowhere.jsonl",), length=64)}, "nowhere.jsonl: "),
        ({"calibration": "nowhere", "text": None}, "nowhere: no calibration folder"),
    ],
)
def test_bad_input_is_refused_before_anything_long(
    given: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "calibrate", lambda *a, **k: pytest.fail("calibrated"))
    with pytest.raises(moetailor.MoetailorError) as refused:
        run(tmp_path / "out", **given)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(
    done: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "calibrate", lambda *a, **k: pytest.fail("calibrated"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(moetailor.MoetailorError, match=r"holds notes\.txt, and no comparison; choose another"):
        run(tmp_path)
    other = moetailor.TextOptions(data=HELD_OUT.data, sequences=3, length=64)
    with pytest.raises(moetailor.MoetailorError, match="holds a comparison with another held-out text; choose another"):
        run(done[0], held_out=other)


def test_another_calibration_is_refused_and_a_given_one_serves(done: tuple[Path, dict], tmp_path: Path) -> None:
    made = moetailor.calibrate(REFERENCE, tmp_path / "c", text=TEXT, sample=moetailor.SampleOptions(tokens=50))
    with pytest.raises(
        moetailor.MoetailorError, match="holds a comparison with another calibration, sensitivities; choose another"
    ):
        run(done[0], text=None, calibration=made.folder)
    results = run(tmp_path / "out", methods="reap", remove="25%", text=None, calibration=made.folder)
    assert results["calibration"] == {"data": list(TEXT.data), "tokens": 256, "folder": str(made.folder)}
    assert not (tmp_path / "out" / "calibration").exists()


def test_a_calibration_of_other_weights_is_refused(calibration: GetCalibration, tmp_path: Path) -> None:
    with pytest.raises(moetailor.MoetailorError, match="not the model that was calibrated"):
        run(tmp_path / "out", text=None, calibration=calibration("olmoe").folder)


def test_held_out_text_that_was_calibrated_on_is_told(tmp_path: Path) -> None:
    text = moetailor.TextOptions(data=HELD_OUT.data, sequences=2, length=64)
    with pytest.warns(moetailor.MoetailorWarning, match="held-out documents were calibrated on"):
        run(tmp_path / "out", methods="random", remove="25%", text=text)
