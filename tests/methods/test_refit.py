"""Refit: what is left against the model with masked routers, fits against plain normal equations, never worse."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import Drop, Fitted, Keep
from moetailor.fitting.least_squares import RIDGES
from moetailor.methods.refit import Refit, fitted_down, missing_output
from moetailor.planning.layer_plan import LayerPlan, keep_only
from support.naive import masked_outputs
from support.tiny import view

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
