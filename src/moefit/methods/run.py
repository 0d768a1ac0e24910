"""From calibration to plan: run a method by name over the layers, under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from moefit.calibration.folder import Calibration, ModelFacts
from moefit.calibration.statistics import ON_REQUEST
from moefit.checkpoint.files import DTYPES
from moefit.checkpoint.layout import Stack
from moefit.checkpoint.weights import ExpertWeights
from moefit.errors import CheckpointError, PlanError
from moefit.methods.allocation import Allocation, constant_errors, counts_of, score_shares
from moefit.methods.choose import best_of_all, kept_of_group, refuse_protected
from moefit.methods.registry import Method, find_method
from moefit.planning.budget import Budget
from moefit.planning.checks import check_layer, check_plan
from moefit.planning.plan import Plan, added_nbytes, calibration_hash, planned_nbytes
from moefit.planning.slots import LayerPlan, Slot, keep_only, merge_into
from moefit.planning.view import LayerView

Experts = Iterable[tuple[int, int]]


def make_plan(
    calibration: Calibration,
    method: str,
    budget: Budget,
    *,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Experts = (),
    guard_super_experts: bool = False,
    allocation: Allocation = "uniform",
    weights: ExpertWeights | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decide what becomes of every slot.

    Args:
        calibration: a finished calibration.
        method: name of a method.
        budget: how much stays.
        parameters: parameters of the method; defaults for the rest.
        layers: decoder layers to change; all MoE layers when None.
        protect: (layer, expert) pairs that must stay.
        guard_super_experts: protect experts with extreme outputs, see `super_experts`.
        allocation: how many experts each layer keeps, the budget's in all: ``uniform``, as many in each; ``error``,
            more where constants would lose more; ``global``, those that the method scores highest of all layers
            together, as shares of their layer's sum; or the number or share of experts that each layer keeps.
        weights: where methods that read weights find them; the calibrated checkpoint when None.
        progress: called with (layers done, layers in all).

    Raises:
        PlanError: an unknown method, parameter, layer or expert, or a plan that cannot work.
    """
    chosen, facts = find_method(method), calibration.model
    resolved = chosen.resolve(parameters or {})
    protected = set(protect) | (super_experts(calibration) if guard_super_experts else set())
    if weights is None and chosen.weights and not facts.source:
        raise PlanError(f"{method} reads expert weights, and the model was calibrated in memory; pass weights=")
    _check_recorded(calibration, chosen)
    weights = weights or ExpertWeights(facts.source)
    given: dict[str, Any] = {"layers": layers, "protect": protected}
    outline = outline_plan(facts, chosen, resolved, budget, allocation=allocation, **given)
    if chosen.weights:
        _check_weights(weights, facts)
    if allocation in ("error", "global"):
        numbers = calibration.layers if layers is None else sorted(set(layers))
        views = [view_of(calibration, number, weights, protected) for number in numbers]
        counts = _spread(allocation, calibration, chosen, outline, views)
        outline = outline_plan(facts, chosen, resolved, budget, allocation=counts, **given)
    stacks = [stack for stack in facts.stacks if stack.index is not None and stack.prefix in outline.layers]
    shares = layer_nbytes(facts, outline, _limit(budget, chosen, facts))
    views = [view_of(calibration, s.index or 0, weights, protected, shares[s.prefix]) for s in stacks]
    keeps = [outline.layers[stack.prefix].stored for stack in stacks]
    plans = chosen.plan(views, keeps, resolved, progress)
    decided = {stack.prefix: plan for stack, plan in zip(stacks, plans, strict=True)}
    for stack in facts.stacks:
        if stack.index is None and stack.prefix in outline.layers:
            decided[stack.prefix] = _plan_unrun(
                stack, len(outline.layers[stack.prefix].pool), facts.groups.count, weights
            )
    plan = Plan(
        method=chosen.name,
        parameters=resolved,
        budget=_asked(budget, allocation),
        model=facts,
        calibration=calibration_hash(calibration.fingerprint),
        layers={prefix: layer for prefix, layer in decided.items() if not layer.untouched},
    )
    check_plan(plan, facts)
    return plan


