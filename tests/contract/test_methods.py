"""Every method on every archetype of family; the full product is marked slow. Joining is automatic on registration."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Constant, LowRank
from moetailor.calibration.statistics import STATISTICS
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.methods.description import describe
from moetailor.methods.registry import find_method
from moetailor.methods.run import view_of
from moetailor.planning.view import LayerView
from support.families import FAMILIES
from support.methods import NARROWING, REFUSED_BY, REMOVING, TINY_PARAMETERS
from support.tiny import ARCHETYPES, load, logits

PRODUCT = [
    pytest.param(method, family, marks=() if family in ARCHETYPES else pytest.mark.slow)
    for method in sorted(moetailor.METHODS)
    for family in sorted(FAMILIES.keys() - REFUSED_BY.get(method, set()))
]
every_pair = pytest.mark.parametrize(("method", "family"), PRODUCT)
Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def make(calibration: moetailor.Calibration, method: str, keep: int) -> moetailor.Plan:
    budget = moetailor.Budget.parse(keep=keep if method in REMOVING else calibration.model.stacks[0].num_experts)
    return moetailor.make_plan(calibration, method, budget, parameters=TINY_PARAMETERS.get(method))


def kept(calibration: moetailor.Calibration) -> int:
    """Return a count that removes one expert of each group."""
    return calibration.model.stacks[0].num_experts - calibration.model.groups.count


def views(calibration: moetailor.Calibration) -> list[LayerView]:
    weights = ExpertWeights(calibration.model.source)
    return [view_of(calibration, layer, weights) for layer in calibration.layers]


@every_pair
def test_a_plan_is_valid_deterministic_and_loads(
    method: str, family: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = make(calibration(family), method, kept(calibration(family)))
    assert plan == make(calibration(family), method, kept(calibration(family)))
    counts = [layer.stored for layer in plan.layers.values()]
    if method in ("auto", "lightmoe"):  # counts differ by layer, within the bytes that equal ones would take
        assert sum(counts) <= kept(calibration(family)) * len(counts)
    else:
        whole = calibration(family).model.stacks[0].num_experts
        fewer = method in REMOVING and method not in NARROWING
        assert set(counts) == {kept(calibration(family)) if fewer else whole}
    plan.save(tmp_path / "plan.json")
    assert moetailor.Plan.load(tmp_path / "plan.json") == plan
    assert plan.nbytes < plan.model.nbytes
    moetailor.apply(plan, checkpoint(family), tmp_path / "out", calibration=calibration(family), verify=False)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method in REFUSED_BY for family in sorted(REFUSED_BY[method] & FAMILIES.keys())],
)
def test_routers_that_cannot_be_predicted_are_refused(method: str, family: str, calibration: GetCalibration) -> None:
    with pytest.raises(
        moetailor.PlanError, match=rf"{method}, layer \d+: what the router would do .* is not known here"
    ):
        make(calibration(family), method, kept(calibration(family)))


@every_pair
def test_keeping_every_expert_plans_nothing(method: str, family: str, calibration: GetCalibration) -> None:
    plan = make(calibration(family), method, calibration(family).model.stacks[0].num_experts)
    if find_method(method).useful_whole:  # nothing is removed, something is added
        assert all(len(layer.pool) == len(layer.slots) for layer in plan.layers.values())
        assert plan.nbytes != plan.model.nbytes
    else:
        assert plan.layers == {}
        assert plan.nbytes == plan.model.nbytes


@pytest.mark.parametrize("method", sorted(moetailor.METHODS))
def test_declared_statistics_suffice(method: str, calibration: GetCalibration) -> None:
    chosen = find_method(method).of(TINY_PARAMETERS.get(method, {}))
    whole = views(calibration("olmoe"))
    spoiled = views(calibration("olmoe"))
    sums = STATISTICS - {"sensitivity"}
    for view in spoiled:
        view.prices = view.prices if "sensitivity" in chosen.needs else None
        hidden = {name: torch.full_like(getattr(view.sums, name), torch.nan) for name in sums - chosen.needs}
        view.__dict__["sums"] = dataclasses.replace(view.sums, **hidden)
    keeps = [5] * len(whole)
    plans = list(chosen.plan_layers(whole, keeps))
    # A view forgets what it read when its layer is decided, so the spoiled sums are kept by hand.
    for view in spoiled:
        view.read_sums = lambda sums=view.sums: sums
    assert list(chosen.plan_layers(spoiled, keeps)) == plans
    for index, plan in zip(calibration("olmoe").layers, plans, strict=True):
        if plan.of(Constant):
            fresh, blind = views(calibration("olmoe")), [v for v in spoiled if v.index == index]
            built = chosen.build(next(v for v in fresh if v.index == index), plan)
            assert built
            assert all(torch.equal(built[name], tensor) for name, tensor in chosen.build(blind[0], plan).items())


@pytest.mark.parametrize("method", REMOVING)
def test_a_size_is_never_exceeded_and_wastes_no_whole_expert(method: str, calibration: GetCalibration) -> None:
    facts = calibration("olmoe").model
    for size in (facts.nbytes, facts.nbytes * 3 // 4, facts.nbytes * 3 // 4 + 1):
        budget = moetailor.Budget.parse(size=size)
        if find_method(method).useful_whole and size == facts.nbytes:
            continue  # its vectors do not fit beside all experts
        plan = moetailor.make_plan(calibration("olmoe"), method, budget, parameters=TINY_PARAMETERS.get(method))
        assert plan.nbytes <= size
        per_layer = sum(stack.expert_bytes for stack in facts.stacks)
        assert size - plan.nbytes < per_layer + len(facts.stacks) * facts.stacks[0].slot_bytes


@pytest.mark.parametrize("method", REMOVING)
def test_protected_experts_and_other_layers_stay(method: str, calibration: GetCalibration) -> None:
    keep = 4 if find_method(method).replaces_with is LowRank else 3  # one of them is the base
    plan = moetailor.make_plan(
        calibration("olmoe"),
        method,
        moetailor.Budget.parse(keep=keep),
        parameters=TINY_PARAMETERS.get(method),
        layers=[1],
        protect=[(1, 0), (1, 5), (1, 7)],
    )
    (layer,) = plan.layers.values()
    assert plan.by_layer.keys() == {1}
    assert layer.pool == ([0, 5, 7] if method not in NARROWING else list(range(8)))


@pytest.mark.parametrize("method", sorted(moetailor.METHODS))
def test_methods_say_what_they_are(method: str) -> None:
    found = find_method(method)
    said = describe(found)
    assert said.summary.endswith(".")
    assert found.needs <= STATISTICS
    assert {parameter.name: parameter.default for parameter in said.parameters} == found().parameters
    assert all(parameter.meaning for parameter in said.parameters)
    with pytest.raises(moetailor.PlanError, match="no parameter 'nonsense'"):
        found.of({"nonsense": "1"})
