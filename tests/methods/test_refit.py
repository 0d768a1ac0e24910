"""Refit: what is left against the model with masked routers, fits against plain normal equations, never worse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moetailor
from moetailor.answers import Drop, Fitted, Keep, Narrow
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.files import open_checkpoint
from moetailor.fitting.least_squares import RIDGES
from moetailor.methods.refit import Refit, _ways
from moetailor.methods.refitted import fitted_down, missing_output
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.transform.formats import resolve_format
from support.families import tiny_model
from support.hand import layer_of, sums_of
from support.naive import masked_outputs
from support.tiny import anatomy_of, logits, token_batches, view
from support.tiny import load as load_tiny

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def fitting(experts: int, dropped: list[int]) -> LayerPlan:
    slots = [Drop() if number in dropped else Fitted() for number in range(experts)]
    return LayerPlan(slots=tuple(slots))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_what_is_left_is_the_output_that_the_masked_model_lacks(
    family: str, checkpoint: Get, calibration: GetCalibration
) -> None:
    layer = view(calibration(family))
    dropped = list(range(1, layer.num_experts, layer.num_experts // layer.groups))
    gates, missing = missing_output(layer, fitting(layer.num_experts, dropped))
    whole, masked = (masked_outputs(checkpoint(family), some)[0] for some in ([], dropped))
    assert not bool(gates[:, dropped].any())
    # the sample lies in the order of its keys: compare as sets of rows
    mix = torch.arange(1.0, missing.shape[1] + 1)
    mine, theirs = (rows[torch.argsort(rows @ mix)] for rows in (missing, (whole - masked).flatten(0, -2)))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_fit_solves_the_normal_equations_at_the_strength_that_other_tokens_choose() -> None:
    generator = torch.Generator().manual_seed(0)
    token, features = torch.arange(160), torch.randn(160, 3, generator=generator)
    truth, original = torch.randn(2, 2, 3, generator=generator)
    target = features @ truth.T + 0.01 * torch.randn(160, 2, generator=generator)
    held = token % 8 == 7
    gram = (features[~held].T @ features[~held]).double()
    cross = (target[~held].T @ features[~held]).double()
    scale = gram.diagonal().diag()
    errors = {}
    for strength in RIDGES:
        solved = (cross + strength * original.double() @ scale) @ torch.linalg.inv(gram + strength * scale)
        errors[float((target[held] - features[held] @ solved.float().T).square().sum())] = solved
    torch.testing.assert_close(
        fitted_down(token, features, target, original, original).double(), errors[min(errors)], rtol=1e-4, atol=1e-5
    )


def test_where_a_fit_does_not_help_other_tokens_the_expert_keeps_its_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    token, features = torch.arange(64), torch.randn(64, 8, generator=generator)
    original = torch.randn(4, 8, generator=generator)
    assert torch.equal(fitted_down(token, features, features @ original.T, original, original), original)
    assert torch.equal(fitted_down(token[:0], features[:0], features[:0] @ original.T, original, original), original)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_rounds_never_lose_on_tokens_that_were_notfitted_down(family: str, calibration: GetCalibration) -> None:
    layer = view(calibration(family))
    plan = fitting(layer.num_experts, [0, 3])
    held = torch.arange(len(layer.sample.hidden)) % 8 == 7
    gates, missing = missing_output(layer, plan)
    before = float(missing[held].square().sum())
    for rounds in (1, 2, 4):
        with pytest.warns(moetailor.MoetailorWarning, match=r"layer 1: \d of \d experts were fitted on fewer tokens"):
            fitted = Refit(rounds=rounds).build(layer, plan)
        now = missing.clone()
        for at, expert in enumerate(plan.rebuilt):
            matrices = layer.experts.expert(expert)
            features = gates[:, expert, None] * layer.experts.hidden(matrices, layer.sample.hidden)
            now -= features @ (fitted["down"][at] - matrices["down"]).T
        error = float(now[held].square().sum())
        assert error <= before * (1 + 1e-6)
        before = error


def test_a_plan_is_native_keeps_the_subset_and_spares_protected_experts(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    budget, protect = moetailor.Budget.parse(keep=6), [(0, 2)]
    plan = moetailor.make_plan(calibration("olmoe"), "refit", budget, protect=protect)
    same = {"exhaustive": 0, "samples": 100, "swaps": 64, "tokens": 1024}
    subsets = moetailor.make_plan(calibration("olmoe"), "naee", budget, protect=protect, parameters=same)
    assert plan.native
    assert plan.nbytes == subsets.nbytes
    assert [layer.pool for layer in plan.layers.values()] == [layer.pool for layer in subsets.layers.values()]
    assert plan.by_layer[0].slots[2] == Keep()
    whole = moetailor.make_plan(calibration("olmoe"), "refit", moetailor.Budget.parse(keep=8))
    assert whole.layers == {}
    assert keep_only(8, plan.by_layer[0].pool, Drop()).pool == plan.by_layer[0].pool


def test_weights_of_half_width_are_fitted_in_full(checkpoint: Get, calibration: GetCalibration) -> None:
    plan = moetailor.make_plan(calibration("olmoe"), "refit", moetailor.Budget.parse(keep=6))
    wide, narrow = (
        moetailor.apply(plan, load(checkpoint("olmoe"), dtype), calibration=calibration("olmoe"))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.float(), wide.get_parameter(name), rtol=0.1, atol=0.02)


@pytest.fixture
def twins(checkpoint: Get, tmp_path: Path) -> Path:
    """Return a checkpoint whose experts have each neuron twice, with columns of their own."""
    model, folder = tiny_model("olmoe", vocab_size=128), tmp_path / "twins"
    for layer in anatomy_of(model).layers.values():
        experts = model.get_submodule(layer.experts)
        half = Experts(experts).shape.intermediate // 2
        with torch.no_grad():
            for part in experts.gate_up_proj.chunk(2, 1):
                part[:, half:] = part[:, :half]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint("olmoe")).save_pretrained(folder)
    return folder


def test_experts_whose_neurons_are_there_twice_all_stay_with_half_of_them(twins: Path, tmp_path: Path) -> None:
    calibration = moetailor.calibrate(twins, tmp_path / "calib", text=token_batches(64, 48))
    budget, chosen = moetailor.Budget.parse(remove="50%"), {"neurons": "chosen"}
    plan = moetailor.make_plan(calibration, "refit", budget, parameters=chosen)
    assert {answer for layer in plan.layers.values() for answer in layer.slots} == {Narrow(8)}
    whole = moetailor.make_plan(calibration, "refit", budget)
    assert {len(layer.pool) for layer in whole.layers.values()} == {4}
    out = moetailor.apply(plan, twins, tmp_path / "out", calibration=calibration, format="native")
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, twins))
    assert config == before | {"intermediate_size": 8}
    assert open_checkpoint(out).nbytes == plan.nbytes <= whole.nbytes + 2 * 4 * calibration.model.stacks[0].slot_bytes
    original = logits(load_tiny(twins))
    lost = (logits(load_tiny(out)) - original).square().sum() / original.square().sum()
    assert lost < 1e-5
    dropped = moetailor.apply(whole, twins, tmp_path / "whole", calibration=calibration)
    assert (logits(load_tiny(dropped)) - original).square().sum() / original.square().sum() > 100 * lost


def test_more_experts_with_fewer_neurons_take_no_more_bytes() -> None:
    """By hand: 32 experts of 96 neurons and 192 inputs in 16 bits, 1,152 bytes a neuron, 384 a slot of the router."""
    shape = ExpertShape(width=192, intermediate=96)
    sums = sums_of([(0, 1.0, [1.0] * 192)], 32, 1)
    about = {"shape": shape, "expert_bytes": 96 * 1152, "slot_bytes": 384, "dtype": "BF16", "num_experts": 32}
    layer = layer_of(sums, **about)
    # 16 x 110,592 + 16 x 384 bytes are 19 experts of 80 neurons (19.1), 23 of 64 (23.9), 31 of 48 (31.8), and 32 of 47,
    # which are 40.
    assert list(_ways(layer, 16)) == [(16, 96), (19, 80), (23, 64), (31, 48), (32, 40)]
    assert list(_ways(layer, 32)) == [(32, 96)]
    layer.groups = 4
    assert list(_ways(layer, 16)) == [(16, 96), (20, 72), (28, 48), (32, 40)]
    layer.groups, layer.nbytes = 1, 16 * 96 * 1152 + 100_000
    assert list(_ways(layer, 16))[:2] == [(16, 96), (20, 80)]
    layer.nbytes = layer.slot_bytes = 0  # where the router does not count
    assert list(_ways(layer, 16)) == [(16, 96), (19, 80), (24, 64), (32, 48)]


@pytest.mark.parametrize(
    ("family", "given"), [("deepseek_v2", {}), ("olmoe", {"layers": [0]}), ("olmoe", {"protect": [(0, 1)]})]
)
def test_where_no_ordinary_checkpoint_holds_them_experts_keep_their_neurons(
    family: str, given: dict, calibration: GetCalibration
) -> None:
    budget = moetailor.Budget.parse(remove="50%")
    plan = moetailor.make_plan(calibration(family), "refit", budget, parameters={"neurons": "chosen"}, **given)
    assert not any(layer.of(Narrow) for layer in plan.layers.values())
    if not given:
        assert resolve_format(plan, "native").name == "native"
