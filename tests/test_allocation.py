"""How many experts each layer keeps: the rules against all allocations there are, files, and the search."""

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moetailor
from moetailor.calibration.effects import Prices
from moetailor.calibration.statistics import Sums
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import MoetailorError, PlanError
from moetailor.evaluation.fidelity import Reference
from moetailor.evaluation.search import with_slots
from moetailor.methods.allocation import AllocationBounds, counts_of, read_allocation, weighted_errors
from moetailor.methods.choose import best_of_all
from moetailor.methods.evolution import SearchOptions, evolve, mutated
from moetailor.methods.registry import find_method
from moetailor.methods.run import view_of
from moetailor.planning.budget import Budget
from moetailor.planning.view import LayerView
from moetailor_cli.app import main
from support import naive
from support.families import tiny_model
from support.hand import layer_of, prices_of, sums_of
from support.methods import REFUSED_BY, REMOVING, TINY_PARAMETERS

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
REFERENCE = Path(__file__).parent.parent / "examples" / "reference-moe"
RULES = ("error", "global")
SPREADING = {"seer_moe": {"ranking": "global"}, "m_smoe": {"budget": "global"}, "conmoe": {"scope": 2}, "auto": {}}
SHAPE = ExpertShape(width=8, intermediate=3)
STACKS = [
    Stack(
        prefix=f"l.{n}",
        index=n,
        num_experts=30,
        expert_bytes=100,
        slot_bytes=4,
        dtype="F32",
        shape=ExpertShape(width=8, intermediate=3),
    )
    for n in (1, 2)
]


def bare(experts: int, **fields: object) -> LayerView:
    return layer_of(Sums.zeros(experts, 2), **fields)


def lost(worth: torch.Tensor, keep: int, groups: int, protected: frozenset[int]) -> float:
    """Return what the least worthy of each group sum to when as many of each group stay; inf where that cannot be."""
    size, total = len(worth) // groups, 0.0
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        free = sorted(float(worth[expert]) for expert in members if expert not in protected)
        gone = size - keep // groups
        total += sum(free[:gone]) if gone <= len(free) else float("inf")
    return total


