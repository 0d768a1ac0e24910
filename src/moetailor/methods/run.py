"""From calibration to plan: run a method by name over the layers, under a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from moetailor import ranks
from moetailor.answers import Drop, Width
from moetailor.calibration.folder import Calibration
from moetailor.calibration.kept import Kept
from moetailor.calibration.statistics import ON_REQUEST
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import CheckpointError, MoetailorWarning, PlanError, TooSmallError
from moetailor.methods.allocation import DECIDED_LATER, Allocation, allocate_by_rule
from moetailor.methods.estimate import (
    allocation_bounds,
    budget_words,
    estimate_plan,
    layer_nbytes,
    method_budget,
    pairs_of,
)
from moetailor.methods.method import Method
from moetailor.methods.registry import find_method
from moetailor.planning.budget import Budget
from moetailor.planning.checks import check_plan
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.plan import Plan, calibration_hash
from moetailor.planning.view import LayerView
from moetailor.progress import Progress, resumed


def make_plan(
    calibration: Calibration,
    method: str,
    budget: Budget,
    *,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    guard_super_experts: bool = False,
    allocation: Allocation = "uniform",
    width: Width | None = None,
    weights: ExpertWeights | None = None,
    device: str | None = None,
    progress: Progress | None = None,
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
            more where constants would lose more, weighted by the layer's sensitivity where calibration recorded it;
            ``global``, those that the method scores highest of all layers together, as shares of their layer's sum; or
            the number or share of experts that each layer keeps.
        width: how all that stays of experts lies, in few bits: the plan is that of the method without it, and each
            expert of its pool is rounded at the end. As they lay when None.
        weights: where methods that read weights find them; the calibrated checkpoint when None.
        device: where it computes with them; CUDA when there is one.
        progress: called with (experts done, experts in all), over all layers.

    Raises:
        PlanError: an unknown method, parameter, layer or expert, or a plan that cannot work.
    """
    chosen, facts = find_method(method).of(parameters or {}), calibration.model
    layers = None if layers is None else sorted({int(layer) for layer in layers})  # once: it may be an iterator
    protected = pairs_of(protect) | (super_experts(calibration) if guard_super_experts else set())
    if weights is None and chosen.reads_weights and not facts.source:
        raise PlanError(f"{chosen.name} reads expert weights, and the model was calibrated in memory; pass weights=")
    check_recorded(calibration, chosen)
    weights = weights or ExpertWeights(facts.source, device=device)
    given: dict[str, Any] = {"layers": layers, "protect": protected}
    estimate = estimate_plan(facts, chosen, budget, allocation=allocation, width=width, **given)
    if chosen.reads_weights:
        check_weights(weights, facts)
    if allocation in DECIDED_LATER:
        even = layer_nbytes(facts, estimate, method_budget(budget, chosen, facts), chosen)
        counts = _counts_by_rule(allocation, chosen, estimate, calibration, weights, even, **given)
        estimate = estimate_plan(facts, chosen, budget, allocation=counts, width=width, **given)
    stacks = [stack for stack in facts.stacks if stack.index is not None and stack.prefix in estimate.layers]
    limit = method_budget(budget, chosen, facts)
    shares = layer_nbytes(facts, estimate, limit, chosen)
    views = [view_of(calibration, s.index or 0, weights, protected, shares[s.prefix]) for s in stacks]
    narrows = facts.one_width == "" and sum(stack.lies == "plain" for stack in stacks) == len(facts.stacks)
    for view, stack in zip(views, stacks, strict=True):
        view.narrows, view.slot_bytes = narrows, 0 if limit.size is None else stack.slot_bytes
    keeps = [estimate.layers[stack.prefix].stored for stack in stacks]
    plans: list[LayerPlan] = []
    looked_at = _counted(views, ranks.of_all(progress))
    try:
        for view, layer_plan in zip(views, chosen.plan_layers(views, keeps), strict=True):
            plans.append(layer_plan)
            looked_at(view.index, view.num_experts)
    except TooSmallError as error:  # which knows of the experts alone
        least = (limit.size or estimate.nbytes) - sum(shares.values()) + error.least
        told = f"{budget}: {error}; that makes {least:,} bytes in all: ask for at least that"
        raise TooSmallError(told, least) from None
    narrow = {stack.prefix: plan.narrowed(width) for stack, plan in zip(stacks, plans, strict=True)}
    coded = {stack.prefix for stack in stacks if stack.lies != "plain"}
    decided = {name: plan.beside_codes() if name in coded else plan for name, plan in narrow.items()}
    for stack in facts.stacks:
        if stack.index is None and stack.prefix in estimate.layers:
            decided[stack.prefix] = _plan_unrun(
                stack, len(estimate.layers[stack.prefix].pool), facts.groups.count, weights
            )
    plan = Plan(
        method=chosen.name,
        parameters=chosen.parameters,
        budget=budget_words(budget, allocation, width),
        model=facts,
        calibration=calibration_hash(calibration.fingerprint),
        layers={prefix: layer for prefix, layer in decided.items() if not layer.untouched},
    )
    check_plan(plan, facts)
    if plan.nbytes > facts.nbytes and coded:
        told = f"the result has {plan.nbytes:,} bytes, the original {facts.nbytes:,}"
        lies = next(stack.lies for stack in stacks if stack.prefix in coded)
        why = f"what is computed anew lies in 16 bits, other experts are {lies}; --bits makes all smaller"
        warnings.warn(f"{told}: {why}", MoetailorWarning, stacklevel=2)
    if not plan.layers and budget.remove != 0:
        told = f"{plan.budget}: takes no expert from any layer of {max(s.num_experts for s in facts.stacks)}"
        warnings.warn(f"{told}; the result will be the original", MoetailorWarning, stacklevel=2)
    return plan


