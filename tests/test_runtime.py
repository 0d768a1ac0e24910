"""The compressed experts module: what it runs, what it does not, and what people do with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moefit
from contract.test_families import IDS, eager, load, logits, mixed_plan
from families import tiny_model
from moefit.checkpoint.anatomy import discover
from moefit.planning.slots import LayerPlan, Slot
from moefit.runtime.experts import Change, reshape_model

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moefit.Calibration]


def compressed_experts(slots: list[Slot], name: str = "olmoe") -> tuple[nn.Module, nn.Module]:
    """Return the first experts module of a tiny model, original and with these slots."""
    model, original = eager(tiny_model(name)), eager(tiny_model(name))
    anatomy = discover(model.config, model)
    plan, layer = LayerPlan(slots=tuple(slots)), next(iter(anatomy.layers.values()))
    change = Change(experts=plan.pool, slots=plan.kept_slots, slot_map=plan.slot_map())
    reshape_model(model, anatomy, {layer.index: change})
    module = model.get_submodule(layer.experts)
    if module.constant is not None:
        nn.init.normal_(module.constant)
    return original.get_submodule(layer.experts), module


def count_rows(module: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Run a module and count the rows that reach its down projection."""
    rows, original = 0, nn.functional.linear

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal rows
        rows += len(x) * (weight.shape[1] == 16)  # the expert width
        return original(x, weight, bias)

    nn.functional.linear = counting
    try:
        with torch.no_grad():
            return module(*inputs), rows
    finally:
        nn.functional.linear = original


OWN = [Slot("expert", number) for number in range(8)]


def test_slots_that_share_an_expert_run_it_once_for_a_token() -> None:
    original, module = compressed_experts([*OWN[:6], Slot("expert", 0), Slot("expert", 0)])
    x = torch.randn(5, 32)
    shared = torch.tensor([[0, 6], [6, 7], [0, 7], [1, 2], [7, 3]])
    gates = torch.rand(5, 2)
    out, rows = count_rows(module, x, shared, gates)
    assert rows == 7  # three tokens with one row, two with two
    answers = torch.where(shared >= 6, 0, shared)
    torch.testing.assert_close(out, original(x, answers, gates), rtol=1e-5, atol=1e-6)


def test_constants_cost_no_matrix_product() -> None:
    _, module = compressed_experts([*OWN[:6], Slot("constant"), Slot("constant")])
    x, gates = torch.randn(3, 32), torch.rand(3, 2)
    out, rows = count_rows(module, x, torch.tensor([[6, 7], [7, 6], [6, 6]]), gates)
    assert rows == 0
    expected = gates[:, :1] * module.constant[[0, 1, 0]] + gates[:, 1:] * module.constant[[1, 0, 0]]
    torch.testing.assert_close(out, expected)


def test_scales_multiply_gates() -> None:
    original, module = compressed_experts([*OWN[:7], Slot("expert", 2, 0.25)])
    x, gates = torch.randn(2, 32), torch.rand(2, 2)
    out, _ = count_rows(module, x, torch.tensor([[7, 1], [2, 7]]), gates)
    scaled = gates * torch.tensor([[0.25, 1], [1, 0.25]])
    torch.testing.assert_close(out, original(x, torch.tensor([[2, 1], [2, 2]]), scaled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_reach_experts_constants_and_gates(implementation: str) -> None:
    _, module = compressed_experts([*OWN[:6], Slot("constant"), Slot("expert", 0)])
    module.config._experts_implementation = implementation
    gates = torch.rand(4, 2, requires_grad=True)
    index = torch.tensor([[0, 6], [6, 7], [1, 0], [7, 0]])
    module(torch.randn(4, 32), index, gates).square().sum().backward()
    assert (gates.grad != 0).all()
    assert (module.constant.grad != 0).any()
    touched = module.down_proj.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_low_precision_is_no_worse_than_the_original_family(implementation: str) -> None:
    """Error budget: ours in bfloat16 against float32 truth is at most that of the family's own code plus a little."""
    slots = [*OWN[:6], Slot("expert", 1), Slot("expert", 2)]
    original, module = compressed_experts(slots)
    original.config._experts_implementation = module.config._experts_implementation = implementation
    x, index, gates = torch.randn(64, 32), torch.randint(0, 8, (64, 2)), torch.rand(64, 2)
    answers = torch.tensor([slot.expert for slot in slots])[index]
    truth = original(x, answers, gates)
    naive = (original.bfloat16()(x.bfloat16(), answers, gates.bfloat16()).float() - truth).norm()
    ours = (module.bfloat16()(x.bfloat16(), index, gates.bfloat16()).float() - truth).norm()
    assert ours <= 1.1 * naive


def test_generate_and_save_in_bfloat16(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    plan = mixed_plan(calibration("qwen2_moe"), drop=False)
    out = moefit.apply(plan, checkpoint("qwen2_moe"), tmp_path / "out", calibration=calibration("qwen2_moe"))
    model = load(out)
    text = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    # with a cache or without, the same words
    again = IDS
    for _ in range(4):
        again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, again)
    half = type(model).from_pretrained(out, dtype=torch.bfloat16)
    maps = [module.slot_map.dtype for module in half.modules() if hasattr(module, "slot_map")]
    assert maps
    assert set(maps) == {torch.int32}


def test_adapters_attach_and_train(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plan = mixed_plan(calibration("olmoe"), drop=True)
    model = load(moefit.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe")))
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    torch.testing.assert_close(logits(adapted), before)
    adapted(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_a_newer_format_is_refused(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    import json

    plan = mixed_plan(calibration("olmoe"), drop=False)
    out = moefit.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(moefit.CheckpointError, match="moefit format 2, this moefit reads up to 1"):
        load(out)