@pytest.mark.parametrize(("groups", "protected"), [(1, ()), (2, ()), (1, (0, 1, 2)), (2, (1, 4))])
def test_no_allocation_of_the_same_total_loses_less(groups: int, protected: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(groups)
    held = frozenset(protected)
    for keep in range(8, 19, groups):
        worths = [torch.rand(6, generator=generator) ** 4 * scale for scale in (1, 3, 0.1)]
        layers = [bare(6, index=n, protected=held if n == 2 else frozenset()) for n in range(3)]
        least = [groups, 2, groups]
        found = best_of_all(layers, worths, keep, least, groups=groups)
        assert sum(found) == keep

        def loss(counts: tuple[int, ...], worths: list = worths, layers: list = layers) -> float:
            rows = zip(worths, counts, layers, strict=True)
            return sum(lost(worth, count, groups, layer.protected) for worth, count, layer in rows)

        every = [range(fewest, 7, groups) for fewest in least]
        possible = [counts for counts in itertools.product(*every) if sum(counts) == keep]
        assert tuple(found) in possible
        assert loss(tuple(found)) == pytest.approx(min(map(loss, possible)))


def test_the_error_of_a_constant_by_hand() -> None:
    # Expert 0 always gives (3, 4): a constant loses nothing. Expert 1 gives (1, 0) and (-1, 0) with gates 1 and 2:
    # sum g^2 |y|^2 = 5, |sum g^2 y|^2 / sum g^2 = 9 / 5, so 3.2 over four tokens. Expert 2 is reached by none.
    pairs = [(0, 1.0, [3.0, 4.0]), (0, 2.0, [3.0, 4.0]), (1, 1.0, [1.0, 0.0]), (1, 2.0, [-1.0, 0.0])]
    sums = sums_of(pairs, experts=3, tokens=4)
    (nats,) = weighted_errors([layer_of(sums, prices=prices_of(0.5))])
    torch.testing.assert_close(nats, torch.tensor([0, 0.4, 0], dtype=torch.float64))
    (shares,) = weighted_errors([layer_of(sums)])
    torch.testing.assert_close(shares, torch.tensor([0, 1, 0], dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "keep"), [("olmoe", 6), ("deepseek_v3", 9)])
def test_what_is_protected_stays_in_a_layer_that_would_keep_fewer(
    family: str, keep: int, rule: str, calibration: GetCalibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of the first layer cost nearly nothing, and its scores are nearly all of one expert."""
    calibrated = calibration(family)
    first, *others = calibrated.layers
    whole = moetailor.Calibration.sums

    def sums(self: moetailor.Calibration, layer: int) -> Sums:
        found = whole(self, layer)
        if layer == first:
            found.gated_norm[0] = 1e9
        return found

    coarse = {first: 1e-9} | dict.fromkeys(others, 1.0)
    prices = Prices(coarse=coarse, noise=coarse, flips=coarse, together=())
    monkeypatch.setattr(moetailor.Calibration, "prices", prices)
    monkeypatch.setattr(moetailor.Calibration, "sums", sums)
    groups, experts = calibrated.model.groups.count, calibrated.model.stacks[0].num_experts
    budget = Budget.parse(keep=keep)
    free = moetailor.make_plan(calibrated, "reap", budget, allocation=rule)
    few = len(free.by_layer[first].pool)
    assert few < keep
    # In each group the last ones, one more than would stay.
    size = experts // groups
    held = {group * size + size - 1 - n for group in range(groups) for n in range(few // groups + 1)}
    protect = [(first, expert) for expert in held]
    plan = moetailor.make_plan(calibrated, "reap", budget, allocation=rule, protect=protect)
    kept = plan.by_layer[first].pool if first in plan.by_layer else range(experts)
    assert held <= set(kept)
    assert plan.nbytes == free.nbytes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("method", "family"),
    [
        (method, family)
        for method in REMOVING
        if method not in ("auto", "camera")  # which decide it themselves
        for family in ("olmoe", "deepseek_v3")
        if family not in REFUSED_BY.get(method, frozenset())
    ],
)
def test_every_rule_keeps_the_total_and_the_bytes(
    method: str, family: str, rule: str, calibration: GetCalibration
) -> None:
    calibrated = calibration(family)
    groups = calibrated.model.groups.count
    budget = Budget.parse(keep=calibrated.model.stacks[0].num_experts - groups)
    parameters = TINY_PARAMETERS.get(method, {}) | ({"select": "count"} if method == "lightmoe" else {})
    uniform = moetailor.make_plan(calibrated, method, budget, parameters=parameters)
    assert uniform == moetailor.make_plan(calibrated, method, budget, parameters=parameters, allocation="uniform")
    assert uniform.budget == str(budget)
    assert all(bool(layer.scores) == find_method(method).scores for layer in uniform.layers.values())
    if rule == "global" and not find_method(method).scores:
        with pytest.raises(PlanError, match=f"global: {method} gives experts no scores of their own; use error"):
            moetailor.make_plan(calibrated, method, budget, parameters=parameters, allocation=rule)
        return
    plan = moetailor.make_plan(calibrated, method, budget, parameters=parameters, allocation=rule)
    assert plan.budget == f"{budget}, allocation {rule}"
    # LightMoE needs no base, and no parts on it, in a layer that stays whole.
    assert plan.nbytes <= uniform.nbytes if method == "lightmoe" else plan.nbytes == uniform.nbytes
    if find_method(method).replaces_with.drops:
        assert all(len(layer.pool) % groups == 0 for layer in plan.layers.values())


def test_a_global_rule_gives_what_shares_out_bytes_those_of_equal_layers(calibration: GetCalibration) -> None:
    """Ranks that are chosen within a layer's bytes have them before layers are held against each other, too."""
    budget, chosen = Budget.parse(remove="50%"), {"rank": 2, "ranks": "chosen"}
    plan = moetailor.make_plan(calibration("olmoe"), "linear", budget, parameters=chosen, allocation="global")
    uniform = moetailor.make_plan(calibration("olmoe"), "linear", budget, parameters=chosen)
    assert plan.nbytes <= uniform.nbytes


@pytest.mark.parametrize("method", ["refit", "naee", "compressed_experts"])
def test_what_gives_no_scores_is_refused_before_it_searches(
    method: str, calibration: GetCalibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moetailor.METHODS[method], "plan_layers", lambda *_: pytest.fail("searched"))
    with pytest.raises(PlanError, match=f"global: {method} gives experts no scores of their own; use error"):
        moetailor.make_plan(calibration("olmoe"), method, Budget.parse(remove="50%"), allocation="global")


def test_a_global_rule_is_what_methods_that_spread_themselves_do(calibration: GetCalibration) -> None:
    calibrated, budget = calibration("olmoe"), Budget.parse(remove="50%")
    for method, own in (("seer_moe", {"ranking": "global"}), ("m_smoe", {"budget": "global"})):
        theirs = moetailor.make_plan(calibrated, method, budget, parameters=own)
        ours = moetailor.make_plan(calibrated, method, budget, allocation="global")
        assert ours.layers == theirs.layers


@pytest.mark.parametrize("method", SPREADING)
def test_a_method_that_spreads_itself_is_not_told_how(method: str, calibration: GetCalibration) -> None:
    with pytest.raises(PlanError) as refusal:
        moetailor.make_plan(
            calibration("olmoe"),
            method,
            Budget.parse(remove="25%"),
            parameters=SPREADING[method],
            allocation="error",
        )
    assert str(refusal.value) == f"--allocation: {method} here decides itself what each layer keeps; leave it uniform"


def test_counts_by_hand_are_kept(calibration: GetCalibration, checkpoint: Get, tmp_path: Path) -> None:
    calibrated = calibration("olmoe")
    plan = moetailor.make_plan(calibrated, "reap", Budget.parse(keep=6), allocation={0: 8, 1: "50%"})
    assert {index: len(layer.pool) for index, layer in plan.by_layer.items()} == {1: 4}
    assert plan.budget == "keep 6, allocation given"
    with pytest.raises(PlanError, match="format native holds dropped slots only, the same number in every MoE layer"):
        moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", format="native")
    out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out")
    assert moetailor.Plan.load(out / "moetailor_plan.json") == plan


def test_shares_are_rounded_as_those_to_remove_are() -> None:
    for percent in range(1, 100):
        kept = Budget.parse(remove=f"{percent}%").kept(30)
        assert counts_of({1: f"{100 - percent}%", 2: 30}, STACKS) == {"l.1": kept, "l.2": 30}
    assert counts_of({1: 0.75, 2: 1.0}, STACKS) == {"l.1": 23, "l.2": 30}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({1: 3, 2: 3, 7: 3}, "--allocation: [7] are no MoE layers to change; those are 1, 2"),
        ({2: 3}, "--allocation: nothing is said of layers 1; give each its number of experts"),
        ({1: 0, 2: 3}, "--allocation: layer 1 keeps 0 of 30 experts; keep 1 to 30"),
        ({1: 31, 2: 3}, "--allocation: layer 1 keeps 31 of 30 experts; keep 1 to 30"),
        ({1: "110%", 2: 3}, "--allocation: layer 1 keeps 110% of 30 experts; keep 1 to 30"),
        ({1: "many", 2: 3}, "--allocation: layer 1 keeps 'many'; write a number of experts or a share"),
        ({1: True, 2: 3}, "--allocation: layer 1 keeps True; write a number of experts or a share"),
        ({1: float("nan"), 2: 3}, "--allocation: layer 1 keeps nan; write a number of experts or a share"),
        (
            {1: 4, 2: 3},
            "--allocation: layer 1 keeps 4; its router chooses among 3 groups of equal size: keep a multiple of 3",
        ),
    ],
)
def test_counts_that_cannot_be_are_refused(given: dict, said: str) -> None:
    with pytest.raises(PlanError) as refusal:
        counts_of(given, STACKS, step=3)
    assert str(refusal.value) == said


