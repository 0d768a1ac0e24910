"""A checkpoint whose layers, and whose matrices in a layer, are stored in different dtypes."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moetailor
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError, PlanError
from moetailor.methods.estimate import estimate_plan
from moetailor.methods.registry import find_method
from moetailor.planning.budget import Budget
from support.families import tiny_model
from support.tiny import token_batches

FAMILIES = ("olmoe", "gpt_oss")


def mixed_dtype(name: str) -> torch.dtype:
    """Return the dtype of a tensor: all routers are wide, and in layer 1 the gate and up projections."""
    wide = re.search(r"mlp\.(gate|router)\.|layers\.1\..*(gate|up)_proj", name)
    return torch.float32 if wide else torch.bfloat16


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], moetailor.Calibration]:
    made: dict[str, moetailor.Calibration] = {}

    def get(family: str) -> moetailor.Calibration:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            with quiet_transformers():
                tiny_model(family).save_pretrained(folder / "original")
            file = folder / "original" / "model.safetensors"
            save_file({k: t.to(mixed_dtype(k)) for k, t in load_file(file).items()}, file, {"format": "pt"})
            made[family] = moetailor.calibrate(folder / "original", folder / "calibration", text=token_batches())
        return made[family]

    return get


@pytest.mark.parametrize("method", ["mergemoe", "refit", "hc_smoe", "mone", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_expert_has_the_dtypes_of_the_one_it_replaces(
    family: str, method: str, mixed: Callable[[str], moetailor.Calibration], tmp_path: Path
) -> None:
    calibration = mixed(family)
    plan = moetailor.make_plan(calibration, method, Budget.parse(keep=5))
    out = moetailor.apply(plan, calibration.model.source, tmp_path / "out", calibration=calibration)
    tensors = load_file(out / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.nbytes
    original = load_file(Path(calibration.model.source) / "model.safetensors")
    kept = {name: tensor.dtype for name, tensor in tensors.items() if name in original}
    assert kept == {name: mixed_dtype(name) for name in kept}
    assert {torch.float32, torch.bfloat16} == {dtype for name, dtype in kept.items() if "layers.1.mlp.experts" in name}


@pytest.mark.parametrize("load_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_budget_of_memory_is_exceeded(
    family: str, load_dtype: str, mixed: Callable[[str], moetailor.Calibration]
) -> None:
    """Counted in numbers: those of the original, less those of the experts that go and of their routers' rows."""
    facts, width = mixed(family).model, getattr(torch, load_dtype).itemsize
    original = {k: t.numel() for k, t in load_file(Path(facts.source) / "model.safetensors").items()}
    expert = sum(count for name, count in original.items() if "layers.0.mlp.experts" in name) // 8
    router = sum(count for name, count in original.items() if re.search(r"layers\.0\.mlp\.(gate|router)\.", name)) // 8
    most, met = sum(original.values()), set()
    for share in range(60, 100):
        memory = most * width * share // 100
        try:
            plan = estimate_plan(facts, find_method("reap").of({}), Budget.parse(memory=memory, load_dtype=load_dtype))
        except PlanError as error:
            assert "ask for at least that" in str(error)  # noqa: PT017 (the least shares are)
            continue
        gone = sum(8 - len(layer.pool) for layer in plan.layers.values())
        assert (most - gone * (expert + router)) * width <= memory
        met.add(gone)
    assert len(met) > 2


def test_one_expert_in_another_dtype_is_refused_as_that(tmp_path: Path) -> None:
    with quiet_transformers():
        tiny_model("olmoe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expert 3 of model\.layers\.1 has .* save them all in one dtype"):
        Original(tmp_path).facts  # noqa: B018
