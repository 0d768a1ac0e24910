"""What a router with a correction bias would do, against the family's own router with the dropped slots cut out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import moetailor
from moetailor.calibration.statistics import Sample
from moetailor.checkpoint.anatomy import MoELayer, discover, tensors_of
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.methods.routing import own_gates, routing_of
from support import naive
from support.families import FAMILIES, tiny_config, tiny_model
from support.tiny import token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(7))


def corrected() -> list[str]:
    """Return the families whose routers have a vector for the slots that no linear map of theirs adds."""
    found = []
    for name in FAMILIES:
        layer = next(iter(discover(tiny_config(name)).layers.values()))
        if any(not row.endswith(("weight", ".bias")) for row in layer.slot_rows):
            found.append(name)
    return sorted(found)


def stirred(name: str) -> tuple[nn.Module, MoELayer, torch.Tensor]:
    """Return a model, its first MoE layer, and the layer's correction bias, large enough to turn many choices."""
    model = tiny_model(name)
    layer = next(iter(discover(model.config, model).layers.values()))
    (path,) = [row for row in layer.slot_rows if not row.endswith(("weight", ".bias"))]
    bias = tensors_of(model)[f"{layer.block}.{path}"].data
    bias.copy_(0.3 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(3)))
    return model, layer, bias.flatten().clone()


def cut(model: nn.Module, layer: MoELayer, kept: list[int]) -> MoELayer:
    """Remove all rows of the other slots and experts from one layer, and return what it is then."""
    rows = [(f"{layer.experts}.{name}", axis) for name, axis in layer.expert_rows.items()]
    rows += [(f"{layer.block}.{name}", axis) for name, axis in layer.slot_rows.items()]
    for path, axis in rows:
        tensor = tensors_of(model)[path]
        tensor.data = tensor.data.index_select(axis, torch.tensor(kept))
    for path, count in layer.counts:
        setattr(model.get_submodule(path), count, len(kept))
    return replace(layer, num_experts=len(kept))


def sampled(seen: dict[str, torch.Tensor]) -> Sample:
    names = ("hidden", "index", "gate", "logits")
    return Sample(key=torch.arange(len(seen["index"])), **{name: seen[name].float() for name in names})


@pytest.mark.parametrize("name", corrected())
def test_gates_are_those_of_the_router_without_the_slots(name: str) -> None:
    model, layer, bias = stirred(name)
    groups = discover(model.config, model).groups
    sample = sampled(naive.run_recorded(model, layer, IDS))
    rule, known = routing_of(sample, groups, ExpertWeights(model).correction(layer.index), "here")
    assert bool(known.all())
    # all but two experts of each group, others in each
    size = layer.num_experts // groups.count
    kept = [slot for slot in range(layer.num_experts) if (slot + slot // size) % size not in (0, 2)]
    smaller = cut(model, layer, kept)
    seen = naive.run_recorded(model, smaller, IDS)
    expected = torch.zeros(len(seen["index"]), layer.num_experts)
    expected.scatter_(1, torch.tensor(kept)[seen["index"].long()], seen["gate"].float())
    stays = torch.zeros(1, layer.num_experts, dtype=torch.bool).index_fill_(1, torch.tensor(kept), True)
    torch.testing.assert_close(rule.gates(stays)[0], expected, rtol=1e-5, atol=1e-6)
    # The bias turned choices, among all slots and among those that stay: without it the rule is another one.
    for some in (stays, torch.ones_like(stays)):
        chosen = [(one.gates(some) > 0) for one in (rule, replace(rule, bias=torch.zeros_like(bias)))]
        assert not torch.equal(*chosen)


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "afmoe"])
def test_a_bias_is_the_same_from_disk_and_in_memory(name: str, checkpoint: Get) -> None:
    one, other = (ExpertWeights(source).correction(1) for source in (tiny_model(name), checkpoint(name)))
    assert one.dtype == other.dtype == torch.float32
    assert torch.equal(one, other)
    assert float(one.abs().min()) > 0


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_routers_without_a_correction_have_none(name: str, checkpoint: Get) -> None:
    assert all(ExpertWeights(source).correction(1) is None for source in (tiny_model(name), checkpoint(name)))


def test_a_model_calibrated_in_memory_is_planned_with_its_weights(calibration: GetCalibration, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    measured = moetailor.calibrate(model, tmp_path / "calibration", text=token_batches())
    budget = moetailor.Budget.parse(keep=9)
    with pytest.raises(moetailor.PlanError, match="was calibrated in memory; pass weights="):
        moetailor.make_plan(measured, "naee", budget)
    mine = moetailor.make_plan(measured, "naee", budget, weights=ExpertWeights(model))
    theirs = moetailor.make_plan(calibration("deepseek_v3"), "naee", budget)
    assert [layer.pool for layer in mine.layers.values()] == [layer.pool for layer in theirs.layers.values()]


def test_a_bias_worked_by_hand() -> None:
    # sigmoids 1/2, 2/3, 3/4 of the logits 0, ln 2, ln 3; with the bias 0.9, 0.7, 0.75;
    # gates of the two largest without it, normalised, times 2.5
    logits, bias = torch.tensor([[0.0, 0.6931472, 1.0986123]]), torch.tensor([0.4, 1 / 30, 0.0])
    given = Sample(
        key=torch.arange(1),
        hidden=torch.zeros(1, 1),
        index=torch.tensor([[0, 2]]),
        gate=torch.tensor([[1.0, 1.5]]),
        logits=logits,
    )
    rule, known = routing_of(given, Groups(), bias, "here")
    assert (rule.sigmoid, rule.on_logits, known.tolist()) == (True, False, [True])
    torch.testing.assert_close(rule.gates(torch.ones(1, 3, dtype=torch.bool))[0], own_gates(given))
    expected = torch.tensor([0, 2 / 3, 3 / 4]) / (2 / 3 + 3 / 4) * 2.5
    torch.testing.assert_close(rule.gates(torch.tensor([[False, True, True]]))[0, 0], expected)
    with pytest.raises(
        moetailor.PlanError, match="did not choose the largest logits or probabilities, its correction bias added"
    ):
        routing_of(given, Groups(), torch.tensor([-0.4, 0.0, 0.0]), "here")


def test_a_bias_that_was_rounded_with_the_weights_explains_the_choice_too() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(400, 16, generator=generator), 4 + 0.1 * torch.randn(16, generator=generator)
    rounded = bias.bfloat16().float()
    index = (logits.sigmoid() + rounded).topk(2).indices
    assert not torch.equal(index, (logits.sigmoid() + bias).topk(2).indices)
    gate = logits.sigmoid().gather(1, index)
    given = Sample(key=torch.arange(400), hidden=torch.zeros(400, 1), index=index, gate=gate, logits=logits)
    rule, known = routing_of(given, Groups(), bias, "here")
    assert torch.equal(rule.bias, rounded)
    assert bool(known.all())
