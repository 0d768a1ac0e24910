"""Narrow experts on every family: the original with other neurons masked, and ordinary where a config says it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Drop, Narrow
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.evaluation.fidelity import Reference
from moetailor.planning.checks import check_plan
from moetailor.planning.layer_plan import LayerPlan
from moetailor.transform.formats import resolve_format
from support.tiny import Get, GetCalibration, anatomy_of, eager, families_in_turn, load, logits, token_batches

# Families whose config has one entry for the width of experts and that of other matrices, with a word of theirs.
SHARED = dict.fromkeys(
    (
        "afmoe aria_text axk1 axk2 bailing_hybrid cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe "
        "exaone_moe glm4_moe glm4_moe_lite hunyuan_v1_moe hy_v3 kimi_linear solar_open"
    ).split(),
    "shared_",
) | {"jamba": "feed_forward"}


def narrow_plan(calibration: moetailor.Calibration, **parameters: object) -> moetailor.Plan:
    experts = calibration.model.stacks[0].num_experts
    parameters = {"multiple": 1, **parameters}
    return moetailor.make_plan(calibration, "camera", moetailor.Budget.parse(keep=experts // 2), parameters=parameters)


def masked(original: torch.nn.Module, compressed: torch.nn.Module) -> torch.nn.Module:
    """Return the original with zeros for the columns of down projections that the narrow experts do not have."""
    for layer in anatomy_of(original).layers.values():
        module, narrow = original.get_submodule(layer.experts), compressed.get_submodule(layer.experts).narrow_down
        for expert in range(layer.num_experts):
            matrices = Experts(module).expert(expert)
            alike = (matrices["down"][:, :, None] == narrow[expert][:, None]).all(0).any(1)
            assert int(alike.sum()) == narrow.shape[2]
            packed = Experts(module).packed(
                {n: m[None] for n, m in (matrices | {"down": matrices["down"] * alike}).items()}
            )
            module.down_proj.data[expert] = packed["down_proj"][0]
    return original


@families_in_turn(1)
def test_narrow_experts_are_the_original_with_neurons_masked_in_every_form(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = narrow_plan(calibration(name))
    compressed = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    expected = logits(compressed)
    torch.testing.assert_close(
        logits(masked(eager(load(checkpoint(name))), compressed)), expected, rtol=1e-4, atol=1e-5
    )
    given = {"calibration": calibration(name)}
    out = moetailor.apply(plan, checkpoint(name), tmp_path / "own", format="moetailor", verify=False, **given)
    assert open_checkpoint(out).nbytes == plan.nbytes
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=1e-5)
    form = resolve_format(plan, "auto", Original(checkpoint(name))).name
    assert form == ("moetailor" if name in SHARED else "narrow")
    if name in SHARED:
        with pytest.raises(moetailor.PlanError, match=f"format narrow .*{SHARED[name]}.*; format moetailor can"):
            moetailor.apply(plan, checkpoint(name), tmp_path / "out", format="narrow", **given)
        return
    out = moetailor.apply(plan, checkpoint(name), tmp_path / "out", **given)
    assert open_checkpoint(out).nbytes == plan.nbytes
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint(name), out))
    (changed,) = {key for key in after if after[key] != before.get(key)}
    assert before.get(changed, after[changed]) == 2 * after[changed] or changed not in before
    assert open_checkpoint(out).tensors.keys() == open_checkpoint(checkpoint(name)).tensors.keys()
    torch.testing.assert_close(logits(eager(load(out))), expected, rtol=1e-4, atol=1e-5)


@families_in_turn(2)
def test_narrow_experts_beside_dropped_slots_are_ordinary_too(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan, given = narrow_plan(calibration(name)), {"calibration": calibration(name)}
    groups = plan.model.groups.count
    layers = {}
    for prefix, layer in plan.layers.items():
        each = len(layer.slots) // groups
        slots = (Drop() if slot % each == each - 1 else answer for slot, answer in enumerate(layer.slots))
        layers[prefix] = LayerPlan(slots=tuple(slots))
    fewer = replace(plan, layers=layers)
    check_plan(fewer, plan.model)
    expected = logits(eager(moetailor.apply(fewer, load(checkpoint(name)), **given)))
    form = resolve_format(fewer, "auto", Original(checkpoint(name))).name
    assert form == ("moetailor" if name in SHARED else "narrow")
    asked = "auto" if name in SHARED else "native"
    out = moetailor.apply(fewer, checkpoint(name), tmp_path / "out", format=asked, **given)
    assert open_checkpoint(out).nbytes == fewer.nbytes < plan.nbytes
    torch.testing.assert_close(logits(eager(load(out))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "olmoe"])
def test_written_out_in_full_they_have_neurons_that_give_nothing(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan, given = narrow_plan(calibration(name)), {"calibration": calibration(name)}
    out = moetailor.apply(plan, checkpoint(name), tmp_path / "out", format="expanded", **given)
    assert open_checkpoint(out).nbytes == plan.model.nbytes
    compressed = moetailor.apply(plan, load(checkpoint(name)), **given)
    torch.testing.assert_close(logits(eager(load(out))), logits(eager(compressed)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "granitemoe"])
def test_rows_that_grouped_products_do_not_take_run_one_by_one(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """As transformers loads them, not as tests do: five neurons in float32 are 20 bytes, and whole rows are 16."""
    plan, given = narrow_plan(calibration(name)), {"calibration": calibration(name)}
    layers = {p: replace(layer, slots=(Narrow(5),) * len(layer.slots)) for p, layer in plan.layers.items()}
    plan = replace(plan, layers=layers)
    with pytest.warns(
        moetailor.MoetailorWarning, match=r"5 neurons are no multiple of 8.*experts_implementation='eager'"
    ):
        out = moetailor.apply(plan, checkpoint(name), tmp_path / "out", format="narrow", **given)
    result, original, kl = Original(out, takes="results"), Original(checkpoint(name)), {}
    found = logits(result.load(dtype=torch.float32, device="cpu"))
    torch.testing.assert_close(found, logits(eager(load(out))))
    for way in ("load", "streamed"):
        before, after = (getattr(each, way)(dtype=torch.float32, device="cpu") for each in (original, result))
        kl[way] = Reference(tmp_path / way, token_batches(2)).record(before).compare(after, before)[""].kl.mean
    assert kl["streamed"] == pytest.approx(kl["load"], rel=1e-4)
    # Whole rows run as transformers has them.
    wide = original.load(dtype=torch.float32, device="cpu")
    assert wide.config._experts_implementation == "grouped_mm"