def test_counts_beyond_the_budget_or_below_top_k_are_refused(calibration: GetCalibration) -> None:
    calibrated = calibration("olmoe")
    nbytes = moetailor.make_plan(calibrated, "reap", Budget.parse(keep=6), allocation={0: 7, 1: 5}).nbytes
    with pytest.raises(PlanError) as refusal:
        moetailor.make_plan(calibrated, "reap", Budget.parse(keep=6), allocation={0: 7, 1: 6})
    each = calibrated.model.stacks[0].expert_bytes + calibrated.model.stacks[0].slot_bytes
    said = f"--allocation: takes {nbytes + each:,} bytes, keep 6 allows {nbytes:,}; keep fewer experts"
    assert str(refusal.value) == said
    with pytest.raises(PlanError, match=r"plan leaves 1 slots but the router picks 2 per token; keep at least 2"):
        moetailor.make_plan(calibrated, "reap", Budget.parse(keep=6), allocation={0: 8, 1: 1})
    assert moetailor.make_plan(calibrated, "mone", Budget.parse(keep=6), allocation={0: 8, 1: 1})


def test_a_size_is_met_within_one_expert(calibration: GetCalibration) -> None:
    calibrated = calibration("olmoe")
    each = calibrated.model.stacks[0].expert_bytes + calibrated.model.stacks[0].slot_bytes
    for removed in range(1, 10):
        size = calibrated.model.nbytes - removed * each + 1
        for rule in RULES:
            plan = moetailor.make_plan(calibrated, "reap", Budget.parse(size=size), allocation=rule)
            assert size - each < plan.nbytes <= size


