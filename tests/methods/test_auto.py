"""Auto without bits: prices against plain sums, budgets, and what goes first."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import Constant, Drop, Keep, LowRank, Remap
from moetailor.calibration.domains import balanced
from moetailor.calibration.folder import SENSITIVITY
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.layout import Stack
from moetailor.fitting.held_out import held_out_masks
from moetailor.methods.auto import Auto, _weight
from moetailor.methods.mix_plain import COMPARED, Choice, _errors, _menu, _nearest, base_of, choice
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import stored_nbytes
from moetailor.planning.view import LayerView
from support.hand import prices_of
from support.layers import INNER, WIDTH, layer_of_tokens, random_experts, with_copy
from support.planted import Planted, planted_batches, planted_model

WHOLE = 4 * 3 * WIDTH * INNER
Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def layer(experts: int = 5, seed: int = 0, tokens: int = 400) -> LayerView:
    made = layer_of_tokens(random_experts(experts, seed), tokens, seed)
    made.index, made.expert_bytes = seed, WHOLE
    made.sums.gate.copy_(made.sums.gate_sq)
    made.prices = prices_of(1.0, 1.0, 1.0)
    return made


def choice_of(made: LayerView, balance: float) -> Choice:
    return choice(made, _weight(made, balance))


def spent(plan: LayerPlan) -> int:
    shape = ExpertShape(width=WIDTH, intermediate=INNER)
    stack = Stack(prefix="", index=0, num_experts=len(plan.slots), expert_bytes=WHOLE, dtype="F32", shape=shape)
    return stored_nbytes(plan, stack)


def predicted(made: LayerView, plan: LayerPlan) -> float:
    """Return what a plan's answers cost by their prices, slot by slot."""
    found, cost = choice_of(made, 0.0), 0.0
    for expert, answer in enumerate(plan.slots):
        own = replace(answer, base=0) if isinstance(answer, LowRank) else answer
        at = found.answers[expert].index(own)
        if own != Keep():
            cost += float(found.menu.errors[expert, at])
    return cost


def test_prices_are_plain_sums_over_tokens_that_were_held_out() -> None:
    made = layer()
    slots, base = _menu(made), base_of(made)
    errors = dict(zip(slots, _errors(made, 2, base, slots).tolist(), strict=True))
    token, gate = made.routed(2)
    matrices = made.experts.expert(2)
    left = constant = 0.0
    for held in held_out_masks(token, 8 * WIDTH):
        weight = gate.double().square()
        y = made.experts.outputs(2, made.sample.hidden[token]).double()
        mean = (weight[~held, None] * y[~held]).sum(0) / weight[~held].sum()
        for at in held.nonzero().flatten().tolist():
            x = made.sample.hidden[token[at]][None]
            given = (made.experts.hidden(base, x) @ base["down"].T)[0].double()
            left += float(weight[at] * (y[at] - given).square().sum())
            constant += float(weight[at] * (y[at] - mean).square().sum())
    assert errors[LowRank(0)] == pytest.approx(errors[Constant()] * left / constant, rel=1e-4)
    assert torch.equal(matrices["up"], made.experts.expert(2)["up"])


def test_errors_fall_with_the_rank_to_nothing() -> None:
    made = layer()
    slots = [LowRank(0, rank) for rank in range(INNER + 1)]
    errors = _errors(made, 0, base_of(made), [Constant(), *slots])
    assert (errors[2:] <= errors[1:-1] * (1 + 1e-3)).all()
    assert errors[-1] < 1e-6 * errors[0]


def test_a_budget_is_met_and_more_of_it_loses_less() -> None:
    before = torch.inf
    for share in (0.5, 0.7, 0.9):
        layers = [layer(6, seed=seed) for seed in (1, 2)]
        for made in layers:
            made.nbytes = int(6 * WHOLE * share)
        plans = list(Auto(bits=False).plan_layers(layers, [3, 3]))
        total = sum(spent(plan) for plan in plans)
        assert total <= sum(made.nbytes for made in layers)
        lost = sum(map(predicted, layers, plans))
        assert sum(plan.expected or 0 for plan in plans) == pytest.approx(lost, rel=1e-5)
        assert lost <= before * (1 + 1e-3)
        before = lost


def silent(dead: int) -> LayerView:
    """Return a layer with one expert that no token reached."""
    made = layer(5)
    alive = (made.sample.index != dead).all(1)
    for name in ("key", "hidden", "index", "gate", "logits"):
        setattr(made.sample, name, getattr(made.sample, name)[alive])
    for name in ("count", "gate", "gate_sq", "gate_sq_output", "gate_sq_norm_sq"):
        getattr(made.sums, name)[dead] = 0
    return made