def _counts_by_rule(
    rule: Allocation,
    method: Method,
    estimate: Plan,
    calibration: Calibration,
    weights: ExpertWeights,
    shares: Mapping[str, int],
    *,
    layers: Sequence[int] | None,
    protect: Collection[tuple[int, int]],
) -> dict[int, int]:
    """Return how many experts each layer keeps, each held against the others in its share of the bytes, by prefix."""
    views = [
        view_of(calibration, s.index, weights, protect, shares.get(s.prefix, s.num_experts * s.expert_bytes))
        for s in estimate.model.stacks
        if s.index is not None and (layers is None or s.index in layers)
    ]
    bounds = allocation_bounds(estimate, method, [view.index for view in views])
    return allocate_by_rule(rule, method, views, bounds)


def view_of(
    calibration: Calibration,
    layer: int,
    weights: ExpertWeights,
    protected: Collection[tuple[int, int]] = (),
    nbytes: int = 0,
) -> LayerView:
    """Return what a method or its `build` sees of one decoder layer."""
    facts = calibration.model
    stack = next(stack for stack in facts.stacks if stack.index == layer)
    assert stack.shape is not None
    return LayerView(
        index=layer,
        num_experts=stack.num_experts,
        top_k=facts.top_k,
        groups=facts.groups.count,
        limits=facts.groups,
        protected=frozenset(expert for at, expert in protected if at == layer),
        nbytes=nbytes,
        expert_bytes=stack.expert_bytes,
        shape=stack.shape,
        dtype=stack.dtype,
        prices=calibration.prices,
        read_sums=lambda: calibration.sums(layer),
        read_sample=lambda: calibration.sample(layer),
        read_correction=lambda: weights.correction(layer),
        open_experts=lambda: weights.open(layer),
        # Of a model that was calibrated in memory, nobody knows whether other weights are its own.
        kept=None if weights.in_memory or "shards" not in facts.fingerprint else Kept(calibration, layer),
        read_domains=lambda: calibration.domains[1],
    )


def _counted(views: Sequence[LayerView], progress: Progress | None) -> Callable[[int, int], None]:
    """Let layers tell how many of their experts were looked at; return what else tells it, by layer."""
    done = {view.index: 0 for view in views}
    every = {view.index: view.num_experts for view in views}
    measures = False

    def tell(layer: int, experts: int, aloud: bool = True) -> None:
        done[layer] = min(done[layer] + experts, every[layer])
        if progress and aloud:
            progress(sum(done.values()), sum(every.values()))

    def looked_up(layer: int, experts: int, new: bool) -> None:
        nonlocal measures
        if new and not measures:
            measures = True
            resumed(sum(done.values()), sum(every.values()), "experts")
        # What was measured before takes no time: it is told with the first that does, or the time left would be wrong.
        tell(layer, experts, aloud=measures)

    for view in views:
        view.advance = partial(looked_up, view.index)
    return tell


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


def to_record(method: Method, allocation: Allocation = "uniform") -> dict[str, bool]:
    """Return the options of `calibrate` with which what a method and an allocation read is recorded."""
    needs = method.needs | ({"sensitivity"} if allocation == "error" else set())
    return {option: name in needs for name, option in ON_REQUEST.items()}


def check_recorded(calibration: Calibration, method: Method) -> None:
    """Refuse a method that reads what was not recorded.

    Raises:
        PlanError: see the message.
    """
    for name in sorted(method.needs):
        if not calibration.holds(name):
            # Sensitivities are measured after all else, so a finished folder takes them.
            where = "again" if name == "sensitivity" else "into another folder"
            raise PlanError(
                f"{method.name} reads {name}, which {calibration.folder} does not hold; calibrate {where} with "
                f"--{ON_REQUEST[name]}"
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


def check_same(original: Original, facts: ModelFacts) -> None:
    """Refuse an original that is opened and is not the model that was calibrated, see `check_weights`; where nothing
    but headers is there, one of other shapes.
    """
    if not original.headers_only:
        check_weights(ExpertWeights(original), facts)
    elif original.facts.shapes() != facts.shapes():
        raise PlanError(f"{original.source}: not of the shapes of the model that was calibrated ({facts.source})")


def _plan_unrun(stack: Stack, keep: int, groups: int, weights: ExpertWeights) -> LayerPlan:
    """Keep the experts with the largest weights, as many in each group: nothing else is known of such a layer."""
    norms = weights.norms(stack.prefix).view(groups, -1)
    order = norms.argsort(dim=1, descending=True, stable=True)[:, : keep // groups]
    kept = (order + torch.arange(groups)[:, None] * norms.shape[1]).flatten().tolist()
    return keep_only(stack.num_experts, kept, Drop(), norms.flatten().tolist())
