"""Compressed Experts: which slots run, what the others add, and where gradients go."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import moetailor
from moetailor.answers import Auxiliary, Constant, Keep
from moetailor.answers import Linear as Map
from moetailor.checkpoint.anatomy import discover
from moetailor.methods.compressed_experts import CompressedExperts
from moetailor.planning.checks import check_plan
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView
from moetailor.runtime.reshape import LayerChange, reshape_model
from support.families import tiny_model
from support.layers import WIDTH, layer_with, random_experts, routed_layer
from support.tiny import IDS, eager, load, logits

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
CHOSEN = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4], [3, 0, 6, 1]])
# not in order on purpose: the split goes by the gate
GATES = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])


def experts_with(spec: Auxiliary, fill: float = 0.0, name: str = "olmoe") -> tuple[nn.Module, nn.Module]:
    """Return the first experts module of a tiny model, original and with auxiliary slots."""
    model, original = eager(tiny_model(name)), eager(tiny_model(name))
    layer = next(iter(discover(model.config, model).layers.values()))
    change = LayerChange(experts=range(8), slots=range(8), slot_map=LayerPlan(slots=(spec,) * 8).slot_map())
    reshape_model(model, discover(original.config, original), {layer.index: change})
    module = model.get_submodule(layer.experts)
    for part in ("gate", "up", "down"):
        if f"auxiliary_{part}" in module.added:
            getattr(module, f"auxiliary_{part}").data.normal_(std=fill)
    return original.get_submodule(layer.experts), module


def tokens(module: nn.Module) -> torch.Tensor:
    return torch.randn(3, module.down_proj.shape[1], generator=torch.Generator().manual_seed(2))


def test_at_the_start_the_main_experts_run_as_they_are() -> None:
    original, module = experts_with(Auxiliary(main=2))
    x = tokens(module)
    with torch.no_grad():
        got = module(x, CHOSEN, GATES)
        expected = original(
            x, torch.tensor([[1, 3], [7, 6], [3, 0]]), torch.tensor([[0.4, 0.3], [0.7, 0.1], [0.25] * 2])
        )
    torch.testing.assert_close(got, expected)


def test_a_share_lets_fewer_run_and_gates_can_be_made_whole() -> None:
    original, module = experts_with(Auxiliary(main=4, share=0.6, vectors="none", renormalise=True))
    x = tokens(module)
    # .4 + .3 reach .6; .7 alone does; three of .25 do
    runs = [([1, 3], [0.4, 0.3], 0.7), ([7], [0.7], 0.7), ([3, 0, 6], [0.25] * 3, 0.75)]
    with torch.no_grad():
        got = module(x, CHOSEN, GATES)
        for token, (slots, gates, total) in enumerate(runs):
            weight = torch.tensor([gates]) / total
            torch.testing.assert_close(got[token], original(x[token, None], torch.tensor([slots]), weight)[0])


def test_equal_vectors_mix_to_themselves_whatever_the_gates() -> None:
    """alpha' sums to 1: the mix of equal vectors is that vector, which one set for the layer says as well."""
    _, one = experts_with(Auxiliary(main=2))
    _, layer = experts_with(Auxiliary(main=2, vectors="layer"), fill=0.5)
    for part in ("gate", "up", "down"):
        getattr(one, f"auxiliary_{part}").data.copy_(getattr(layer, f"auxiliary_{part}").data.expand(8, -1))
    x = tokens(one)
    with torch.no_grad():
        torch.testing.assert_close(one(x, CHOSEN, GATES), layer(x, CHOSEN, GATES))


def test_gradients_reach_a_vector_only_through_tokens_that_have_it_aside() -> None:
    _, module = experts_with(Auxiliary(main=2), fill=0.1)
    x = tokens(module)
    for token, aside in enumerate([{2, 0}, {5, 4}, {6, 1}]):
        module.zero_grad()
        module(x[token, None], CHOSEN[token, None], GATES[token, None]).square().sum().backward()
        for part in ("gate", "up", "down"):
            reached = getattr(module, f"auxiliary_{part}").grad.abs().sum(1).nonzero().flatten().tolist()
            assert set(reached) == aside