def outline_plan(
    facts: ModelFacts,
    method: Method,
    parameters: Mapping[str, Any],
    budget: Budget,
    *,
    layers: Iterable[int] | None = None,
    protect: Experts = (),
    allocation: Allocation = "uniform",
) -> Plan:
    """Return a plan of the right counts and bytes in which the first experts stay: all that can be said without data.

    Of an allocation by rule the counts are right in all, not in each layer.

    Args:
        facts: the model.
        method: the method.
        parameters: all its parameters.
        budget: how much stays.
        layers: decoder layers to change; all MoE layers when None.
        protect: (layer, expert) pairs that must stay.
        allocation: how many experts each layer keeps.

    Raises:
        PlanError: a layer or expert that does not exist, or a budget that cannot be met.
    """
    run = [stack for stack in facts.stacks if stack.index is not None]
    known = {stack.index: stack.num_experts for stack in facts.stacks if stack.index is not None}
    selected = set(known) if layers is None else set(layers)
    if unknown := sorted(selected - set(known)):
        raise PlanError(f"--layers: {unknown} are no MoE layers; those are {', '.join(map(str, known))}")
    for layer, expert in protect:
        if layer not in known or not 0 <= expert < known[layer]:
            raise PlanError(f"--protect {layer}:{expert}: no such expert; MoE layers are {', '.join(map(str, known))}")
    stacks = [stack for stack in run if stack.index in selected]
    if allocation != "uniform" and method.spreads is not None and method.spreads(**parameters):
        raise PlanError(f"--allocation: {method.name} here decides itself what each layer keeps; leave it uniform")
    groups = facts.groups.count if method.removed == "drop" else 1
    if method.removed == "drop" and len(stacks) == len(run) and allocation == "uniform":
        # Layers that the model does not run (multi-token prediction) share its expert count, so they are cut as well.
        stacks += [stack for stack in facts.stacks if stack.index is None]

    def at(kept: Mapping[str, int]) -> dict[str, LayerPlan]:
        return {
            stack.prefix: _outline(method, parameters, stack, kept[stack.prefix], facts.groups.count)
            for stack in stacks
        }

    limit = _limit(budget, method, facts)
    if limit.size is None:
        _refuse_uneven(budget, method, facts.groups.count)
        planned = at({stack.prefix: budget.kept(stack.num_experts) for stack in stacks})
    else:
        least = max(_fewest(method, parameters, stack, facts) for stack in stacks)
        uniform = method.removed == "drop" and allocation == "uniform"
        planned = _within(limit.size, facts, stacks, at, least, uniform=uniform)
    if isinstance(allocation, Mapping):
        most = planned_nbytes(facts, planned) if limit.size is None else limit.size
        planned = at(counts_of(allocation, stacks, step=groups))
        if (nbytes := planned_nbytes(facts, planned)) > most:
            raise PlanError(f"--allocation: takes {nbytes:,} bytes, {budget} allows {most:,}; keep fewer experts")
    for stack in stacks:
        inside = {expert for layer, expert in protect if layer == stack.index}
        refuse_protected(stack.index or 0, inside, stack.num_experts, len(planned[stack.prefix].pool), groups)
    plan = Plan(
        method=method.name,
        parameters=parameters,
        budget=_asked(budget, allocation),
        model=facts,
        calibration="",
        layers={prefix: layer for prefix, layer in planned.items() if not layer.untouched},
    )
    check_plan(plan, facts)
    return plan


