"""What is new in one of the axes is one file: answer, storage and format go the whole way unknown to any other."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import ANSWERS
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.checkpoint.storage import STORAGES
from moetailor.checkpoint.storage.storage import register_storage
from moetailor.comparison.results import letters
from moetailor.methods.method import Method
from moetailor.methods.registry import METHODS, register
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView
from moetailor.recovery.examples import Blocks
from moetailor.report.maps import slots as draw_slots
from moetailor.summary import summarise
from moetailor.transform.formats import FORMATS
from moetailor.transform.formats.format import register_format
from moetailor_cli.app import main
from support.families import tiny_model
from support.tiny import IDS, Get, GetCalibration, eager, load, logits

STORED = {"plain": 4 * 32 * 2, "rows8": 32 * 2 + 4 * 2}
"""Bytes of two weights of 32 numbers, by storage."""


@pytest.fixture
def toys() -> Iterator[None]:
    """Give the new kinds while a test lasts, with a method that plans and computes the answer."""
    from support.toys import diagonal, rows8, single

    ANSWERS["diagonal"] = diagonal.Diagonal  # registered once, when the file is imported
    register_storage(rows8.Rows8())
    register_format(single.Single())

    @register
    @dataclass(frozen=True, kw_only=True)
    class Toy(Method):
        """Replace the last experts by diagonal maps."""

        storage: str = "plain"

        name = "toy"
        replaces_with = diagonal.Diagonal
        builds = frozenset({"diagonal"})

        def plan(self, layer: LayerView, keep: int) -> LayerPlan:
            return keep_only(layer.num_experts, range(keep), diagonal.Diagonal(self.storage))

        def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
            where = list(plan.of(diagonal.Diagonal))
            generator = torch.Generator().manual_seed(layer.index)
            weight, bias = torch.randn(2, len(where), layer.shape.width, generator=generator)
            return {"diagonal_weight": weight, "diagonal_bias": bias}

    yield
    del ANSWERS["diagonal"], STORAGES["rows8"], FORMATS["single"], METHODS["toy"]


def planned(calibration: moetailor.Calibration, storage: str) -> moetailor.Plan:
    budget = moetailor.Budget.parse(keep=6)
    return moetailor.make_plan(calibration, "toy", budget, parameters={"storage": storage})


@pytest.mark.parametrize("storage", ["plain", "rows8"])
@pytest.mark.usefixtures("toys")
def test_an_answer_and_a_storage_go_the_whole_way(
    storage: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = planned(calibration("olmoe"), storage)
    facts, bias = plan.model, 4 * 32 * 2
    per_layer = 2 * facts.stacks[0].expert_bytes - STORED[storage] - bias
    assert plan.nbytes == facts.nbytes - per_layer * len(facts.stacks)
    plan.save(tmp_path / "plan.json")
    entry = json.loads((tmp_path / "plan.json").read_text())["layers"][facts.stacks[0].prefix]
    assert entry["diagonal"] == ([6, 7] if storage == "plain" else [{"storage": "rows8", "slots": [6, 7]}])
    assert moetailor.Plan.load(tmp_path / "plan.json") == plan

    out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe"))
    assert open_checkpoint(out).nbytes == plan.nbytes
    in_memory = eager(moetailor.apply(plan, load(checkpoint("olmoe")), calibration=calibration("olmoe")))
    expected = logits(in_memory)
    assert not torch.allclose(expected, logits(load(checkpoint("olmoe"))))
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-5, atol=1e-5)
    with quiet_transformers():
        load(out).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=1e-5, atol=1e-5)
    (layer,) = {(moe.slots, moe.experts, moe.stand_ins) for moe in summarise(out).moe}
    assert layer == (8, 6, 2)


@pytest.mark.usefixtures("toys")
def test_what_runs_is_what_the_answer_says(checkpoint: Get, calibration: GetCalibration) -> None:
    plan = planned(calibration("olmoe"), "plain")
    original, changed = load(checkpoint("olmoe")), load(checkpoint("olmoe"))
    moetailor.apply(plan, changed, calibration=calibration("olmoe"))
    before, after = (model.model.layers[0].mlp.experts for model in (original, changed))
    x, gates = torch.randn(3, 32), torch.rand(3, 2)
    weight, bias = after.diagonal_weight, after.diagonal_bias
    with torch.no_grad():
        got = after(x, torch.tensor([[0, 6], [7, 6], [7, 5]]), gates)
        expected = torch.stack(
            [
                before(x[:1], torch.tensor([[0]]), gates[:1, :1])[0] + gates[0, 1] * (weight[0] * x[0] + bias[0]),
                gates[1, 0] * (weight[1] * x[1] + bias[1]) + gates[1, 1] * (weight[0] * x[1] + bias[0]),
                gates[2, 0] * (weight[1] * x[2] + bias[1]) + before(x[2:], torch.tensor([[5]]), gates[2:, 1:])[0],
            ]
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("toys")
def test_it_is_shown_and_drawn(
    calibration: GetCalibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(calibration("olmoe"), "rows8")
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr(sys, "argv", ["moetailor", "show", str(tmp_path / "plan.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "/ diagonal map 4" in shown
    assert "######//" in shown
    assert "diagonal, rows8: 6-7" in shown
    (layer,) = set(plan.layers.values())
    cell = {"name": "toy", "layers": {"0": {"slots": letters(layer)}}}
    usage = {"0": {"": [1 / 8] * 8}}
    assert "svg" in draw_slots([cell], usage, "maps")


@pytest.mark.usefixtures("toys")
def test_it_trains_where_its_storage_does(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    ids = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(3))
    options = moetailor.RecoveryOptions(steps=2, batch_size=2, lr=1e-2)
    for storage, trained in (("plain", {"weight", "bias"}), ("rows8", {"bias"})):
        plan = planned(calibration("olmoe"), storage)
        out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / storage, calibration=calibration("olmoe"))
        given = {"examples": Blocks(ids, ids), "train": ["standins"], "loss": "task", "options": options}
        moetailor.recover(out, tmp_path / f"{storage}-trained", **given)
        before, after = open_checkpoint(out).tensors, open_checkpoint(tmp_path / f"{storage}-trained").tensors
        moved = {name for name in before if not torch.equal(before[name].read(), after[name].read())}
        assert {name.rpartition("diagonal_")[2] for name in moved} == trained


@pytest.mark.usefixtures("toys")
def test_a_format_is_asked_for_by_name(calibration: GetCalibration, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    with quiet_transformers():
        tiny_model("olmoe").save_pretrained(source, max_shard_size="20KB")
    assert len(open_checkpoint(source).shards) > 1
    made = moetailor.calibrate(source, tmp_path / "c", text=[moetailor.Batch.of(IDS)])
    plan = moetailor.make_plan(made, "reap", moetailor.Budget.parse(keep=6))
    out = moetailor.apply(plan, source, tmp_path / "out", format="single")
    assert [file.name for file in open_checkpoint(out).shards] == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text())["written_as"] == "single"
    assert "Format: single. One file, for engines that know no shards." in (out / "README.md").read_text()
    in_memory = moetailor.apply(plan, load(source))
    torch.testing.assert_close(logits(load(out)), logits(in_memory), rtol=1e-5, atol=1e-5)
    uneven = replace(plan, layers={name: layer for name, layer in list(plan.layers.items())[:1]})
    with pytest.raises(
        moetailor.PlanError, match=r"format single holds dropped slots only.*; format moetailor can hold it"
    ):
        moetailor.apply(uneven, source, tmp_path / "uneven", format="single")
    with pytest.raises(moetailor.PlanError, match="unknown format 'singel'; did you mean 'single'"):
        moetailor.apply(plan, source, tmp_path / "none", format="singel")


def test_without_them_nothing_is_known_of_them() -> None:
    assert not {"diagonal", "rows8", "single", "toy"} & {*ANSWERS, *STORAGES, *FORMATS, *METHODS}
    with pytest.raises(moetailor.PlanError, match=r"unknown keys \['diagonal'\]"):
        LayerPlan.from_json({"experts": 2, "keep": [0], "diagonal": [1]}, "plan.json")