@pytest.mark.parametrize(("method", "width"), [("reap", None), ("mone", None), ("mone", moetailor.Width(bits=4))])
def test_a_share_of_the_bytes_is_that_many_bytes(
    method: str, width: moetailor.Width | None, calibration: GetCalibration
) -> None:
    made = calibration("olmoe")
    shared = moetailor.make_plan(made, method, Budget.parse(size="70%"), width=width)
    given = moetailor.make_plan(made, method, Budget.parse(size=made.model.nbytes * 7 // 10), width=width)
    assert (shared.layers, shared.nbytes) == (given.layers, given.nbytes)
    assert shared.nbytes <= 0.7 * made.model.nbytes
    assert shared.budget.startswith("size 70%")


def test_files_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text('{"0": 24, "1": "75%", "2": 0.5}')
    assert read_allocation(str(file)) == {0: 24, 1: "75%", 2: 0.5}
    assert [read_allocation(rule) for rule in ("uniform", *RULES)] == ["uniform", *RULES]
    cure = 'write layers to experts kept, such as {"0": 24, "1": "75%"}'
    many = "9" * 400
    for text, said in (
        ("[1]", "not a JSON object"),
        ('{"first": 1}', "it has the key 'first', not a whole number"),
        ('{"0": null}', "['0'] is None, not a whole number or a finite number or a text"),
        (f'{{"0": {many}}}', "not a whole number or a finite number or a text"),
        ("{", "not JSON that can be read ("),
        ('{"0": 4, "0": 5}', "key '0' comes twice"),
    ):
        file.write_text(text)
        with pytest.raises(PlanError) as refusal:
            read_allocation(str(file))
        assert f"{file}: " in str(refusal.value)
        assert said in str(refusal.value)
        assert str(refusal.value).endswith(cure)
    file.rename(tmp_path / "counts")  # whatever its name: what a search wrote is read
    with pytest.raises(PlanError, match="key '0' comes twice"):
        read_allocation(str(tmp_path / "counts"))
    with pytest.raises(PlanError, match=r"cannot be read \(No such file"):
        read_allocation(str(tmp_path / "absent.json"))
    with pytest.raises(PlanError, match="did you mean 'error'"):
        read_allocation("eror")


def test_what_needs_no_data_is_refused_before_calibration(checkpoint: Get, tmp_path: Path) -> None:
    given = {"method": "reap", "budget": Budget.parse(keep=6)}
    with pytest.raises(PlanError, match="layers keep different numbers of experts; use --format moetailor"):
        moetailor.precheck(checkpoint("olmoe"), tmp_path / "out", allocation="error", format="native", **given)
    said = moetailor.precheck(checkpoint("olmoe"), tmp_path / "out", allocation="error", **given)
    assert "keeps 6 experts on average in 2 of them" in said
    assert said.endswith("format moetailor")
    with pytest.raises(PlanError, match=r"nothing is said of layers 1"):
        moetailor.precheck(checkpoint("olmoe"), tmp_path / "out", allocation={0: 8}, **given)


def test_compress_measures_what_errors_are_weighed_by(tmp_path: Path) -> None:
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=2, length=64)
    given = {"text": text, "method": "frequency", "budget": Budget.parse(remove="25%"), "allocation": "error"}
    measured, plan = moetailor.compress(REFERENCE, tmp_path / "out", **given)
    assert set(measured.sensitivities() or ()) == {0, 1, 2, 3}
    counts = [len(plan.by_layer[layer].pool) if layer in plan.by_layer else 32 for layer in range(4)]
    assert sum(counts) == 96
    assert len(set(counts)) > 1
    assert plan.nbytes == moetailor.make_plan(measured, "frequency", Budget.parse(keep=24)).nbytes
    weighed = weighted_errors([view_of(measured, layer, ExpertWeights(REFERENCE)) for layer in measured.layers])
    gone = [sorted(worth.tolist())[: 32 - count] for worth, count in zip(weighed, counts, strict=True)]
    stay = [sorted(worth.tolist())[32 - count :] for worth, count in zip(weighed, counts, strict=True)]
    # nothing that went, in whatever layer, was worth more than what stays
    assert max(itertools.chain(*gone)) <= min(itertools.chain(*stay))


def test_from_the_command_line(
    calibration: GetCalibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["moetailor", *map(str, words)])
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().err

    folder, counts, plan = calibration("olmoe").folder, tmp_path / "counts.json", tmp_path / "plan.json"
    few = ("--population", 4, "--generations", 2, "--survivors", 2, "--samples", 1, "--device", "cpu")
    said = run("allocate", folder, "-o", counts, "--method", "frequency", "--keep", 6, *few)
    assert "with uniform counts 0." in said
    kept = json.loads(counts.read_text())
    assert kept.pop("format") == "moetailor-allocation"
    assert kept.pop("settings")["method"] == "frequency"
    kept = {int(layer): count for layer, count in kept.items()}
    run("plan", folder, "-o", plan, "--method", "frequency", "--keep", 6, "--allocation", counts)
    found = moetailor.Plan.load(plan)
    assert {index: len(found.by_layer[index].pool) if index in found.by_layer else 8 for index in kept} == kept


# The search


def says(probabilities: list[float]) -> nn.Module:
    """Return a model that predicts the same words everywhere, the first ones of its vocabulary."""
    model: Any = tiny_model("olmoe")
    rest = [1e-30] * (model.config.vocab_size - len(probabilities))
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = torch.tensor(probabilities + rest).log()
    return model


def test_overlap_by_hand(tmp_path: Path) -> None:
    # min(.5, .2) + min(.3, .3) + min(.2, .5) = .7
    batch, original = moetailor.Batch.of(torch.tensor([[0, 1, 2], [2, 1, 0]])), says([0.5, 0.3, 0.2])
    reference = Reference(tmp_path / "r", [batch]).record(original)
    assert reference.overlap(says([0.2, 0.3, 0.5]), original) == pytest.approx(0.7)
    assert reference.overlap(says([0.5, 0.3, 0.2]), original) == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_fewer_slots_are_masked_slots(family: str) -> None:
    model = tiny_model(family)
    anatomy = discover(model.config, model)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    slots, dropped = {}, {}
    for index, layer in anatomy.layers.items():
        size = layer.num_experts // anatomy.groups.count
        dropped[index] = [slot for slot in range(layer.num_experts) if slot % size == index % size]
        slots[index] = [slot for slot in range(layer.num_experts) if slot not in dropped[index]]
    with torch.no_grad():
        before = model(ids).logits
        found = with_slots(model, anatomy, slots)(ids).logits
        assert torch.equal(model(ids).logits, before)
        with naive.masked(model, anatomy.layers.values(), dropped):
            expected = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_candidates_share_all_weights_but_the_routers() -> None:
    model = tiny_model("olmoe")
    masked = with_slots(model, discover(model.config, model), {0: [0, 1, 5], 1: list(range(8))})
    mine, theirs = dict(model.named_parameters()), dict(masked.named_parameters())
    assert {name for name in theirs if theirs[name] is not mine[name]} == {"model.layers.0.mlp.gate.weight"}


def test_mutation_keeps_the_total_and_the_bounds() -> None:
    draw, counts = random.Random(0), (9, 9, 9)
    bounds = AllocationBounds(keeps=counts, least=(3, 6, 3), most=(12, 12, 15), step=3)
    seen = set()
    for _ in range(500):
        counts = mutated(counts, bounds, draw)
        assert sum(counts) == 27
        assert all(low <= count <= high for count, low, high in zip(counts, bounds.least, bounds.most, strict=True))
        assert all(count % 3 == 0 for count in counts)
        seen.add(counts)
    every = [c for c in itertools.product((3, 6, 9, 12), (6, 9, 12), (3, 6, 9, 12, 15)) if sum(c) == 27]
    assert seen == set(every)


def test_the_best_is_never_lost_and_found_in_the_end() -> None:
    target = (2, 9, 5, 8)

    def fitness(counts: tuple[int, ...]) -> float:
        return -float(sum(abs(count - best) for count, best in zip(counts, target, strict=True)))

    bounds = AllocationBounds(keeps=(6,) * 4, least=(1,) * 4, most=(10,) * 4, step=1)

    def best(generations: int) -> tuple[int, ...]:
        options = SearchOptions(population=8, survivors=2, generations=generations)
        return evolve(bounds, fitness, options)

    found = [fitness(best(generations)) for generations in (1, 2, 4, 8, 16, 32)]
    assert found == sorted(found)
    assert best(32) == target


def test_a_stopped_search_ends_as_one_that_was_not(
    calibration: GetCalibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moetailor")
    calibrated, budget = calibration("olmoe"), Budget.parse(keep=6)
    options = SearchOptions(population=2, generations=8, survivors=1, samples=2)
    whole = moetailor.allocate(calibrated, "reap", budget, tmp_path / "whole.json", options=options)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moetailor.allocate(calibrated, "reap", budget, tmp_path / "two.json", options=options, progress=stop)
    assert not (tmp_path / "two.json").exists()
    tried = json.loads((tmp_path / "two.search.json").read_text())["overlap"]
    assert not caplog.messages
    resumed = moetailor.allocate(calibrated, "reap", budget, tmp_path / "two.json", options=options)
    assert resumed == whole
    assert caplog.messages == [f"resumes: {len(tried)} allocations that were tried are there"]
    for name in ("{}.json", "{}.search.json"):
        assert (tmp_path / name.format("two")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()
    assert tried.items() < json.loads((tmp_path / "whole.search.json").read_text())["overlap"].items()
    assert whole.overlap >= whole.uniform
    assert sum(whole.counts.values()) == 12
    with pytest.raises(MoetailorError, match="belongs to another search; delete it, or name another --out"):
        moetailor.allocate(calibrated, "frequency", budget, tmp_path / "two.json", options=options)


def test_what_cannot_be_searched_is_refused(calibration: GetCalibration, tmp_path: Path) -> None:
    calibrated, out = calibration("olmoe"), tmp_path / "out.json"
    with pytest.raises(PlanError, match="mone drops no slots, which the search needs"):
        moetailor.allocate(calibrated, "mone", Budget.parse(keep=6), out)
    with pytest.raises(PlanError, match=r"layers \[1\]: no other layer to give experts to"):
        moetailor.allocate(calibrated, "reap", Budget.parse(keep=6), out, layers=[1])
    with pytest.raises(MoetailorError, match="fewer survive than a population has"):
        SearchOptions(population=4, survivors=4)
    assert list(tmp_path.iterdir()) == []