def layer_nbytes(facts: ModelFacts, outline: Plan, budget: Budget) -> dict[str, int]:
    """Return the bytes that experts and stand-ins of each changed layer may take: those of the outline, and an equal
    share of what the outline leaves of a budget in bytes.
    """
    stacks = {stack.prefix: stack for stack in facts.stacks if stack.prefix in outline.layers}
    spare = 0 if budget.size is None or not stacks else (budget.size - outline.nbytes) // len(stacks)
    return {
        prefix: spare + plan.stored * stacks[prefix].expert_bytes + added_nbytes(plan, stacks[prefix], facts.width)
        for prefix, plan in outline.layers.items()
    }


def view_of(
    calibration: Calibration, layer: int, weights: ExpertWeights, protected: Experts = (), nbytes: int = 0
) -> LayerView:
    """Return what a method or its `build` sees of one decoder layer."""
    stack = next(stack for stack in calibration.model.stacks if stack.index == layer)
    return LayerView(
        index=layer,
        num_experts=stack.num_experts,
        top_k=calibration.model.top_k,
        groups=calibration.model.groups.count,
        limits=calibration.model.groups,
        protected=frozenset(expert for at, expert in protected if at == layer),
        nbytes=nbytes,
        expert_bytes=stack.expert_bytes,
        itemsize=DTYPES[stack.dtype].itemsize,
        inner=stack.inner,
        matrices=stack.matrices,
        effect=(calibration.effects() or {}).get(layer),
        read_sums=lambda: calibration.sums(layer),
        read_sample=lambda: calibration.sample(layer),
        open_experts=lambda: weights.open(layer),
    )