def test_auxiliary_experts_cost_no_product() -> None:
    _, module = experts_with(Auxiliary(main=1), fill=0.1)
    x = tokens(module).requires_grad_()
    module(x, CHOSEN, GATES).sum().backward()
    used = module.down_proj.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert used == [1, 3, 7]


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_at_the_start_and_after_loading_the_model_is_the_plain_half(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    whole, plain = (
        moetailor.make_plan(
            calibration(name),
            "compressed_experts",
            moetailor.Budget.parse(remove=0),
            parameters={"main": 1, "vectors": v},
        )
        for v in ("expert", "none")
    )
    assert plain.nbytes == plain.model.nbytes
    moetailor.apply(whole, checkpoint(name), tmp_path / "out", calibration=calibration(name))
    half = eager(moetailor.apply(plain, load(checkpoint(name)), calibration=calibration(name)))
    torch.testing.assert_close(logits(load(tmp_path / "out"), IDS), logits(half, IDS), rtol=1e-5, atol=1e-5)


def constant_expert_layer() -> LayerView:
    """Return a layer whose expert 1 gives the same whatever its input: its down projection meets a dead bias."""
    layer = routed_layer(random_experts(4), 200, seed=0)
    given = layer.experts.outputs
    layer.experts.outputs = lambda e, x: torch.ones(len(x), WIDTH) * 3 if e == 1 else given(e, x)  # type: ignore[method-assign]
    return layer


def test_a_constant_expert_is_replaced_without_loss_when_it_is_auxiliary() -> None:
    layer = constant_expert_layer()
    method = CompressedExperts(main=1, constants=True)
    plan = method.plan(layer, 4)
    built = method.build(layer, plan)
    torch.testing.assert_close(built["auxiliary_constant"][1], torch.full((WIDTH,), 3.0, dtype=torch.float64))
    assert torch.count_nonzero(built["auxiliary_gate"]) == 0
    assert built["auxiliary_down"].shape == (4, 5)


def asides(layer: LayerView, split: Auxiliary, gone: set[int]) -> dict[int, list[tuple[int, float]]]:
    """Return by expert the sampled tokens where it is auxiliary, with its gate there, token by token."""
    found: dict[int, list[tuple[int, float]]] = {}
    for token, (slots, gates) in enumerate(zip(layer.sample.index.tolist(), layer.sample.gate.tolist(), strict=True)):
        running, before = 0, 0.0
        for gate, slot in sorted(zip(gates, slots, strict=True), key=lambda pair: -pair[0]):
            if slot not in gone:
                if running < split.main and before < split.share * sum(gates):
                    running += 1
                else:
                    found.setdefault(slot, []).append((token, gate))
            before += gate
    return found


@pytest.mark.parametrize(("split", "keep"), [({"main": 1}, 4), ({"main": 2, "share": 0.5}, 4), ({"main": 1}, 3)])
def test_maps_are_the_least_squares_of_what_experts_gave_where_they_were_auxiliary(split: dict, keep: int) -> None:
    layer = routed_layer(random_experts(4), 400, seed=0, top_k=3)
    method = CompressedExperts(rank=WIDTH, ridge=0.0, vectors="none", **split)
    plan = method.plan(layer, keep)
    assert plan.of(Map).keys() == set(range(4)) - set(plan.pool)
    built = method.build(layer, plan)
    mine = asides(layer, next(iter(plan.of(Auxiliary).values())), set(range(4)) - set(plan.pool))
    for at, expert in enumerate(plan.pool):
        token, gate = (torch.tensor(part) for part in zip(*mine[expert], strict=True))
        x = layer.sample.hidden[token].double()
        y, with_one = layer.experts.outputs(expert, x.float()).double(), torch.cat([x, torch.ones(len(x), 1)], 1)
        expected = torch.linalg.lstsq(gate[:, None] * with_one, gate[:, None] * y).solution
        rows = slice(WIDTH * at, WIDTH * at + WIDTH)
        found = built["auxiliary_in"][rows].T @ built["auxiliary_out"][rows]
        torch.testing.assert_close(found.double(), expected[:WIDTH], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(built["auxiliary_constant"][expert], expected[WIDTH], rtol=1e-3, atol=1e-4)


def test_maps_of_low_rank_lose_least_of_all_such_maps() -> None:
    """With inputs that are uncorrelated and of one size, the best map of rank r is the first r of the best map."""
    layer = routed_layer(random_experts(4), 400, seed=0)
    method = CompressedExperts(main=1, rank=2, ridge=0.0)
    mine = asides(layer, Auxiliary(1), set())[0]
    token, gate = (torch.tensor(part) for part in zip(*mine, strict=True))
    hidden = layer.sample.hidden[token].double()
    weight = (gate.square() / gate.square().sum())[:, None].double()
    centred = hidden - (weight * hidden).sum(0)
    factor = torch.linalg.cholesky(centred.T @ (weight * centred))
    layer.sample.hidden[token] = torch.linalg.solve_triangular(factor, centred.T, upper=False).T.float()
    built = method.build(layer, method.plan(layer, 4))
    x = layer.sample.hidden[token].double()
    y = layer.experts.outputs(0, x.float()).double()
    left, values, right = torch.linalg.svd(x.T @ (weight * y))
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(
        (built["auxiliary_in"][:2].T @ built["auxiliary_out"][:2]).double(), best, rtol=1e-3, atol=1e-3
    )


def test_an_expert_that_is_never_auxiliary_gives_there_what_it_gives_at_all() -> None:
    layer = layer_with(random_experts(4), [9, 9, 9, 0])
    sample = layer.sample
    sample.index, sample.gate = torch.tensor([[0, 1]] * 30 + [[2, 1]] * 30), torch.tensor([[0.6, 0.4]] * 60)
    method = CompressedExperts(main=1, rank=1)
    built = method.build(layer, method.plan(layer, 4))
    x = sample.hidden[:30].double()
    at_mean = built["auxiliary_constant"][0] + (x @ built["auxiliary_in"][:1].T @ built["auxiliary_out"][:1]).mean(0)
    torch.testing.assert_close(at_mean.float(), layer.experts.outputs(0, x.float()).mean(0), rtol=1e-3, atol=1e-4)
    assert built["auxiliary_constant"].isfinite().all()
    assert not bool(built["auxiliary_in"][3].any())  # no token reached it


def test_experts_that_are_main_least_go_first() -> None:
    layer = routed_layer(random_experts(4), 200, seed=0)
    total = [0.0] * 4
    for slots, gates in zip(layer.sample.index.tolist(), layer.sample.gate.tolist(), strict=True):
        gate, slot = max(zip(gates, slots, strict=True))
        total[slot] += gate
    plan = CompressedExperts(main=1).plan(layer, 2)
    assert plan.pool == sorted(sorted(range(4), key=lambda n: -total[n])[:2])
    assert sorted([*plan.pool, *plan.of(Constant)]) == [0, 1, 2, 3]


def test_of_experts_that_are_never_main_the_unreached_go_first() -> None:
    layer = layer_with(random_experts(4), [0, 3, 9, 0])
    sample = layer.sample
    sample.index, sample.gate = torch.tensor([[2, 1]] * 60), torch.tensor([[0.6, 0.4]] * 60)
    assert CompressedExperts(main=1).plan(layer, 2).pool == [1, 2]
    assert CompressedExperts(main=1).plan(layer, 3).pool == [0, 1, 2]


@pytest.mark.parametrize("spec", [{"main": "3"}, {"share": "0"}, {"share": "1.5"}])
def test_splits_that_cannot_be_are_refused(spec: dict[str, str], calibration: GetCalibration) -> None:
    with pytest.raises(moetailor.PlanError, match="main slots of a token and a share"):
        moetailor.make_plan(
            calibration("olmoe"), "compressed_experts", moetailor.Budget.parse(remove=0), parameters=spec
        )


def test_maps_without_constants_and_other_answers_are_refused(calibration: GetCalibration) -> None:
    plan = moetailor.make_plan(
        calibration("olmoe"), "compressed_experts", moetailor.Budget.parse(remove=0), parameters={"rank": 2}
    )
    prefix, layer = next(iter(plan.layers.items()))
    for slots, said in (
        ((Auxiliary(1, rank=2),) * 8, "maps of rank 2 without constants; give them both"),
        ((*layer.slots[:7], Keep()), "beside auxiliary slots only slots of the same split, constants, linear maps and"),
    ):
        with pytest.raises(moetailor.PlanError, match=said):
            check_plan(replace(plan, layers={prefix: LayerPlan(slots=slots)}), plan.model)
