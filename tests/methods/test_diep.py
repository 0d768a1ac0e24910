"""Differentiable scores: the loss token by token, and layers whose answer is known."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moetailor
from moetailor.calibration.statistics import Sample
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.methods.diep import RATE, Diep
from moetailor.methods.run import view_of
from moetailor.planning.view import LayerView
from support.hand import TinyExperts, layer_of, sums_of

GetCalibration = Callable[[str], moetailor.Calibration]


def layer(outputs: torch.Tensor, gate: torch.Tensor) -> LayerView:
    """Make a layer whose expert e gives ``outputs[e]`` [D] for every token, and whose tokens choose all experts."""
    experts, width = outputs.shape
    # one neuron: silu(gate x) (up x) is the same for every token, as all inputs are alike
    x = torch.ones(len(gate), width)
    project = torch.full((experts, 1, width), 1 / width)
    neuron = torch.nn.functional.silu(torch.tensor(1.0))
    module = TinyExperts(project, project, (outputs / neuron)[:, :, None])
    sample = Sample(
        key=torch.arange(len(gate)),
        hidden=x,
        index=torch.arange(experts, dtype=torch.int32).repeat(len(gate), 1),
        gate=gate,
        logits=gate,
    )
    return layer_of(
        sums_of([(e, 1.0, [0.0] * width) for e in range(experts)], experts, 1), sample=sample, module=module
    )


def test_experts_that_cancel_go_together() -> None:
    # Experts 0 and 1 are large and opposite, so without both nothing is lost; 2 and 3 are what the layer gives.
    outputs = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 1.0], [0.0, 1.2]])
    view = layer(outputs, torch.full((3, 4), 0.25))
    assert Diep(tokens=3).plan(view, 2).pool == [2, 3]
    # A score for each expert alone keeps the large ones.
    norm = outputs.norm(dim=1)
    assert sorted(norm.argsort(descending=True)[:2].tolist()) == [0, 1]


def test_independent_experts_rank_by_their_energy() -> None:
    outputs = torch.diag(torch.tensor([3.0, 1.0, 4.0, 2.0]))
    plan = Diep(tokens=2).plan(layer(outputs, torch.full((2, 4), 0.25)), 2)
    assert plan.pool == [0, 2]
    order = sorted(range(4), key=lambda expert: -plan.scores[expert])
    assert order == [2, 0, 3, 1]
    assert all(0 < score < 1 for score in plan.scores)


def test_gates_count_too() -> None:
    gate = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2)
    plan = Diep(tokens=2).plan(layer(torch.diag(torch.tensor([1.0, 4.0, 3.0, 2.0])), gate), 1)
    assert plan.pool == [0]


def test_the_steps_follow_the_loss_of_the_sampled_tokens(
    calibration: GetCalibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same optimiser on the loss summed token by token, expert by expert, ends at the same masks."""
    view = view_of(calibration("olmoe"), 1, ExpertWeights(calibration("olmoe").model.source))
    keep, steps, pull = 5, 40, 10.0
    sample = view.sample
    parts = torch.zeros(len(sample.key), 8, sample.hidden.shape[1], dtype=torch.float64)
    for token in range(len(sample.key)):
        for expert, gate in zip(sample.index[token].tolist(), sample.gate[token].tolist(), strict=True):
            parts[token, expert] = gate * view.experts.outputs(expert, sample.hidden[token][None])[0].double()
    relaxed = torch.full((8,), keep / 8, dtype=torch.float64).logit().requires_grad_()
    optimiser = torch.optim.Adam([relaxed], lr=RATE)
    for _ in range(steps):
        alpha = relaxed.sigmoid()
        lost = sum((token - (alpha[:, None] * token)).sum(0).square().sum() for token in parts)
        energy = sum(token.sum(0).square().sum() for token in parts)
        loss = lost / energy + pull * ((alpha.sum() - keep) / 8) ** 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = Diep(steps=steps, pull=pull).plan(view, keep)
    assert found.scores == pytest.approx(relaxed.sigmoid().tolist(), rel=1e-4)


def test_protected_experts_and_groups() -> None:
    view = layer(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), torch.full((2, 4), 0.25))
    assert Diep(tokens=2).plan(replace(view, protected=frozenset({3})), 2).pool == [0, 3]
    assert Diep(tokens=2).plan(replace(view, groups=2), 2).pool == [0, 2]


def test_a_caller_without_gradients_gets_the_same_plan(calibration: GetCalibration) -> None:
    budget = moetailor.Budget.parse(keep=5)
    plan = moetailor.make_plan(calibration("olmoe"), "diep", budget)
    with torch.no_grad():
        assert moetailor.make_plan(calibration("olmoe"), "diep", budget) == plan
