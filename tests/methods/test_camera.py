"""CAMERA-P: energies by hand, neurons that go one by one against plain least squares, fits that give all back."""

from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Narrow
from moetailor.checkpoint.files import open_checkpoint
from moetailor.fitting.neurons import RIDGE, energies, least_missed
from moetailor.fitting.tokens import tokens_of
from moetailor.methods.camera import Camera
from moetailor.planning.layer_plan import LayerPlan
from moetailor.transform.formats import resolve_format
from support.hand import TinyExperts
from support.layers import INNER, random_experts, routed_layer
from support.tiny import Get, GetCalibration


def test_an_energy_is_that_of_the_column_times_sum_and_peak_of_what_it_meets() -> None:
    hidden, weight = torch.tensor([[1.0, 3.0], [2.0, 0.0], [-1.0, 0.0]]), torch.tensor([1.0, 0.5, 0.25]).double()
    down = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    # 25 and 1; q h^2 is 1, 2, .25 and 9, 0, 0
    for peak, expected in ((0.0, [25 * 3.25, 9.0]), (1.0, [25 * 2.0, 9.0]), (0.9, [25 * (0.325 + 1.8), 9.0])):
        found = energies(hidden, weight, down, peak)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_each_expert_keeps_the_neurons_of_most_energy_in_their_order() -> None:
    layer = routed_layer(random_experts(4), 300, seed=0)
    built = Camera(peak=0.9).build(layer, LayerPlan(slots=(Narrow(3),) * 4))
    for expert in range(4):
        matrices = layer.experts.expert(expert)
        gate, up, down = (matrices[name].double() for name in ("gate", "up", "down"))
        total, most = torch.zeros(2, INNER, dtype=torch.float64)
        for x, chosen, gates in zip(layer.sample.hidden.double(), layer.sample.index, layer.sample.gate, strict=True):
            for slot, g in zip(chosen.tolist(), gates.double(), strict=True):
                if slot == expert:
                    given = (g * torch.nn.functional.silu(gate @ x) * (up @ x)).square()
                    total, most = total + given, torch.maximum(most, given)
        energy = down.square().sum(0) * (0.1 * total + 0.9 * most)
        kept = sorted(sorted(range(INNER), key=lambda j: -energy[j])[:3])
        assert torch.equal(built["narrow_gate"][expert], matrices["gate"][kept])
        assert torch.equal(built["narrow_up"][expert], matrices["up"][kept])
        assert torch.equal(built["narrow_down"][expert], matrices["down"][:, kept])


def test_neurons_go_one_after_the_other_as_plain_least_squares_would_have_them_go() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(7, 7, generator=generator)
    hidden, weight = torch.randn(200, 7, generator=generator) @ mix, torch.rand(200, generator=generator).double()
    down = torch.randn(4, 7, generator=generator)
    rows = (weight.sqrt()[:, None] * hidden).double()
    # The ridge is as if each neuron had met a token of its own.
    rows = torch.cat([rows, torch.eye(7).double() * (RIDGE * rows.square().sum() / 7).sqrt()])
    target, stays = rows @ down.double().T, list(range(7))

    def lost(kept: list[int]) -> float:
        found = torch.linalg.lstsq(rows[:, kept], target).solution
        return float((target - rows[:, kept] @ found).square().sum())

    for count in range(6, 0, -1):
        stays.remove(min(stays, key=lambda gone: lost([j for j in stays if j != gone])))
        assert least_missed(hidden, weight, down, count).tolist() == stays


def test_a_fit_gives_back_what_neurons_that_stay_can_give() -> None:
    """Of two neurons that meet the same, one goes, and the other gives what both gave."""
    module = random_experts(4)
    gate, up = module.gate_up_proj.detach().chunk(2, 1)
    gate[:, 4], up[:, 4] = gate[:, 1], up[:, 1]
    twins = TinyExperts(gate, up, module.down_proj.detach())
    layer, plan = routed_layer(twins, 400, seed=0), LayerPlan(slots=(Narrow(4),) * 4)
    for refit, limit in ((True, 1e-3), (False, None)):
        built = Camera(refit=refit).build(layer, plan)
        for expert in range(4):
            tokens = tokens_of(layer, {expert: 1.0})
            x, expected = layer.inputs(tokens.place), layer.outputs(expert, tokens.place)
            narrow = {name: built[f"narrow_{name}"][expert] for name in ("gate", "up", "down")}
            missed = layer.experts.hidden(narrow, x) @ narrow["down"].T - expected
            share = float(missed.square().sum() / expected.square().sum())
            assert share < limit if limit else share > 0.01


@pytest.mark.parametrize("refit", [False, True])
def test_an_expert_that_no_token_reached_is_narrowed_all_the_same(refit: bool) -> None:
    layer = routed_layer(random_experts(4), 50, seed=0)
    layer.sample.index[layer.sample.index == 3] = 0
    built = Camera(refit=refit).build(layer, LayerPlan(slots=(Narrow(2),) * 4))
    assert all(tensor.isfinite().all() and len(tensor) == 4 for tensor in built.values())
    assert built["narrow_down"].shape == (4, 6, 2)


def test_half_removed_is_half_of_the_bytes_and_sizes_are_filled(
    calibration: GetCalibration, checkpoint: Get, tmp_path: Path
) -> None:
    facts = calibration("olmoe").model
    experts = sum(stack.num_experts * stack.expert_bytes for stack in facts.stacks)
    half = moetailor.make_plan(calibration("olmoe"), "camera", moetailor.Budget.parse(remove="50%"))
    assert {answer for layer in half.layers.values() for answer in layer.slots} == {Narrow(8)}
    assert half.nbytes == facts.nbytes - experts // 2
    of_neuron = experts // 16
    budget = moetailor.Budget.parse(size=facts.nbytes - 3 * of_neuron)
    for multiple, neurons in ((1, 13), (4, 12), (8, 8)):
        plan = moetailor.make_plan(calibration("olmoe"), "camera", budget, parameters={"multiple": multiple})
        assert {answer for layer in plan.layers.values() for answer in layer.slots} == {Narrow(neurons)}
        assert resolve_format(plan, "auto").name == "narrow"
    out = moetailor.apply(half, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe"))
    assert open_checkpoint(out).nbytes == half.nbytes


def test_what_narrow_experts_cannot_be_is_refused(calibration: GetCalibration) -> None:
    given, budget = calibration("olmoe"), moetailor.Budget.parse(remove="50%")
    with pytest.raises(moetailor.PlanError, match=r"peak=2\.0: at 1 the largest output alone counts"):
        moetailor.make_plan(given, "camera", budget, parameters={"peak": 2.0})
    with pytest.raises(moetailor.PlanError, match="decides itself what each layer keeps; leave it uniform"):
        moetailor.make_plan(given, "camera", budget, allocation="global")
    with pytest.raises(moetailor.PlanError, match="kept, narrower need their experts as they are; leave widths out"):
        moetailor.make_plan(given, "camera", budget, width=moetailor.Width(bits=4))
    one = moetailor.make_plan(given, "camera", budget, layers=[1])
    with pytest.raises(moetailor.PlanError, match=r"this plan leaves \[8\] neurons in 1 of 2 layers; format moetailor"):
        resolve_format(one, "narrow")
