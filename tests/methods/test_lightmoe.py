"""LightMoE: selection by hand, the size formula of the paper, and what bases and parts on them lose."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Keep, LowRank
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.layout import Stack
from moetailor.fitting.low_rank import bases_of
from moetailor.fitting.whitened import approximate, second_moment
from moetailor.methods.lightmoe import LightMoE, _factors
from moetailor.planning.checks import check_plan
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import planned_nbytes
from moetailor.planning.view import LayerView
from support.layers import INNER, WIDTH, layer_with_biases, random_experts, routed_layer, with_copy

WHOLE = 4 * 3 * WIDTH * INNER
GetCalibration = Callable[[str], moetailor.Calibration]


def layer_of_mass(mass: list[float], index: int = 0, loud: float = 1.0) -> LayerView:
    """Return a layer whose experts have these shares of all gates, and router logits of some size."""
    layer = routed_layer(random_experts(len(mass), seed=index), 80, seed=index)
    layer.index, layer.expert_bytes = index, WHOLE
    layer.sums.gate.copy_(torch.tensor(mass))
    layer.sample.logits.mul_(loud / layer.sample.logits.norm(dim=1, keepdim=True))
    return layer


def plans(layers: list[LayerView], stored: int, **parameters: object) -> list[LayerPlan]:
    """Return the plans in the bytes that so many experts and bases a layer take, with what belongs to them."""
    method = LightMoE.of({"bases": 1, "rank": 1} | parameters)
    for layer in layers:
        plan = method.estimate(layer.num_experts, stored)
        layer.nbytes = plan.stored * WHOLE + sum(ranks(plan).values()) * 3 * (WIDTH + INNER) * 4
    return list(method.plan_layers(layers, [stored] * len(layers)))


def ranks(plan: LayerPlan) -> dict[int, int]:
    """Return the rank of each replaced expert, base by base."""
    return {slot: rank for members in bases_of(plan).values() for slot, rank in members.items()}


def members(plan: LayerPlan) -> dict[int, list[int]]:
    return {base: list(found) for base, found in bases_of(plan).items()}


def replaced(plan: LayerPlan) -> list[int]:
    return list(plan.of(LowRank))


def residual(layer: LayerView, plan: LayerPlan, built: dict[str, torch.Tensor], slot: int) -> float:
    """Return sum_t g^2 |(W_n - W) u_t|^2 over the matrices of an expert and the tokens that chose it, one by one."""
    at, base = list(ranks(plan)).index(slot), list(bases_of(plan)).index(plan.slots[slot].base)
    start = sum(list(ranks(plan).values())[:at])
    rows, expert, total = slice(start, start + plan.slots[slot].rank), layer.experts.expert(slot), 0.0
    for token, gate in zip(*map(torch.Tensor.tolist, layer.routed(slot)), strict=True):
        x = layer.sample.hidden[token]
        seen = {"gate": x, "up": x, "down": layer.experts.hidden(expert, x[None])[0]}
        for part, u in seen.items():
            stored = built[f"low_rank_base_{part}"][base].double()
            if f"low_rank_{part}_in" in built:
                inner, outer = (built[f"low_rank_{part}_{side}"][rows].double() for side in ("in", "out"))
                stored = stored + outer.T @ inner
            total += gate**2 * float(((expert[part] - stored) @ u.double()).square().sum())
    return total


def total_residual(layer: LayerView, plan: LayerPlan, **options: str) -> float:
    built = LightMoE(**({"base": "average", "start": "svd"} | options)).build(layer, plan)
    return sum(residual(layer, plan, built, slot) for slot in ranks(plan))


def output_residual(layer: LayerView, plan: LayerPlan, built: dict[str, torch.Tensor]) -> float:
    """Return sum_t g^2 |y - y'|^2 over all replaced experts, with y' what they give with their matrices replaced."""
    total, at = 0.0, 0
    for slot, rank in ranks(plan).items():
        rows, base, at = slice(at, at + rank), list(bases_of(plan)).index(plan.slots[slot].base), at + rank
        reduced = {}
        for part in ("gate", "up", "down"):
            inner, outer = (built[f"low_rank_{part}_{side}"][rows] for side in ("in", "out"))
            reduced[part] = built[f"low_rank_base_{part}"][base] + outer.T @ inner
        reduced = {part: matrix.to(built["low_rank_base_down"]) for part, matrix in reduced.items()}
        reduced |= {name.removeprefix("low_rank_base_"): built[name][base] for name in built if name.endswith("_bias")}
        token, gate = layer.routed(slot)
        given = layer.experts.hidden(reduced, layer.sample.hidden[token]) @ reduced["down"].T + reduced.get(
            "down_bias", 0
        )
        total += float(
            (gate.square() * (layer.experts.outputs(slot, layer.sample.hidden[token]) - given).square().sum(1)).sum()
        )
    return total


def test_the_shortest_prefix_that_exceeds_the_share_is_replaced() -> None:
    layers = [layer_of_mass([4, 3, 2, 0.5, 0.5]), layer_of_mass([2, 2, 2, 2, 2], 1)]
    # Gate mass in ascending order: .05 .1 .3 .6 1 and .2 .4 .6 .8 1. Up to a share of .1 layer 0 replaces two, which
    # stores 4 + 5; at .1 that is not exceeded by two, so three go, which stores 3 + 5: the 8 that there is room for.
    assert [replaced(plan) for plan in plans(layers, 4, select="uniform")] == [[2, 3, 4], []]


@pytest.mark.parametrize(("clip", "expected"), [(1.0, (math.exp(0.15), math.exp(-0.15))), (0.1, (1.1, 0.9))])
def test_a_layer_with_larger_logits_gives_less(clip: float, expected: tuple[float, float]) -> None:
    layers = [layer_of_mass([1] * 6, loud=1.0), layer_of_mass([1] * 6, 1, loud=3.0)]
    assert _factors(layers, 0.3, clip) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("select", ["adaptive", "uniform", "count"])
def test_bytes_are_met_within_an_expert_a_layer_and_more_room_replaces_less(select: str) -> None:
    generator = torch.Generator().manual_seed(5)
    layers = [layer_of_mass(torch.rand(12, generator=generator).tolist(), n, 1 + n) for n in range(3)]
    own = 3 * (WIDTH + INNER) * 4
    before = 0
    for stored in range(4, 12):
        found = plans(layers, stored, select=select)
        spent = sum(plan.stored * WHOLE + len(ranks(plan)) * own for plan in found)
        allowed = sum(layer.nbytes for layer in layers)
        assert allowed - 3 * WHOLE < spent <= allowed
        assert sum(len(plan.pool) for plan in found) >= before
        before = sum(len(plan.pool) for plan in found)


@pytest.mark.parametrize(("replaced", "billions"), [(24, 4.86), (31, 4.17), (38, 3.49)])
def test_sizes_are_those_of_the_paper(replaced: int, billions: float) -> None:
    """OLMoE-1B-7B with 16 layers of 64 experts, 3 bases and rank 16: its table of sizes, in parameters."""
    expert, shape = 3 * 2048 * 1024, ExpertShape(width=2048, intermediate=1024)
    stacks = [
        Stack(prefix=f"model.layers.{n}", index=n, num_experts=64, expert_bytes=2 * expert, dtype="BF16", shape=shape)
        for n in range(16)
    ]
    facts = ModelFacts(
        source="",
        fingerprint={},
        model_type="olmoe",
        width=2048,
        top_k=8,
        groups=Groups(),
        nbytes=2 * 6_919_161_856,
        stacks=tuple(stacks),
    )
    plan = LightMoE(bases=3, rank=16).estimate(64, 64 - replaced + 3)
    assert len(ranks(plan)) == replaced
    nbytes = planned_nbytes(facts, {stack.prefix: plan for stack in stacks})
    assert nbytes / 2e9 == pytest.approx(billions, abs=0.01)
    # rho = 1 - [(N - N' + M) n m + N' r (n + m)] / (N n m)
    n, m = 2048, 1024
    rho = 1 - ((64 - replaced + 3) * n * m + replaced * 16 * (n + m)) / (64 * n * m)
    assert 2 * 6_919_161_856 - nbytes == pytest.approx(rho * 16 * 64 * 2 * expert)


def test_remove_is_a_share_of_all_parameters(calibration: GetCalibration) -> None:
    budget = moetailor.Budget.parse(remove="30%")
    plan = moetailor.make_plan(calibration("olmoe"), "lightmoe", budget, parameters={"rank": 1, "bases": 1})
    expert = plan.model.stacks[0].expert_bytes * len(plan.layers)
    assert 0.7 * plan.model.nbytes - expert < plan.nbytes <= 0.7 * plan.model.nbytes
    assert plan.budget == "remove 30%"


def test_bases_are_named_after_the_members_with_most_mass_and_gather_their_likes() -> None:
    layer = layer_of_mass([9, 9, 5, 1, 4, 2])
    logits = layer.sample.logits
    logits[:, 3], logits[:, 5] = logits[:, 4] * 2, logits[:, 2] * 3
    (plan,) = plans([layer], 4, bases=2, select="count")
    assert plan.pool == [0, 1]
    assert members(plan) == {2: [2, 5], 4: [3, 4]}


def test_a_base_is_the_average_by_gate_mass_and_the_paper_starts_there() -> None:
    layer = layer_of_mass([9, 9, 1, 3])
    (plan,) = plans([layer], 3, select="count")
    assert members(plan) == {3: [2, 3]}
    built, every = LightMoE(base="average", start="zero").build(layer, plan), layer.experts.matrices()
    for part in ("gate", "up", "down"):
        torch.testing.assert_close(built[f"low_rank_base_{part}"][0], 0.25 * every[part][2] + 0.75 * every[part][3])
        assert torch.count_nonzero(built[f"low_rank_{part}_out"]) == 0
        assert torch.count_nonzero(built[f"low_rank_{part}_in"]) > 0


@pytest.mark.parametrize("base", ["average", "mean", "least_squares", "dominant"])
def test_copies_share_a_base_without_loss(base: str) -> None:
    module = with_copy(random_experts(3), of=2)
    layer = routed_layer(module, 200, seed=0)
    layer.index, layer.expert_bytes = 0, WHOLE
    layer.sums.gate.copy_(torch.tensor([9.0, 8.0, 1.0, 2.0]))
    (plan,) = plans([layer], 3, select="count", base=base)
    assert members(plan) == {3: [2, 3]}
    assert total_residual(layer, plan, base=base) < 1e-6


def layer_of_six() -> LayerView:
    layer = layer_of_mass([9, 8, 1, 2, 3, 4])
    layer.read_sample = routed_layer(random_experts(6), 300, seed=3).read_sample
    layer.__dict__.pop("sample", None)
    layer.sums.gate_sq_norm_sq.copy_(torch.tensor([1.0, 1, 1, 2, 3, 4]))
    layer.expert_bytes *= 100  # so that any rank is allowed
    return layer


def test_low_rank_parts_take_more_away_with_each_rank_and_everything_at_the_last() -> None:
    losses = []
    for rank in range(min(WIDTH, INNER) + 1):
        layer = layer_of_six()
        (plan,) = plans([layer], 3, select="count", rank=rank)
        losses.append(total_residual(layer, plan))
    assert all(later < sooner for sooner, later in itertools.pairwise(losses))
    assert losses[-1] < 1e-6 * losses[0]


def test_a_fitted_down_projection_makes_up_for_what_the_other_matrices_lost() -> None:
    for rank in range(1, min(WIDTH, INNER)):
        losses = {}
        for start in ("svd", "fitted"):
            layer = layer_of_six()
            (plan,) = plans([layer], 3, select="count", rank=rank)
            losses[start] = output_residual(layer, plan, LightMoE(base="mean", start=start).build(layer, plan))
        assert losses["fitted"] < losses["svd"]


def test_a_down_projection_is_fitted_beside_the_bias_of_its_base() -> None:
    layer, module = layer_with_biases()
    with torch.no_grad():
        module.down_proj_bias += 30
    plan = LayerPlan(slots=(Keep(), *(LowRank(1, 8) for _ in range(1, layer.num_experts))))
    losses = [
        output_residual(layer, plan, LightMoE(base="mean", start=start).build(layer, plan))
        for start in ("svd", "fitted")
    ]
    assert losses[1] < 0.9 * losses[0]


def test_a_down_projection_fitted_on_few_tokens_is_no_worse_on_others() -> None:
    """With three tokens of the layer for each neuron: a fit that follows all of them loses several times as much."""
    losses = dict.fromkeys(("svd", "fitted"), 0.0)
    others = routed_layer(random_experts(6), 600, seed=90).sample
    for seed in range(8):
        few = routed_layer(random_experts(6), 3 * INNER, seed=seed).sample
        for start in losses:
            layer = layer_of_six()
            layer.read_sample = lambda few=few: few
            layer.close()
            (plan,) = plans([layer], 3, select="count", rank=1)
            built = LightMoE(base="mean", start=start).build(layer, plan)
            layer.read_sample = lambda: others
            layer.close()
            losses[start] += output_residual(layer, plan, built)
    assert losses["fitted"] < 1.05 * losses["svd"]


def test_the_down_projection_of_an_expert_without_tokens_is_its_own() -> None:
    """What others send it says which of it matters: no fit to them takes its place."""
    layer = layer_of_six()
    layer.sample.index.masked_fill_(layer.sample.index == 2, 3)
    (plan,) = plans([layer], 3, select="count", rank=2)
    assert min(ranks(plan)) == 2
    built = LightMoE(base="mean", start="fitted").build(layer, plan)
    own, reduced = layer.experts.expert(2), {}
    for part in ("gate", "up", "down"):
        factors = built[f"low_rank_{part}_out"][:2].T @ built[f"low_rank_{part}_in"][:2]
        reduced[part] = built[f"low_rank_base_{part}"][0] + factors
    count = 4 * WIDTH  # twice as many as it lacks, which is two for each dimension
    others = layer.sample.hidden[torch.arange(count) * 300 // count]
    moment = second_moment(layer.experts.hidden(reduced, others), torch.ones(count))
    base = built["low_rank_base_down"][0]
    nearest = approximate(own["down"] - base, moment).matrix(2)
    torch.testing.assert_close(reduced["down"] - base, nearest, rtol=1e-3, atol=1e-3)


def test_the_mean_base_is_the_mean() -> None:
    layer = layer_of_mass([9, 9, 1, 3])
    (plan,) = plans([layer], 3, select="count")
    built, every = LightMoE(base="mean", start="zero").build(layer, plan), layer.experts.matrices()
    for part in ("gate", "up", "down"):
        torch.testing.assert_close(built[f"low_rank_base_{part}"][0], every[part][members(plan)[3]].mean(0))


def test_the_least_squares_base_loses_no_more_than_the_average() -> None:
    """Weighted as it is fitted: by gate mass over the energy of the gates."""
    losses = {}
    for base in ("average", "least_squares"):
        layer = layer_of_six()
        (plan,) = plans([layer], 3, select="count", rank=0)
        built = LightMoE(base=base, start="svd").build(layer, plan)
        weight = [float(layer.sums.gate[n] / layer.routed(n)[1].square().sum()) for n in ranks(plan)]
        losses[base] = sum(w * residual(layer, plan, built, n) for w, n in zip(weight, ranks(plan), strict=True))
    assert losses["least_squares"] < losses["average"]


def test_chosen_ranks_spend_the_same_rows_where_they_count() -> None:
    layer = layer_of_six()
    (given,) = plans([layer], 3, select="count", rank=2)
    (chosen,) = plans([layer_of_six()], 3, select="count", rank=2, ranks="chosen")
    assert sum(ranks(chosen).values()) == sum(ranks(given).values())
    assert ranks(chosen)[5] > ranks(chosen)[2]
    built = LightMoE(base="average", start="svd").build(layer, chosen)
    assert len(built["low_rank_up_in"]) == sum(ranks(chosen).values())


def test_one_base_serves_all_experts_but_one() -> None:
    """The form of D2-MoE: the expert with the most gate mass stays."""
    layer = layer_of_mass([0.1, 0.3, 0.2, 0.4])
    (plan,) = plans([layer], 2, rank=2, select="count", start="svd")
    (base,) = bases_of(plan)
    assert plan.slots == (LowRank(base, 2), LowRank(base, 2), LowRank(base, 2), Keep())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(moetailor.PlanError, match="such a low-rank part is no smaller than an expert"):
        plans([layer_of_mass([1] * 6)], 4, rank=INNER)
    layer = layer_of_mass([1] * 6)
    layer.protected = frozenset({0, 1, 2})
    with pytest.raises(moetailor.PlanError, match="leaves no room for a base"):
        plans([layer], 3)


def test_a_plan_that_names_a_base_after_a_stranger_is_refused(tmp_path: Path, calibration: GetCalibration) -> None:
    plan = moetailor.make_plan(
        calibration("olmoe"), "lightmoe", moetailor.Budget.parse(keep=6), parameters={"rank": 1, "bases": 1}
    )
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    base, kept = next((next(iter(bases_of(layer))), layer.pool[0]) for layer in plan.layers.values())
    (tmp_path / "plan.json").write_text(text.replace(f'"base": {base}', f'"base": {kept}', 1))
    with pytest.raises(moetailor.PlanError, match="a base is named after one of its members"):
        check_plan(moetailor.Plan.load(tmp_path / "plan.json"), plan.model)
