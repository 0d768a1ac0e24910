"""Linear stand-ins: their limits (a novice, a linear expert), their loss token by token, and the budgeted choice."""

import pytest
import torch

import moetailor
from moetailor.answers import Constant, Keep
from moetailor.answers import Linear as Map
from moetailor.fitting.constants import constants
from moetailor.methods.linear import Linear
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView
from support.layers import WIDTH, layer_of_tokens, random_experts

BUILDER = Linear(ridge=1e-6)


def given(tensors: dict[str, torch.Tensor], plan: LayerPlan, slot: int, x_TD: torch.Tensor) -> torch.Tensor:
    """Return what a slot's stand-in gives, read off the stored tensors."""
    maps = plan.of(Map)
    if slot not in maps:
        return tensors["constant"][list(plan.of(Constant)).index(slot)].expand(len(x_TD), -1)
    at, rank = list(maps).index(slot), maps[slot].rank
    start = sum(map.rank for map in list(maps.values())[:at])
    inner = tensors["linear_in"][:rank] if maps[slot].shared else tensors["linear_in"][start : start + rank]
    return tensors["linear_constant"][at] + x_TD.double() @ inner.T @ tensors["linear_out"][start : start + rank]


def replaced(plan: LayerPlan) -> list[int]:
    return sorted([*plan.of(Constant), *plan.of(Map)])


def loss(layer: LayerView, tensors: dict[str, torch.Tensor], plan: LayerPlan, expert: int) -> float:
    token, gate = layer.routed(expert)
    x = layer.sample.hidden[token]
    apart = layer.experts.outputs(expert, x).double() - given(tensors, plan, expert, x)
    return float((gate.double().square() * apart.square().sum(1)).sum()) / float(layer.sums.tokens)


def test_rank_zero_is_the_optimal_novice() -> None:
    layer = layer_of_tokens(random_experts(4))
    plan = Linear(rank=0).plan(layer, 2)
    assert replaced(plan) == list(plan.of(Constant))
    built = BUILDER.build(layer, plan)
    assert torch.equal(built["constant"], constants(layer.sums, "optimal")[replaced(plan)])
    assert set(built) == {"constant"}
    mone = moetailor.METHODS["mone"].of({"score": "exact", "novice": "optimal"}).plan(layer, 2)
    assert replaced(plan) == replaced(mone)


@pytest.mark.parametrize("shared", [False, True])
def test_the_score_is_the_loss_of_the_stored_map(shared: bool) -> None:
    layer = layer_of_tokens(random_experts(4))
    plan = Linear(rank=3, ridge=1e-6, shared=shared).plan(layer, 1)
    built = BUILDER.build(layer, plan)
    for expert in replaced(plan):
        measured = loss(layer, built, plan, expert)
        if shared:  # the shared factor is not the best one of each
            assert measured >= plan.scores[expert] * (1 - 1e-4)
        else:
            assert measured == pytest.approx(plan.scores[expert], rel=1e-3)


def test_the_loss_falls_with_the_rank() -> None:
    layer = layer_of_tokens(random_experts(4))
    scores = torch.tensor([Linear(rank=rank, ridge=1e-6).plan(layer, 1).scores for rank in range(WIDTH + 1)])
    assert (scores[1:] <= scores[:-1] + 1e-9).all()


@pytest.mark.parametrize("shared", [False, True])
def test_an_expert_that_is_linear_goes_without_loss(shared: bool) -> None:
    # up is constant over the tokens and the gate's silu is the identity far above 0: E(x) is linear there
    module = random_experts(3)
    layer = layer_of_tokens(module)
    with torch.no_grad():
        layer.sample.hidden[:, 0] = 1.0
        gate, up = module.gate_up_proj[0].chunk(2)
        gate[:, 0], up[:] = 60.0, 0.0
        up[:, 0] = 1.0
    layer = layer_of_tokens(module)
    layer.sample.hidden[:, 0] = 1.0
    plan = LayerPlan(slots=(Map(WIDTH, shared), Keep(), Keep()))
    token, gate_of = layer.routed(0)
    weight, y = gate_of.double().square(), layer.experts.outputs(0, layer.sample.hidden[token]).double()
    layer.sums.gate_sq[0], layer.sums.gate_sq_output[0] = weight.sum(), (weight[:, None] * y).sum(0)
    built = Linear(ridge=1e-9).build(layer, plan)
    assert loss(layer, built, plan, 0) < 1e-5 * float(y.square().sum(1).mean())


def test_shrinkage_pulls_to_the_layers_mean() -> None:
    layer = layer_of_tokens(random_experts(3))
    plan = LayerPlan(slots=(Map(2), Keep(), Keep()))
    built = Linear(ridge=1e-6, shrinkage=1e12).build(layer, plan)
    everyone = layer.sums.gate_sq_output.sum(0) / layer.sums.gate_sq.sum()
    torch.testing.assert_close(given(built, plan, 0, layer.sample.hidden[:1])[0], everyone, rtol=1e-4, atol=1e-5)


def test_chosen_ranks_keep_the_budget_and_beat_the_given_one() -> None:
    layer = layer_of_tokens(random_experts(8), tokens=30000)
    given_plan = Linear(rank=2).plan(layer, 4)
    layer.nbytes = 4 * layer.expert_bytes + 4 * (1 + 2 * 2) * WIDTH * 4
    plan = Linear(rank=2, ranks="chosen").plan(layer, 4)
    ranks = [map.rank for map in plan.of(Map).values()]
    vectors = len(plan.of(Constant)) + len(ranks) + 2 * sum(ranks)
    spent = len(plan.pool) * layer.expert_bytes + vectors * WIDTH * 4
    assert spent <= layer.nbytes
    fresh = layer_of_tokens(layer.experts.module, tokens=10000, seed=7)
    totals = []
    for chosen in (plan, given_plan):
        built = BUILDER.build(layer, chosen)
        totals.append(sum(loss(fresh, built, chosen, expert) for expert in replaced(chosen)))
    assert totals[0] <= 1.02 * totals[1]


def test_fewer_tokens_than_the_rank_work_and_are_named() -> None:
    layer = layer_of_tokens(random_experts(3), tokens=4)
    layer.sample.index[:] = torch.tensor([0, 1])  # nobody asks for expert 2
    layer.sums.gate_sq_output[2] = layer.sums.gate_sq[2] = layer.sums.count[2] = 0
    for shared in (False, True):
        plan = LayerPlan(slots=(Map(5, shared), Keep(), Map(5, shared)))
        with pytest.warns(moetailor.MoetailorWarning, match="layer 0: 2 linear stand-ins have fewer"):
            built = BUILDER.build(layer, plan)
        assert all(torch.isfinite(tensor).all() for tensor in built.values())
        assert not given(built, plan, 2, layer.sample.hidden).any()


def test_a_map_larger_than_an_expert_is_refused() -> None:
    with pytest.raises(
        moetailor.PlanError, match="rank=900: such a map takes 43,224 bytes, an expert of layer 0 3,600"
    ):
        Linear(rank=900).plan(layer_of_tokens(random_experts(3)), 1)
