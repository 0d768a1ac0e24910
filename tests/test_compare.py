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
    all_marks,
)
from moetailor.calibration.effects import Prices
from moetailor.calibration.statistics import sample_keys
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.models import load_tokenizer
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.comparison import compare as compare_module
from moetailor.comparison.bench import Bench
from moetailor.comparison.cells import Cell, cells_of
from moetailor.comparison.frontier import front, recommendation
from moetailor.comparison.probe import LayerError, Probe
from moetailor.comparison.results import _expected, grouped, letters, spearman, usage
from moetailor.comparison.whole import WholeBench
from moetailor.evaluation.fidelity import Reference
from moetailor.methods.run import view_of
from moetailor.planning.layer_plan import LayerPlan
from support.families import tiny_model
from support.tiny import token_batches

REFERENCE = Path(__file__).parent.parent / "examples" / "reference-moe"
Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
TEXT = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=4, length=64)
HELD_OUT = moetailor.TextOptions(data=(str(REFERENCE / "heldout.jsonl"),), sequences=4, length=64, batch_size=2)


def run(out: Path, methods: str = "mone,conmoe:scope=2", remove: str | None = "25%,50%", **given: Any) -> dict:
    options = {"model": REFERENCE, "text": TEXT, "held_out": HELD_OUT, "remove": remove and remove.split(",")} | given
    return moetailor.compare(out=out, methods=methods.split(","), **options)


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """Measure speeds for a moment only: what they are is no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetailor.comparison.whole.NEW_TOKENS", 2)
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
    gone = ("seconds", "speed", "prefill", "decode", "prefill_low", "decode_low", "folder")
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
    order = [(cell["budget"], cell["fidelity"][""]["kl"]["mean"]) for cell in results["cells"]]
    assert order == sorted(order)
    assert results["groups"] == {"25% removed": [0, 1], "50% removed": [2, 3]}
    assert results["recommendation"] is None
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
    assert [cell.method.name for cell in measured] == ["mone", "conmoe"]
    assert timeless(resumed) == timeless(done[1])


def test_a_finished_comparison_runs_nothing_and_takes_more_methods(
    done: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    measured, whole = [], Bench.measure
    monkeypatch.setattr(
        Bench, "measure", lambda self, cell, *rest: measured.append(cell.method.name) or whole(self, cell, *rest)
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
    def exhausted(self: WholeBench) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(WholeBench, "copy", exhausted)
    results = run(tmp_path / "out", methods="reap", remove="25%,95%")
    few = "model.layers.0: plan leaves 2 slots but the router picks 4 per token; keep at least 4"
    assert [cell["error"] for cell in results["cells"]] == ["CUDA out of memory. Tried to allocate 2 GiB", few]
    assert results["cells"][0]["fidelity"] is None
    assert results["spearman"] is None
    monkeypatch.undo()
    again = run(tmp_path / "out", methods="reap", remove="25%,95%")
    assert [cell["error"] for cell in again["cells"]] == [None, few]


def test_rows_of_equal_bytes(tmp_path: Path) -> None:
    """Against the stages done by hand; what cannot be so small, or has nothing to remove, is a row that says so."""
    nearest = "quantize:rounding=nearest@4"
    results = run(tmp_path / "out", f"{nearest},mone,reap@4,reap", None, sizes=["75%", "40%", "30%"])
    whole, cells = results["model"]["nbytes"], results["cells"]
    calibration = moetailor.Calibration.open(tmp_path / "out" / "calibration")
    measured = {(cell["name"], cell["budget"]): cell for cell in cells if cell["error"] is None}
    assert {name for name, budget in measured if budget == "size 40%"} == {"mone", "reap", "reap + 4 bits"}
    experts = sum(stack.num_experts * stack.expert_bytes for stack in calibration.model.stacks)
    for (name, budget), cell in measured.items():
        if name != "4 bits nearest":
            share = int(budget.removeprefix("size ").removesuffix("%"))
            # Whole experts go, the same number in each layer: at most one of 32 is too many.
            assert -experts // 32 < cell["nbytes"] - whole * share // 100 <= 0
    cell, asked = measured["reap + 4 bits", "size 40%"], moetailor.Budget.parse(size="40%")
    plan = moetailor.make_plan(calibration, "reap", asked, width=moetailor.Width(bits=4))
    model, original = (Original(REFERENCE).load(dtype=torch.float32, device="cpu") for _ in range(2))
    moetailor.apply(plan, model, calibration=calibration)
    batches = moetailor.read_batches(HELD_OUT, load_tokenizer(REFERENCE))
    by_hand = Reference(tmp_path / "reference", batches).record(original).compare(model, original)
    assert cell["fidelity"] == {name: found.to_json() for name, found in by_hand.items()}
    assert set(cell["fidelity"]) == {"", *results["heldout"]["domains"]}
    assert cell["nbytes"] == plan.nbytes
    assert (cell["bits"], cell["layers"]["0"]["slots"]) == ("4", letters(plan.by_layer[0]))
    assert set(cell["layers"]["0"]["slots"]) == {"4", "."}
    # Bits alone are one row, whatever the sizes; it stands under the smallest that it fits.
    (plain,) = (number for number, cell in enumerate(cells) if cell["name"] == "4 bits nearest")
    assert plain in results["groups"]["at most 75% of the bytes"]
    assert set(cells[plain]["layers"]["0"]["slots"]) == {"4"}
    failed = {(cell["name"], cell["budget"]): cell["error"] for cell in cells if cell["error"]}
    every = moetailor.make_plan(calibration, "quantize", moetailor.Budget.parse(remove="0%"), parameters={"bits": 4})
    fewest = moetailor.make_plan(calibration, "reap", moetailor.Budget.parse(keep=4))
    assert failed == {
        ("reap + 4 bits", "size 75%"): f"with every expert in 4 bits it takes {every.nbytes:,} bytes, "
        f"{every.nbytes / whole:.1%} of the original's: nothing is left to remove",
        ("reap", "size 30%"): f"takes at least {fewest.nbytes:,} bytes, {fewest.nbytes / whole:.1%} of the original's",
    }
    assert results["recommendation"].startswith("Would 4 bits do? At best (4 bits nearest) they lose ")
    assert results["front"] == front(cells)


def test_noise_of_rounding_is_expected_to_cost_what_it_costs(calibration: GetCalibration) -> None:
    made = calibration("olmoe")
    errors = {layer: LayerError(expected=layer + 2.0, measured=0.0, energy=(1.0, 1.0)) for layer in made.layers}
    assert list(errors) == [0, 1]  # errors of 2 and 3
    prices = Prices(coarse={0: 10.0, 1: 11.0}, noise={0: 1.0, 1: 2.0}, flips={0: 1.0, 1: 3.0}, together=())
    budget, four = moetailor.Budget.parse(remove="0%"), moetailor.Width(bits=4)
    rounded = moetailor.make_plan(made, "quantize", budget)
    moved = (2 + 9 * 3) ** 0.5
    assert _expected(rounded, errors, prices) == pytest.approx(2 + 6 + moved)
    dropped = moetailor.make_plan(made, "reap", moetailor.Budget.parse(keep=5), width=four)
    assert _expected(dropped, errors, prices) == pytest.approx(20 + 33 + moved)
    layers = {
        prefix: replace(plan, slots=(Constant(), *plan.slots[1:]), widths={1: four}, expected=0.25)
        for prefix, plan in rounded.layers.items()
    }
    mixed = replace(rounded, layers=layers)
    assert _expected(mixed, errors, prices) == 0.25 * len(made.layers)
    assert _expected(mixed, errors, None) is None


def test_the_original_stays_what_it_is(calibration: GetCalibration, checkpoint: Get) -> None:
    """Every kind of answer is applied to a copy that shares the tensors; neither may be written to."""
    model = tiny_model("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = calibration("olmoe")
    bench = WholeBench.__new__(WholeBench)
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
    assert len(all_marks()) == sum(len(kind.marks()) for kind in ANSWERS.values())
    widths = {0: moetailor.Width(bits=2, down=4), 2: moetailor.Width(bits=8)}
    assert letters(LayerPlan(slots=(Keep(), Keep(), Keep(), Constant()), widths=widths)) == "2#8c"


def row(kl: float | None, size: int = 10, expected: float | None = None, **fields: Any) -> dict:
    """A result with a KL, whose interval reaches a tenth of it to both sides."""
    found = None if kl is None else {"": {"kl": {"mean": kl, "low": 0.9 * kl, "high": 1.1 * kl}}}
    measured = {"error": "no" if kl is None else None, "nbytes": None if kl is None else size, "fidelity": found}
    return {"name": "auto", "removes": True, "parameters": {}, "expected_kl": expected} | measured | fields


def bits(number: int, kl: float, size: int) -> dict:
    return row(kl, size, name=f"{number} bits", removes=False, parameters={"bits": number})


def test_rows_stand_under_what_was_asked_for() -> None:
    def cells(words: str, **asked: list[str]) -> list[Cell]:
        return cells_of(words.split(","), **asked)

    asked = cells("reap,mone,quantize", remove=["50%", "10%"])
    assert [(cell.name, str(cell.budget)) for cell in asked] == [
        ("4 bits", "remove 0%"),
        ("reap", "remove 10%"),
        ("mone", "remove 10%"),
        ("reap", "remove 50%"),
        ("mone", "remove 50%"),
    ]
    results = [row(0.5), row(None), row(1.0), row(2.0), row(1.5)]
    found = grouped(list(zip(asked, results, strict=True)), 100)
    assert found == {
        "0% removed": [results[0]],
        "10% removed": [results[2], results[1]],
        "50% removed": results[4:2:-1],
    }

    asked = cells("reap,reap@4,quantize@8,quantize@3,quantize@2", sizes=["40%", "75%", "60"])
    assert [str(cell.budget) for cell in asked[3:]] == [f"size {at}" for at in "75% 75% 40% 40%".split()] + 2 * [
        "size 60 bytes"
    ]
    # Of 100 bytes: 8 bits take more than is asked for, 3 bits fit 60 but not 40, 2 bits failed.
    results = [row(0.1, 80), row(0.3, 50), row(None), *(row(n, 30) for n in (9, 8, 7, 6, 5, 4))]
    found = grouped(list(zip(asked, results, strict=True)), 100)
    assert found == {
        "more bytes than asked for": [results[0], results[2]],
        "at most 75% of the bytes": [results[4], results[3]],
        "at most 60 bytes, 60% of the bytes": [results[1], results[8], results[7]],
        "at most 40% of the bytes": [results[6], results[5]],
    }


def test_correlation() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 x 15)
    known = [row(1.0, expected=0.1), row(3.0, expected=0.2), row(2.0, expected=0.3)]
    groups = {"one": known, "two": [row(4.0, expected=9.0), row(None)]}
    assert spearman(groups) == {"": pytest.approx(0.8), "one": pytest.approx(0.5)}
    assert spearman({"one": [row(None), row(2.0), row(1.0)]}) is None


def test_front_by_hand() -> None:
    # Sizes 1 2 2 3 4, errors 9 5 6 7 1: the third is beaten by the second, the fourth by both before it.
    cells = [row(1, 4), row(None), row(6, 2), row(7, 3), row(9, 1), row(5, 2)]
    assert front(cells) == [4, 5, 0]


def test_hardly_smaller_rows_are_on_no_front() -> None:
    """1,000 bytes at 7 nats and 1,001 at 2 are of one size; 1,100 at 1 is another, and 970 at 9 no less than one."""
    assert front([row(7, 1000), row(2, 1001), row(1, 1100), row(9, 970)]) == [3, 1, 2]


def test_would_4_bits_do() -> None:
    plain = [bits(8, 4e-5, 63), bits(5, 6e-4, 49), bits(4, 0.002, 44), bits(3, 0.008, 39), bits(2, 0.04, 34)]
    mixes = [row(1e-5, 59), row(6e-4, 40), row(0.0037, 35), row(0.05, 30), row(0.3, 25), row(None)]
    said = recommendation([*mixes, *plain], [60, 40, 35, 30, 25, 20], 100)
    assert said == (
        "Would 4 bits do? They lose 0.002 nats a token at 44% of the bytes; auto loses 0.0006 at 40%. Bits alone stay "
        "under 0.001 down to 49% of the bytes (5 bits: 0.0006). Least is lost at 40% by auto: 0.0006 (3 bits: 0.008), "
        "at 35% by auto: 0.0037 (2 bits: 0.04), at 30% by auto: 0.05 (no bits alone are so small). Nothing stays "
        "under 0.1 at 25%. No row was measured at 20%."
    )
    # An interval that reaches .001 is not under it; one that reaches another's does not lose less.
    close = [bits(4, 0.00095, 44), bits(3, 0.008, 39), row(0.0007, 40), row(0.0078, 39)]
    assert recommendation(close, [44, 39], 100) == (
        "Would 4 bits do? They lose 0.00095 nats a token at 44% of the bytes; auto loses 0.0007 at 40%. No bits alone "
        "stay under 0.001. Least is lost at 44% by auto: 0.0007 (4 bits: 0.00095), at 39% by 3 bits: 0.008."
    )
    assert recommendation([bits(4, 0.002, 44), row(0.0019, 44)], [], 100) == (
        "Would 4 bits do? They lose 0.002 nats a token at 44% of the bytes, and nothing as small was seen to lose "
        "less. No bits alone stay under 0.001."
    )
    grouped32 = bits(4, 0.0015, 46) | {"name": "4 bits g32"}
    assert str(recommendation([bits(4, 0.002, 44), grouped32], [], 100)).startswith(
        "Would 4 bits do? At best (4 bits g32) they lose 0.0015 nats a token at 46% of the bytes, and nothing"
    )
    assert recommendation([bits(4, 0.0004, 44)], [60], 100) == (
        "Would 4 bits do? They lose 0.0004 nats a token at 44% of the bytes, under 0.001: yes."
    )
    assert recommendation(mixes, [60], 100) is None


def test_a_domain_that_loses_more_is_named() -> None:
    mix, plain = row(0.01, 40), bits(4, 0.02, 40)
    for cell, kl in ((mix, 0.09), (plain, 0.03)):
        cell["fidelity"] |= {"code": row(kl)["fidelity"][""], "wiki": row(0.01)["fidelity"][""]}
    said = recommendation([mix, plain], [40], 100)
    assert said is not None
    assert said.endswith("at 40% by auto: 0.01 (4 bits: 0.02). But at 40% auto loses more than 4 bits on code.")


def test_all_is_what_is_neither_trained_nor_slow() -> None:
    found = {cell.method.name for cell in cells_of(["all"], ["25%"])}
    assert found == set(moetailor.METHODS) - {"compressed_experts", "lightmoe", "naee", "quantize", "refit"}
    asked = ["mone", "all", "linear:rank=4:ranks=chosen", "mone:score=fusion", "naee"]
    cells = cells_of(asked, ["50%", "0.5", "10%"])
    assert [str(cell.budget) for cell in cells] == sorted(str(cell.budget) for cell in cells)
    assert {str(cell.budget) for cell in cells} == {"remove 10%", "remove 50%"}
    half = [cell for cell in cells if str(cell.budget) == "remove 50%"]
    assert [cell.method.name for cell in half].count("mone") == 1
    assert len(half) == len(found) + 2
    assert {cell.method.parameters["rank"] for cell in half if cell.method.name == "linear"} == {4, 8}


def test_all_has_bits_alone_and_composed_where_sizes_are_asked_for() -> None:
    plain = {cell.method.name for cell in cells_of(["all"], ["25%"])}
    cells = cells_of(["all"], sizes=["60%", "40%"])
    assert [cell.name for cell in cells if not cell.method.removes] == [
        *(f"{number} bits" for number in (8, 6, 5, 4, 3, 2)),
        *("4 bits nearest", "3 bits nearest", "4 bits g32 sym", "4 bits vq", "3 bits vq", "2 bits vq"),
    ]
    for size in ("size 60%", "size 40%"):
        here = [cell for cell in cells if str(cell.budget) == size]
        assert {cell.method.name for cell in here if cell.width is None} == plain
        composed = {cell.name for cell in here if cell.width is not None}
        assert composed == {f"{name} + {number} bits" for name in ("reap", "mone") for number in (3, 4)}
    assert len({cell.file for cell in cells}) == len(cells)


def test_words_of_rows() -> None:
    (cell,) = cells_of(["mone:score=exact:novice=optimal@4/6"], ["25%"])
    assert (cell.name, cell.width) == ("mone:score=exact:novice=optimal + 4/6 bits", moetailor.Width(bits=4, down=6))
    # The bits of what removes nothing are a parameter of its own; that of another method is not meant.
    same = cells_of(["quantize@3/5", "quantize:bits=3:down=5", "QUANTIZE:down=5@3/5"], ["25%", "50%"])
    assert [(cell.name, cell.width, str(cell.budget)) for cell in same] == [("3/5 bits", None, "remove 0%")]
    groups = cells_of(["reap@vq2g32", "reap@vq2", "reap@int4g64"], sizes=["50%"])
    names = ["reap + 2 bits, vq g32", "reap + 2 bits, vq", "reap + 4 bits, symmetric g64"]
    assert [(cell.name, cell.to_json()["bits"]) for cell in groups] == [
        (name, bits) for name, bits in zip(names, ("vq2g32", "vq2g128", "int4g64"), strict=True)
    ]
    (cell,) = cells_of(["auto:bits=true"], sizes=["12GB"])
    assert (cell.width, str(cell.budget), cell.method.parameters["bits"]) == (None, "size 12000000000 bytes", True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "mnoe"}, "--methods mnoe: no method 'mnoe'; did you mean 'mone'"),
        ({"methods": "linear:rank"}, "--methods linear:rank: write parameters as linear:parameter=value"),
        ({"methods": "linear,rank=4"}, "--methods rank=4: parameters follow their method with colons"),
        ({"methods": "reap@9"}, "--methods reap@9: write 2 to 8, or as 4/6 with those of the down projection"),
        ({"methods": "quantize@4/6:group=32"}, "write bits as quantize:group=32@4/6, last"),
        ({"methods": "linear:rank=2@"}, "--methods linear:rank=2@: write 2 to 8, or as 4/6"),
        ({"methods": "reap@vq9"}, "--methods reap@vq9: write 2 to 8, or as 4/6"),
        ({"methods": "reap@vq5"}, "--methods reap@vq5: vq5: codebooks have 1 to 4 bits of gate and up"),
        (
            {"methods": "quantize:codes=vq@uint4"},
            "--methods quantize:codes=vq@uint4: parameters say codes",
        ),
        ({"methods": "auto@4", "remove": None, "sizes": "40%"}, "--methods auto@4: auto says itself how experts lie"),
        ({"sizes": "40%"}, "--remove and --sizes: rows are of equal ratios or of equal bytes; give one of them"),
        ({"remove": None, "sizes": 0.4}, "--size 0.4: bytes are whole; did you mean 40%?"),
        ({"remove": None, "sizes": "140%"}, "--size 140%: must be above 0% and at most 100% of the original's bytes"),
        ({"remove": None, "sizes": []}, "nothing to compare; name at least one, such as --sizes 75%,50%,35%"),
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


def test_a_row_that_needs_sensitivities_is_measured_once_they_are_there(tmp_path: Path) -> None:
    """As its failure advises; of the rows that are there those stay that do not go by any."""
    asked = {"methods": "reap,refit,auto", "remove": "50%", "text": None, "calibration": tmp_path / "c"}
    moetailor.calibrate(REFERENCE, tmp_path / "c", text=TEXT)
    first = {cell["name"]: cell for cell in run(tmp_path / "out", **asked)["cells"]}
    assert {name for name, cell in first.items() if cell["error"]} == {"auto"}
    assert "calibrate again with --sensitivity" in first["auto"]["error"]
    moetailor.calibrate(REFERENCE, tmp_path / "c", text=TEXT, sensitivity=True)
    again = {cell["name"]: cell for cell in run(tmp_path / "out", **asked)["cells"]}
    assert again["reap"] == first["reap"]
    assert first["refit"]["expected_kl"] is None
    assert again["refit"]["expected_kl"] > 0
    assert again["auto"]["error"] is None
    assert again["auto"]["expected_kl"] > 0


def test_a_calibration_of_other_weights_is_refused(calibration: GetCalibration, tmp_path: Path) -> None:
    with pytest.raises(moetailor.MoetailorError, match="not the model that was calibrated"):
        run(tmp_path / "out", text=None, calibration=calibration("olmoe").folder)


def test_held_out_text_that_was_calibrated_on_is_told(tmp_path: Path) -> None:
    text = moetailor.TextOptions(data=HELD_OUT.data, sequences=2, length=64)
    with pytest.warns(moetailor.MoetailorWarning, match="held-out documents were calibrated on"):
        run(tmp_path / "out", methods="random", remove="25%", text=text)
