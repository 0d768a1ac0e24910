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
from moefit.methods.choose import kept_of_group, refuse_protected
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
    outline = outline_plan(facts, chosen, resolved, budget, layers=layers, protect=protected)
    if chosen.weights:
        check_weights(weights, facts)
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
        budget=str(budget),
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
) -> Plan:
    """Return a plan of the right counts and bytes in which the first experts stay: all that can be said without data.

    Args:
        facts: the model.
        method: the method.
        parameters: all its parameters.
        budget: how much stays.
        layers: decoder layers to change; all MoE layers when None.
        protect: (layer, expert) pairs that must stay.

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
    if method.removed == "drop" and len(stacks) == len(run):
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
        planned = _within(limit.size, facts, stacks, at, uniform=method.removed == "drop")
    for stack in stacks:
        inside = {expert for layer, expert in protect if layer == stack.index}
        groups = facts.groups.count if method.removed == "drop" else 1
        refuse_protected(stack.index or 0, inside, stack.num_experts, len(planned[stack.prefix].pool), groups)
    plan = Plan(
        method=method.name,
        parameters=parameters,
        budget=str(budget),
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


def _limit(budget: Budget, method: Method, facts: ModelFacts) -> Budget:
    return budget.of_total(facts.nbytes) if method.of_total else budget


def _check_recorded(calibration: Calibration, method: Method) -> None:
    """Refuse a method that reads what was not recorded."""
    for name, option in ON_REQUEST.items():
        if name in method.needs and not calibration.fingerprint.get(option):
            raise PlanError(
                f"{method.name} reads {name}, which {calibration.folder} does not hold; calibrate into another folder "
                f"with --{option}"
            )


def check_weights(weights: ExpertWeights, facts: ModelFacts) -> None:
    """Refuse to read experts of another model than the one that was calibrated.

    Raises:
        PlanError: see the message.
    """
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


def _within(size: int, facts: ModelFacts, stacks: Sequence[Stack], at: Any, uniform: bool) -> dict[str, LayerPlan]:
    """Return the outline with the most experts a layer whose checkpoint has at most `size` bytes.

    Unless counts must be uniform, the first layers keep one more, as far as the bytes reach: what goes wrong there goes
    through all the others.
    """

    def planned(keep: int, more: int = 0) -> dict[str, LayerPlan]:
        return at({s.prefix: min(keep + (number < more), s.num_experts) for number, s in enumerate(stacks)})

    def works(keep: int) -> bool:
        try:
            for prefix, layer in planned(keep).items():
                check_layer(prefix, layer, top_k=facts.top_k, groups=facts.groups)
        except PlanError:
            return False
        return True

    most = max(stack.num_experts for stack in stacks)
    least = next(keep for keep in range(1, most + 1) if works(keep))
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