@pytest.mark.parametrize("groups", [1, 5])
def test_what_no_token_reached_is_answered_by_no_other_expert(groups: int) -> None:
    """On no token it costs nothing, which says nothing; only to drop it is safe, where the router may lose a slot."""
    dead, made = 3, silent(3)
    made.groups = groups
    found = choice_of(made, 0.0)
    for expert, answers in enumerate(found.answers):
        costs = dict(zip(answers, found.menu.errors[expert].tolist(), strict=False))
        others = [cost for slot, cost in costs.items() if isinstance(slot, Remap)]
        assert len(others) == 2
        assert [cost == torch.inf for cost in others] == [expert == dead] * 2
        assert costs[Drop()] == (0 if expert == dead and groups == 1 else torch.inf)


def test_a_slot_that_no_token_reached_is_dropped_before_anything_else() -> None:
    dead, made = 3, silent(3)
    made.nbytes = 4 * WHOLE
    (plan,) = Auto(bits=False).plan_layers([made], [4])
    assert plan.pool == [0, 1, 2, 4]
    assert plan.slots[dead] == Drop()
    assert plan.expected == 0


def test_of_copies_one_stays_and_answers_for_the_others_in_their_scale() -> None:
    module = with_copy(with_copy(random_experts(2)), 0)
    module.down_proj.data[3] *= 0.5
    made = layer_of_tokens(module, 400, 0)
    made.expert_bytes, made.prices = WHOLE, prices_of(1.0)
    made.sums.gate.copy_(made.sums.gate_sq)
    made.nbytes = 2 * WHOLE
    (plan,) = Auto(bits=False).plan_layers([made], [2])
    (stays,) = set(plan.pool) - {1}
    assert {answer.expert(slot) for slot, answer in enumerate(plan.slots)} == {1, stays}
    size = {0: 1.0, 2: 1.0, 3: 0.5}
    for expert, factor in size.items():
        assert plan.slots[expert].scale == pytest.approx(factor / size[stays], rel=1e-3)
    assert plan.expected == pytest.approx(0, abs=1e-8)


def test_errors_count_by_what_they_do_to_the_predictions() -> None:
    """Of two equal layers the one whose errors cost ten times as much keeps more."""
    layers = [layer(6, seed=1), layer(6, seed=1)]
    for index, made in enumerate(layers):
        made.index, made.prices, made.nbytes = index, prices_of(1.0, 10.0), 3 * WHOLE
    cheap, dear = Auto(bits=False).plan_layers(layers, [3, 3])
    assert spent(cheap) < spent(dear)
    alone = layer(6, seed=1)
    assert dear.expected == pytest.approx(10 * predicted(alone, dear), rel=1e-5)


def test_what_goes_first_is_not_where_equal_counts_would_take_it(calibration: GetCalibration, tmp_path: Path) -> None:
    """Where nearly all stays, equal counts leave the first layers whole; here the first is where errors cost least."""
    made = moetailor.Calibration.open(shutil.copytree(calibration("olmoe").folder, tmp_path / "calib"))
    effects = json.loads((made.folder / SENSITIVITY).read_text())
    for found in effects["layers"]["1"].values():
        found["kl"] *= 1e6
    made, budget = made.with_sensitivities(effects), moetailor.Budget.parse(size="97%")
    equal = moetailor.make_plan(made, "mone", budget)
    auto = moetailor.make_plan(made, "auto", budget, parameters={"bits": False})
    assert (list(equal.by_layer), list(auto.by_layer)) == ([1], [0])


def test_what_a_small_domain_needs_weighs_more() -> None:
    """Three tokens of four are of one domain: their weights are 1 and 1 for balance 0, 2/3 and 2 for 1."""
    domain = torch.tensor([0, 0, 0, 1])
    assert balanced(domain, 0.0).tolist() == [1, 1, 1, 1]
    assert balanced(domain, 1.0).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    made = layer(5)
    made.read_domains = lambda: (made.sample.index == 2).any(1).long()
    plain, evened = choice_of(made, 0.0), choice_of(made, 1.0)
    weight = balanced(made.domains, 1.0)
    for expert in range(5):
        token, gate = made.routed(expert)
        mean = sum(float(g) ** 2 * float(weight[t]) for t, g in zip(token, gate, strict=True)) / float(
            gate.square().sum()
        )
        torch.testing.assert_close(evened.menu.errors[expert], plain.menu.errors[expert] * mean, rtol=1e-5, atol=0)
    taken = [0, 1, 2, 3, len(plain.menu.price)]
    assert evened.cost(taken) != pytest.approx(plain.cost(taken), rel=1e-2)
    assert evened.plan(taken).expected == pytest.approx(plain.cost(taken), rel=1e-6)


