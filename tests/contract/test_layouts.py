"""However experts lie on disk, one by one or fused, in layers that run and in those that do not: one result."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.checkpoint.folder import SINGLE
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError
from support.families import tiny_model
from support.tiny import token_batches

Get = Callable[[str], Any]
BUDGET = moetailor.Budget.parse(remove=0.25)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Return the folder of a family's tiny checkpoint whose experts lie on disk as they do in memory."""

    def get(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "fused"
        with quiet_transformers():
            tiny_model(name).save_pretrained(folder, save_original_format=False)
        return folder

    return get


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_batches()[0].input_ids).logits


def load(folder: Path) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Renamed and merged matrices, biases of experts, two matrices, groups.
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "nemotron_h", "deepseek_v3"])
def test_fused_experts_are_cut_and_fitted_as_in_memory(
    family: str, fused: Get, checkpoint: Get, tmp_path: Path
) -> None:
    folder = fused(family)
    assert load_file(folder / SINGLE).keys() != load_file(checkpoint(family) / SINGLE).keys()
    measured = moetailor.calibrate(folder, tmp_path / "c", text=token_batches())
    for method in ("reap", "refit", "mergemoe", "mone"):
        plan = moetailor.make_plan(measured, method, BUDGET)
        out = moetailor.apply(plan, folder, tmp_path / method, calibration=measured)
        in_memory = moetailor.apply(plan, load(folder), calibration=measured)
        torch.testing.assert_close(logits(load(out)), logits(in_memory), rtol=1e-5, atol=1e-5)


# Layers that the model does not run


def mtp(layout: str, experts: int, width: int = 32, inner: int = 24) -> dict[str, torch.Tensor]:
    """Return a layer for the prediction of further tokens whose expert e holds nothing but e + 1."""
    values = torch.arange(1.0, experts + 1)
    layer = {"mtp.layers.0.mlp.gate.weight": values[:, None].expand(experts, width).contiguous()}
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    if layout == "fused":
        for name, shape in (("gate_up_proj", (2 * inner, width)), ("down_proj", (width, inner))):
            layer[f"mtp.layers.0.mlp.experts.{name}"] = values[:, None, None].expand(experts, *shape).contiguous()
        return layer
    for expert in range(experts):
        for name, shape in shapes.items():
            layer[f"mtp.layers.0.mlp.experts.{expert}.{name}.weight"] = torch.full(shape, expert + 1.0)
    return layer


@pytest.mark.parametrize("beside", ["fused", "one by one"])
@pytest.mark.parametrize("layout", ["fused", "one by one"])
def test_layers_that_do_not_run_are_cut_however_they_lie(
    layout: str, beside: str, fused: Get, checkpoint: Get, tmp_path: Path
) -> None:
    source = fused("qwen3_moe") if beside == "fused" else checkpoint("qwen3_moe")
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / SINGLE) | mtp(layout, 12), folder / SINGLE, {"format": "pt"})
    measured = moetailor.calibrate(folder, tmp_path / "c", text=token_batches())
    plan = moetailor.make_plan(measured, "reap", BUDGET, weights=moetailor.ExpertWeights(folder))
    native = load_file(moetailor.apply(plan, folder, tmp_path / "native") / SINGLE)
    # The nine with the largest weights stay: experts 3 to 11, which hold 4 to 12.
    kept = torch.arange(4.0, 13.0)
    assert torch.equal(native["mtp.layers.0.mlp.gate.weight"][:, 0], kept)
    if layout == "fused":
        assert torch.equal(native["mtp.layers.0.mlp.experts.down_proj"][:, 0, 0], kept)
    else:
        found = {name: tensor for name, tensor in native.items() if re.match(r"mtp\..*experts\.\d+\.down_proj", name)}
        numbers = {int(name.split(".")[5]): float(tensor[0, 0]) for name, tensor in found.items()}
        assert numbers == dict(enumerate(kept.tolist()))
    # As large as it may be written, a result has the same in each slot that stays.
    if beside == "one by one":  # as transformers' rules write them
        expanded = load_file(moetailor.apply(plan, folder, tmp_path / "expanded", format="expanded") / SINGLE)
        assert expanded.keys() == native.keys()
        assert all(torch.equal(expanded[name], tensor) for name, tensor in native.items())
    plan = moetailor.make_plan(measured, "mone", BUDGET, weights=moetailor.ExpertWeights(folder))
    whole = load_file(moetailor.apply(plan, folder, tmp_path / "whole", calibration=measured) / SINGLE)
    assert all(torch.equal(whole[name], tensor) for name, tensor in mtp(layout, 12).items())


@pytest.mark.parametrize("layout", ["fused", "one by one"])
def test_layers_that_do_not_run_and_have_other_experts_are_refused(layout: str, fused: Get) -> None:
    folder = fused("qwen3_moe")
    save_file(load_file(folder / SINGLE) | mtp(layout, 10), folder / SINGLE, {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"json: layers have 12 experts, but 'mtp\.layers\.0\.mlp.*\[10, .* one row for each",
    ):
        _ = Original(folder).facts
