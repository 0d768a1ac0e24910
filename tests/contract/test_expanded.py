"""The expanded format: an ordinary checkpoint that says in stock transformers what our runtime says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Answer, Borrowed, Constant, Drop, Keep, LowRank, Remap, Width
from moetailor.checkpoint.files import open_checkpoint
from moetailor.planning.layer_plan import LayerPlan
from moetailor.transform.formats import FORMATS
from support.tiny import Get, GetCalibration, eager, families_in_turn, load, logits

FORMAT = "expanded"


def by_hand(calibration: moetailor.Calibration, *answers: Answer, width: Width | None = None) -> moetailor.Plan:
    """Return a plan with some answers behind the first slots of each layer, all else kept, perhaps in few bits."""
    plan = moetailor.make_plan(calibration, "conmoe", moetailor.Budget.parse(remove="25%"))
    layers = {}
    for stack in calibration.model.stacks:
        kept = (Keep(),) * (stack.num_experts - len(answers))
        layers[stack.prefix] = LayerPlan(slots=(*answers, *kept)).narrowed(width)
    return replace(plan, layers=layers)


def written(plan: moetailor.Plan, folder: Path, calibration: moetailor.Calibration, out: Path) -> tuple[Path, Path]:
    """Return the result in this format, and in moetailor's own."""
    given = {"calibration": calibration, "allow_other_weights": True}
    expanded = moetailor.apply(plan, folder, out / "expanded", format=FORMAT, **given)
    return expanded, moetailor.apply(plan, folder, out / "ours", format="moetailor", verify=False, **given)


@families_in_turn(0)
def test_remaps_have_experts_of_their_own_again(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """Of the original's names, shapes and bytes, with what answers in the place of what went."""
    plan, folder = by_hand(calibration(name), Remap(3, 0.5), Remap(2)), checkpoint(name)
    expanded, ours = written(plan, folder, calibration(name), tmp_path)
    before, after = open_checkpoint(folder), open_checkpoint(expanded)
    assert {key: (info.dtype, info.shape) for key, info in after.tensors.items()} == {
        key: (info.dtype, info.shape) for key, info in before.tensors.items()
    }
    told = json.loads((expanded / "moetailor_provenance.json").read_text())["bytes"]
    assert told["compressed"] == after.nbytes == before.nbytes
    assert {**json.loads((expanded / "config.json").read_text())} == json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(logits(load(expanded)), logits(load(ours)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("bits", ["4/6", "vq2", "fp8"])
def test_few_bits_become_numbers(
    name: str, bits: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = moetailor.make_plan(calibration(name), "reap", moetailor.Budget.parse(remove="25%"), width=Width.parse(bits))
    expanded, ours = written(plan, checkpoint(name), calibration(name), tmp_path)
    torch.testing.assert_close(logits(load(expanded)), logits(load(ours)), rtol=1e-4, atol=1e-5)
    assert open_checkpoint(expanded).nbytes < open_checkpoint(checkpoint(name)).nbytes


@pytest.mark.parametrize("method", ["lightmoe", "mergemoe", "ream"])
def test_bases_and_merged_experts(method: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    given = {"rank": 1, "bases": 1} if method == "lightmoe" else {}
    plan = moetailor.make_plan(calibration("olmoe"), method, moetailor.Budget.parse(keep=6), parameters=given)
    if method == "lightmoe":
        assert any(isinstance(answer, LowRank) and answer.rank for answer in next(iter(plan.layers.values())).slots)
    expanded, ours = written(plan, checkpoint("olmoe"), calibration("olmoe"), tmp_path)
    torch.testing.assert_close(logits(load(expanded)), logits(load(ours)), rtol=1e-4, atol=1e-5)


def test_experts_of_other_layers_and_one_layer_alone(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    measured = calibration("olmoe")
    plan = by_hand(measured, Borrowed(layer=1, source=4, scale=0.25), Keep())
    first, second = plan.layers
    slots = {first: plan.layers[first], second: replace(plan.layers[second], slots=(Keep(), Remap(5), *[Keep()] * 6))}
    expanded, ours = written(replace(plan, layers=slots), checkpoint("olmoe"), measured, tmp_path)
    torch.testing.assert_close(logits(eager(load(expanded))), logits(load(ours)), rtol=1e-4, atol=1e-5)
    alone = replace(plan, layers={first: slots[first]})
    expanded, ours = written(alone, checkpoint("olmoe"), measured, tmp_path / "alone")
    torch.testing.assert_close(logits(load(expanded)), logits(load(ours)), rtol=1e-4, atol=1e-5)


def test_what_no_expert_gives_is_refused(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    measured, refusal = calibration("olmoe"), FORMATS[FORMAT].refusal
    constant = by_hand(measured, Constant())
    assert refusal(constant) == (
        "gives each slot an expert of its own; no expert gives what slot 0 of model.layers.0 does (constant)"
    )
    dropped = by_hand(measured, Drop())
    uneven = replace(dropped, layers=dict([next(iter(dropped.layers.items()))]))
    assert refusal(dropped) is None
    mone = moetailor.make_plan(measured, "mone", moetailor.Budget.parse(remove="25%"))
    assert refusal(uneven) == "has one number of slots for all layers; this plan leaves [7, 8]"
    with pytest.raises(
        moetailor.PlanError, match=r"^format expanded gives each slot .*; format moetailor can hold it$"
    ):
        moetailor.apply(mone, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format=FORMAT)
    assert not (tmp_path / "out").exists()
    assert not FORMATS[FORMAT].automatic