def test_a_domain_of_very_few_tokens_counts_as_one_percent() -> None:
    """One token of a thousand: a stray label must not steer everything."""
    domain = torch.tensor([0] * 999 + [1])
    common, stray = 0.999**-0.75, 0.01**-0.75
    mean = (999 * common + stray) / 1000
    weight = balanced(domain, 0.75)
    assert weight[0] == pytest.approx(common / mean)
    assert weight[-1] == pytest.approx(stray / mean)


def test_remove_is_what_mone_writes(calibration: GetCalibration) -> None:
    budget = moetailor.Budget.parse(remove="50%")
    novices = moetailor.make_plan(calibration("olmoe"), "mone", budget)
    found = moetailor.make_plan(calibration("olmoe"), "auto", budget, parameters={"bits": False})
    assert novices.nbytes - 2 * novices.model.width * 4 * 4 < found.nbytes <= novices.nbytes


def test_a_budget_of_memory_holds_for_the_loaded_model(checkpoint: Get, calibration: GetCalibration) -> None:
    whole = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), dtype=torch.bfloat16)
    memory = sum(tensor.nbytes for tensor in whole.state_dict().values()) * 7 // 10
    plan = moetailor.make_plan(
        calibration("olmoe"),
        "auto",
        moetailor.Budget.parse(memory=memory, load_dtype="bfloat16"),
        parameters={"bits": False},
    )
    small = moetailor.apply(plan, whole, calibration=calibration("olmoe"))
    held = sum(tensor.nbytes for tensor in small.state_dict().values() if tensor.is_floating_point())
    assert 0.97 * memory < held <= memory


def test_a_plan_reads_the_text_once(calibration: GetCalibration, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = moetailor.Calibration.batches, []
    monkeypatch.setattr(moetailor.Calibration, "batches", lambda self: reads.append(self) or read(self))
    made = moetailor.Calibration.open(calibration("olmoe").folder)
    budget = moetailor.Budget.parse(remove="25%")
    moetailor.make_plan(made, "auto", budget)
    assert (len(made.layers), len(reads)) == (2, 1)
    moetailor.make_plan(made, "reap", budget)
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_all_that_is_redundant_goes_at_no_loss_before_anything_else(name: str, tmp_path: Path) -> None:
    model, what = planted_model(name), Planted()
    made = moetailor.calibrate(model, tmp_path / "c", text=planted_batches(), sensitivity=True)
    copies = {what.original, what.duplicate, what.permuted, what.scaled}
    stack, layers, number = made.model.stacks[0], len(made.layers), 4  # bytes of a number
    # copies and dead experts cost nothing, a constant its width, a map its width and two factors
    least = made.model.width * number * (1 + 1 + 2 * what.rank)
    gain = len(what.redundant) * stack.expert_bytes - least
    for share in (1.0, 0.5):
        budget = moetailor.Budget.parse(size=made.model.nbytes - int(layers * gain * share))
        plan = moetailor.make_plan(
            made, "auto", budget, parameters={"bits": False}, weights=moetailor.ExpertWeights(model)
        )
        assert budget.size is not None
        assert plan.nbytes <= budget.size
        assert plan.expected == pytest.approx(0, abs=1e-6)
        for layer in plan.by_layer.values():
            gone = set(range(stack.num_experts)) - set(layer.pool)
            assert gone <= what.redundant | copies
            assert copies - gone
            if share == 1:
                assert len(gone) == len(what.redundant)
    ids = planted_batches(seed=2)[0].input_ids[:4]
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        small = moetailor.apply(plan, model, calibration=made)
        after = small(ids).logits.log_softmax(-1)
    assert float((before.exp() * (before - after)).sum(-1).mean()) < 1e-5


def test_a_base_that_only_one_leans_on_is_its_expert() -> None:
    found = choice_of(layer(5), 0.0)
    low = found.answers[0].index(LowRank(0, 1))
    whole = len(found.menu.price)
    plan = found.plan([low, *[whole] * 4])
    assert plan.slots == (Keep(),) * 5
    assert plan.expected == 0
    assert found.plan([low, low, *[whole] * 3]).of(LowRank) == {0: LowRank(0, 1), 1: LowRank(0, 1)}


def test_what_another_expert_misses_is_measured_on_other_tokens() -> None:
    made = layer(5)
    others, scales, lost = _nearest(made)
    for expert in range(5):
        token, gate = made.routed(expert)
        part = slice(COMPARED, 2 * COMPARED) if len(token[COMPARED : 2 * COMPARED]) >= 8 else slice(None)
        y = made.experts.outputs(expert, made.sample.hidden[token[part]])
        for other, scale, share in zip(others[expert], scales[expert], lost[expert], strict=True):
            given = float(scale) * made.experts.outputs(int(other), made.sample.hidden[token[part]])
            weight = gate[part].square()
            left = float((weight * (y - given).square().sum(1)).sum()) / float((weight * y.square().sum(1)).sum())
            assert float(share) == pytest.approx(left, rel=1e-4)
