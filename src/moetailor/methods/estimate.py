"""What can be said of a plan without data: an estimate with its counts and bytes, and most refusals."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moetailor.answers import ANSWERS, WHOLE, Width
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError, TooSmallError, did_you_mean
from moetailor.methods.allocation import RULES, Allocation, AllocationBounds, counts_of, no_scores
from moetailor.methods.choose import refuse_protected
from moetailor.methods.method import Method
from moetailor.planning.budget import Budget
from moetailor.planning.checks import check_layer, check_plan
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan, planned_nbytes, stored_nbytes


def pairs_of(protect: Iterable[Iterable[int]]) -> set[tuple[int, int]]:
    """Return (layer, expert) pairs that a caller gave in whatever holds them."""
    return {(int(layer), int(expert)) for layer, expert in protect}


def estimate_plan(
    facts: ModelFacts,
    method: Method,
    budget: Budget,
    *,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    allocation: Allocation = "uniform",
    width: Width | None = None,
) -> Plan:
    """Return a plan of the right counts and bytes in which the first experts stay: all that can be said without data.

    Of an allocation by rule the counts are right in all, not in each layer.

    Args:
        facts: the model.
        method: the method.
        budget: how much stays.
        layers: decoder layers to change; all MoE layers when None.
        protect: (layer, expert) pairs that must stay.
        allocation: how many experts each layer keeps.
        width: how all that stays of experts lies; as it lay when None.

    Raises:
        PlanError: a layer or expert that does not exist, or a budget that cannot be met.
    """
    run = [stack for stack in facts.stacks if stack.index is not None]
    known = {stack.index: stack.num_experts for stack in facts.stacks if stack.index is not None}
    selected, protect = set(known) if layers is None else set(layers), set(protect)
    if unknown := sorted(selected - set(known)):
        raise PlanError(f"--layers: {unknown} are no MoE layers; those are {', '.join(map(str, known))}")
    for layer, expert in protect:
        if layer not in known or not 0 <= expert < known[layer]:
            raise PlanError(f"--protect {layer}:{expert}: no such expert; MoE layers are {', '.join(map(str, known))}")
    stacks = [stack for stack in run if stack.index in selected]
    refuse_unknown(method, budget, allocation, width)
    groups = facts.groups.count if method.replaces_with.drops else 1
    if method.replaces_with.drops and len(stacks) == len(run) and allocation == "uniform":
        # Layers that the model does not run (multi-token prediction) share its expert count, so they are cut as well.
        stacks += [stack for stack in facts.stacks if stack.index is None]

    # What is to be removed is said of the experts as they lay; a size is one of the result.
    counts_bits = budget.remove is None and budget.keep is None

    def at(kept: Mapping[str, int]) -> dict[str, LayerPlan]:
        found = {s.prefix: method.estimate_of(s, kept[s.prefix], facts.groups.count) for s in stacks}
        return narrowed(found) if counts_bits else found

    anew = any(ANSWERS[kind].rebuilds for kind in {method.replaces_with.kind, *method.builds})

    def narrowed(plans: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
        return {s.prefix: _as_it_lies(plans[s.prefix], s, width, anew) for s in stacks}

    limit = method_budget(budget, method, facts)
    if limit.size is None:
        _refuse_uneven(budget, method, facts.groups.count)
        planned = at({stack.prefix: budget.kept(stack.num_experts) for stack in stacks})
        if method.keeps_all and any(budget.kept(stack.num_experts) < stack.num_experts for stack in stacks):
            cure = "give --size" if method.removes else "leave it out, or use --bits with another method"
            raise PlanError(f"{budget}: {method.name} removes no expert{' here' * method.removes}; {cure}")
    else:
        least = max(fewest(method, stack, facts) for stack in stacks)
        uniform = method.replaces_with.alike and allocation == "uniform"
        planned = _within(limit.size, facts, stacks, at, method, least, uniform=uniform)
    if isinstance(allocation, Mapping):
        most = planned_nbytes(facts, planned) if limit.size is None else limit.size
        planned = at(counts_of(allocation, stacks, step=groups))
        if (nbytes := planned_nbytes(facts, planned)) > most:
            raise PlanError(f"--allocation: takes {nbytes:,} bytes, {budget} allows {most:,}; keep fewer experts")
    planned = narrowed(planned)
    refuse_load_dtype(budget, planned, method)
    # Where bytes are shared out among widths too, what is protected stays, in fewer bits if it must.
    for stack in [] if method.decides_counts and method.decides_widths else stacks:
        inside = {expert for layer, expert in protect if layer == stack.index}
        refuse_protected(stack.index or 0, inside, stack.num_experts, len(planned[stack.prefix].pool), groups)
    plan = Plan(
        method=method.name,
        parameters=method.parameters,
        budget=budget_words(budget, allocation, width),
        model=facts,
        calibration="",
        layers=_looked_at(planned, method),
    )
    check_plan(plan, facts)
    return plan


def _looked_at(planned: dict[str, LayerPlan], method: Method) -> dict[str, LayerPlan]:
    """Return the layers that change; if any does, all of them where the method shares bytes out among layers: it may
    change those that equal counts would leave whole.
    """
    changed = {prefix: layer for prefix, layer in planned.items() if not layer.untouched}
    return planned if method.decides_counts and changed else changed


def _as_it_lies(plan: LayerPlan, stack: Stack, width: Width | None, anew: bool) -> LayerPlan:
    """Return an estimate with the bytes that its experts take at most.

    Args:
        plan: the estimate.
        stack: its layer.
        width: how all that stays is to lie.
        anew: whether the method may compute experts anew: beside codes they lie as numbers.
    """
    if stack.index is None or plan.untouched:
        return plan if stack.index is None else plan.narrowed(width)
    return plan.narrowed(WHOLE if width is None and anew and stack.lies != "plain" else width)


def layer_nbytes(facts: ModelFacts, estimate: Plan, budget: Budget, method: Method) -> dict[str, int]:
    """Return the bytes that experts and stand-ins of each changed layer may take: those of an estimate, and an equal
    share of what it leaves of a budget in bytes.

    Args:
        facts: the model.
        estimate: what `estimate_plan` gave.
        budget: what `method_budget` gave.
        method: the method.
    """
    stacks = {stack.prefix: stack for stack in facts.stacks if stack.prefix in estimate.layers}
    # Of what is rounded at the end the bytes here are those before it.
    rounded = not method.decides_widths and any(plan.widths for plan in estimate.layers.values())
    spare = 0 if budget.size is None or rounded else budget.size - estimate.nbytes
    whole = {prefix: replace(plan, widths={}) if rounded else plan for prefix, plan in estimate.layers.items()}
    # Equal shares, to the last byte.
    shares = {prefix: (spare + number) // len(stacks) for number, prefix in enumerate(stacks)}
    return {prefix: shares[prefix] + stored_nbytes(plan, stacks[prefix]) for prefix, plan in whole.items()}


def allocation_bounds(
    estimate: Plan, method: Method, layers: Sequence[int], protect: Collection[tuple[int, int]] = ()
) -> AllocationBounds:
    """Return what an allocation may choose from.

    Args:
        estimate: what stays when all layers keep as many.
        method: the method.
        layers: the decoder layers to change.
        protect: (layer, expert) pairs that must stay.

    Raises:
        PlanError: the experts of the layers have different sizes.
    """
    facts = estimate.model
    stacks = [next(stack for stack in facts.stacks if stack.index == layer) for layer in layers]
    if len(sizes := sorted({stack.expert_bytes for stack in stacks})) > 1:
        raise PlanError(
            f"--allocation: experts of {sizes[0]:,} and of {sizes[-1]:,} bytes do not stand for each other; give the "
            "counts in a file"
        )
    plans = [estimate.layers.get(stack.prefix) for stack in stacks]
    step = facts.groups.count if method.replaces_with.drops else 1

    def of_protected(stack: Stack) -> int:
        groups = [expert * step // stack.num_experts for layer, expert in protect if layer == stack.index]
        return step * max(map(groups.count, groups), default=0)

    return AllocationBounds(
        keeps=tuple(s.num_experts if plan is None else plan.stored for s, plan in zip(stacks, plans, strict=True)),
        least=tuple(max(fewest(method, stack, facts), of_protected(stack)) for stack in stacks),
        most=tuple(stack.num_experts for stack in stacks),
        step=step,
    )


def method_budget(budget: Budget, method: Method, facts: ModelFacts) -> Budget:
    """Return the budget as a method takes it: bytes on disk where it is one of memory, or of a share of bytes."""
    lies = next((stack.lies for stack in facts.stacks if stack.lies != "plain"), None)
    if budget.memory is not None and lies:
        raise PlanError(f"--memory: experts are {lies}, and what they take in memory is up to the engine; give --size")
    router = sum(stack.num_experts * stack.slot_bytes for stack in facts.stacks)
    within = budget.in_bytes(facts.nbytes).on_disk(facts.dtypes, {stack.dtype for stack in facts.stacks}, router)
    return within.of_total(facts.nbytes) if method.remove_counts_bytes else within


def budget_words(budget: Budget, allocation: Allocation, width: Width | None) -> str:
    """Return what was asked for, as a plan records it."""
    ruled = "given" if isinstance(allocation, Mapping) else allocation
    said = [str(budget), "" if ruled == "uniform" else f"allocation {ruled}", "" if width is None else str(width)]
    return ", ".join(part for part in said if part)


def fewest(method: Method, stack: Stack, facts: ModelFacts) -> int:
    """Return how many experts a layer must keep at least for its router to be able to choose.

    Args:
        method: the method.
        stack: the layer.
        facts: the model.
    """
    for keep in range(1, stack.num_experts):
        try:
            plan = method.estimate_of(stack, keep, facts.groups.count)
            check_layer(stack.prefix, plan, top_k=facts.top_k, groups=facts.groups)
            return keep
        except PlanError:
            continue
    return stack.num_experts


def _within(
    size: int, facts: ModelFacts, stacks: Sequence[Stack], at: Any, method: Method, least: int, *, uniform: bool
) -> dict[str, LayerPlan]:
    """Return the plans with the most experts a layer, at least some, whose checkpoint has at most `size` bytes.

    Unless counts must be uniform, the first layers keep one more, as far as the bytes reach: what goes wrong there goes
    through all the others.
    """

    def planned(keep: int, more: int = 0) -> dict[str, LayerPlan]:
        return at({s.prefix: min(keep + (number < more), s.num_experts) for number, s in enumerate(stacks)})

    most = max(stack.num_experts for stack in stacks)
    fitting = [keep for keep in range(least, most + 1) if planned_nbytes(facts, planned(keep)) <= size]
    if not fitting:
        smallest = {prefix: method.narrowest(plan) for prefix, plan in planned(least).items()}
        if planned_nbytes(facts, smallest) <= size:
            return smallest
        nbytes, least = planned_nbytes(facts, smallest), max(least, max(len(plan.pool) for plan in smallest.values()))
        raise TooSmallError(
            f"a budget of {size:,} bytes: with {least} experts in each layer, the fewest that work, there are "
            f"still {nbytes:,} bytes; ask for at least that",
            least=nbytes,
        )
    more = range(1 if uniform else len(stacks))
    return planned(max(fitting), max(n for n in more if planned_nbytes(facts, planned(max(fitting), n)) <= size))


def refuse_unknown(method: Method, budget: Budget, allocation: Allocation, width: Width | None) -> None:
    """Refuse what would mean nothing to a method.

    Raises:
        PlanError: see the message.
    """
    if isinstance(allocation, str) and allocation not in RULES:
        raise PlanError(f"--allocation {allocation}" + did_you_mean(allocation, RULES))
    if allocation != "uniform" and method.decides_counts:
        raise PlanError(f"--allocation: {method.name} here decides itself what each layer keeps; leave it uniform")
    if allocation == "global" and not method.scores:
        raise no_scores(method.name)
    if width is not None and method.decides_widths:
        raise PlanError(f"--bits: {method.name} says itself how experts lie; leave it out, and see its parameters")
    if width is not None and method.decides_counts and budget.remove is None:
        raise PlanError(f"--bits: {method.name} shares bytes out itself; say how many with --remove")


def refuse_load_dtype(budget: Budget, layers: Mapping[str, LayerPlan], method: Method) -> None:
    """Refuse to count integers in a dtype that they are not loaded in.

    Raises:
        PlanError: see the message.
    """
    few = method.decides_widths or any(layer.widths for layer in layers.values())
    if budget.load_dtype is not None and few:
        raise PlanError(
            f"--load-dtype {budget.load_dtype}: experts in few bits stay integers in memory; leave it out, and give "
            "--memory the bytes that all has as it is stored; or, with --method auto, give -p bits=false"
        )


def _refuse_uneven(budget: Budget, method: Method, groups: int) -> None:
    if method.replaces_with.drops and budget.keep is not None and budget.keep % groups:
        raise PlanError(
            f"--keep {budget.keep}: the router chooses among {groups} groups of equal size and {method.name} "
            "drops slots; "
            f"keep a multiple of {groups}"
        )