def super_experts(calibration: Calibration) -> set[tuple[int, int]]:
    """Return the (layer, expert) pairs whose largest output stands out over all layers.

    Largest output above both the 99.5th percentile of all experts' and a tenth of the overall largest, in the first
    three quarters of the layers (the rule of REAP's code, with the norm of the output instead of its signed maximum).
    """
    layers = calibration.layers
    largest = {layer: calibration.sums(layer).norm_max for layer in layers}
    every = torch.cat(list(largest.values()))
    limit = max(float(torch.quantile(every, 0.995)), float(every.max()) / 10)
    early = layers[: -(-3 * len(layers) // 4)]
    return {(layer, expert) for layer in early for expert, peak in enumerate(largest[layer].tolist()) if peak > limit}


def _asked(budget: Budget, allocation: Allocation) -> str:
    if allocation == "uniform":
        return str(budget)
    return f"{budget}, allocation {'given' if isinstance(allocation, Mapping) else allocation}"


def _spread(
    rule: Allocation, calibration: Calibration, method: Method, outline: Plan, views: Sequence[LayerView]
) -> dict[int, int]:
    """Return how many experts each layer keeps by a rule, as many in all as in the outline."""
    facts, parameters = calibration.model, outline.parameters
    stacks = {stack.index: stack for stack in facts.stacks}
    plans = [outline.layers.get(stacks[view.index].prefix) for view in views]
    keeps = [view.num_experts if plan is None else plan.stored for view, plan in zip(views, plans, strict=True)]
    by_error = rule == "error"
    worths = constant_errors(views) if by_error else score_shares(method.name, method.plan(views, keeps, parameters))
    groups = facts.groups.count if method.removed == "drop" else 1
    least = [_fewest(method, parameters, stacks[view.index], facts) for view in views]
    counts = best_of_all(views, worths, sum(keeps), least, groups=groups)
    return {view.index: count for view, count in zip(views, counts, strict=True)}


def _limit(budget: Budget, method: Method, facts: ModelFacts) -> Budget:
    return budget.of_total(facts.nbytes) if method.of_total else budget


def _check_recorded(calibration: Calibration, method: Method) -> None:
    """Refuse a method that reads what was not recorded."""
    for name in sorted(method.needs):
        if not calibration.holds(name):
            # The effect is measured after all else, so a finished folder takes it.
            where = "again" if name == "effect" else "into another folder"
            raise PlanError(
                f"{method.name} reads {name}, which {calibration.folder} does not hold; calibrate {where} with "
                f"--{ON_REQUEST[name]}"
            )


def _check_weights(weights: ExpertWeights, facts: ModelFacts) -> None:
    """Refuse to read experts of another model than the one that was calibrated."""
    if weights.in_memory or "shards" not in facts.fingerprint:
        return
    try:
        found = weights.checkpoint.fingerprint()
    except CheckpointError as error:
        raise PlanError(f"{error}; the method reads expert weights: say where they are with --model") from None
    if found["shards"] != facts.fingerprint["shards"]:
        raise PlanError(
            f"{weights.checkpoint.source}: not the model that was calibrated ({facts.source}); name that with --model"
        )


def _outline(method: Method, parameters: Mapping[str, Any], stack: Stack, keep: int, groups: int) -> LayerPlan:
    """Return a plan with the counts and bytes that the method's will have; the first experts stay."""
    experts = stack.num_experts
    if method.outline is not None:
        return method.outline(experts, keep, **parameters)
    if method.removed == "constant":
        return keep_only(experts, range(keep), Slot("constant"))
    if method.removed == "expert":
        return LayerPlan(slots=tuple(Slot("expert", min(number, keep - 1)) for number in range(experts)))
    if method.removed == "merged":
        return merge_into([min(number, keep - 1) for number in range(experts)])
    size, each = experts // groups, kept_of_group(keep, groups)
    kept = [group * size + number for group in range(groups) for number in range(each)]
    return keep_only(experts, kept, Slot("drop"))


def _fewest(method: Method, parameters: Mapping[str, Any], stack: Stack, facts: ModelFacts) -> int:
    """Return how many experts a layer must keep at least for its router to be able to choose."""
    for keep in range(1, stack.num_experts):
        try:
            outline = _outline(method, parameters, stack, keep, facts.groups.count)
            check_layer(stack.prefix, outline, top_k=facts.top_k, groups=facts.groups)
            return keep
        except PlanError:
            continue
    return stack.num_experts


def _within(
    size: int, facts: ModelFacts, stacks: Sequence[Stack], at: Any, least: int, *, uniform: bool
) -> dict[str, LayerPlan]:
    """Return the outline with the most experts a layer, at least some, whose checkpoint has at most `size` bytes.

    Unless counts must be uniform, the first layers keep one more, as far as the bytes reach: what goes wrong there goes
    through all the others.
    """

    def planned(keep: int, more: int = 0) -> dict[str, LayerPlan]:
        return at({s.prefix: min(keep + (number < more), s.num_experts) for number, s in enumerate(stacks)})

    most = max(stack.num_experts for stack in stacks)
    fitting = [keep for keep in range(least, most + 1) if planned_nbytes(facts, planned(keep)) <= size]
    if not fitting:
        nbytes = planned_nbytes(facts, planned(least))
        raise PlanError(
            f"--size {size:,} bytes: with {least} experts in each layer, the fewest that work, there are still "
            f"{nbytes:,} bytes; ask for at least that"
        )
    more = range(1 if uniform else len(stacks))
    return planned(max(fitting), max(n for n in more if planned_nbytes(facts, planned(max(fitting), n)) <= size))


def _plan_unrun(stack: Stack, keep: int, groups: int, weights: ExpertWeights) -> LayerPlan:
    """Keep the experts with the largest weights, as many in each group: nothing else is known of such a layer."""
    norms = weights.norms(stack.prefix).view(groups, -1)
    order = norms.argsort(dim=1, descending=True, stable=True)[:, : keep // groups]
    kept = (order + torch.arange(groups)[:, None] * norms.shape[1]).flatten().tolist()
    return keep_only(stack.num_experts, kept, Slot("drop"), norms.flatten().tolist())


def _refuse_uneven(budget: Budget, method: Method, groups: int) -> None:
    if method.removed == "drop" and budget.keep is not None and budget.keep % groups:
        raise PlanError(
            f"--keep {budget.keep}: the router chooses among {groups} groups of equal size and {method.name} "
            "drops slots; "
            f"keep a multiple of {groups}"
        )
