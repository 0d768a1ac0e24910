"""What `inspect` says of a compressed result, against a count over its tensors and config by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import moetailor
from moetailor.checkpoint.files import open_checkpoint
from moetailor.summary import summarise
from support.methods import TINY_PARAMETERS

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
# Bases and whole experts are what a slot runs; these stand in for experts or modulate them.
WHOLE = ("gate_proj", "up_proj", "down_proj", "base_")


@pytest.mark.parametrize("method", ["reap", "mone", "linear", "lightmoe", "compressed_experts", "conmoe", "camera"])
def test_a_token_uses_what_its_slots_run_and_a_mean_of_what_stands_in(
    method: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    made = calibration("olmoe")
    given = dict(TINY_PARAMETERS.get(method, {})) | ({"rank": 2} if method == "compressed_experts" else {})
    plan = moetailor.make_plan(made, method, moetailor.Budget.parse(keep=5), parameters=given)
    moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=made)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = config.get("quantization_config", {}).get("layers", {})
    expert = 3 * config["hidden_size"] * config["intermediate_size"]  # of narrow ones, too
    uses = 0
    for name, info in open_checkpoint(tmp_path / "out").tensors.items():
        numbers = info.nbytes // 4
        part = name.partition(".mlp.experts.")[2]
        if not part:
            uses += numbers
        elif not any(word in part for word in WHOLE):
            # The router picks top-k of the slots of a layer.
            entry = layers[name.split(".")[2]]
            aside = config["num_experts_per_tok"] - (entry["auxiliary"][0]["main"] if "auxiliary" in entry else 0)
            uses += aside * numbers // len(entry["rows"])
    for layer in range(2):
        split = layers.get(str(layer), {}).get("auxiliary")
        uses += expert * (split[0]["main"] if split else config["num_experts_per_tok"])
    found = summarise(tmp_path / "out")
    assert found.active_parameters == pytest.approx(uses, abs=len(layers) * 8)
    assert found.parameters == sum(info.nbytes // 4 for info in open_checkpoint(tmp_path / "out").tensors.values())


def test_narrow_experts_count_alike_in_both_forms(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    made = calibration("olmoe")
    plan = moetailor.make_plan(made, "camera", moetailor.Budget.parse(remove="50%"))
    own, ordinary = (
        summarise(moetailor.apply(plan, checkpoint("olmoe"), tmp_path / form, calibration=made, format=form))
        for form in ("moetailor", "narrow")
    )
    for name in ("parameters", "routed_parameters", "active_parameters", "nbytes"):
        assert getattr(own, name) == getattr(ordinary, name)
    assert [moe.expert_bytes for moe in own.moe] == [moe.expert_bytes for moe in ordinary.moe]
    whole = summarise(checkpoint("olmoe"))
    assert [2 * moe.expert_bytes for moe in own.moe] == [moe.expert_bytes for moe in whole.moe]
