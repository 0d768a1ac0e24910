"""Every refusal that needs no weights, so that nothing long starts on a plan that cannot work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from moetailor.answers import Answer, Context
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan


def check_plan(plan: Plan, model: ModelFacts, *, allow_other_weights: bool = False) -> None:
    """Refuse a plan that does not fit a model.

    Args:
        plan: the plan.
        model: facts of the model that it would change.
        allow_other_weights: accept a model of the same shapes whose weights the plan was not made for.

    Raises:
        PlanError: another model, layers that do not exist, fewer slots than the router picks, groups left unequal.
    """
    if plan.model.shapes() != model.shapes():
        mine, theirs = plan.model.shapes(), model.shapes()
        name = next(name for name in mine if mine[name] != theirs[name])
        raise PlanError(
            f"the plan is for another model: its {name} is {_short(mine[name])}, this model has {_short(theirs[name])}"
        )
    if not allow_other_weights and _weights(plan.model) != _weights(model):
        raise PlanError(
            "the plan was made for other weights of the same shapes; calibrate this model, or pass "
            "--allow-other-weights on purpose"
        )
    stacks = {stack.prefix: stack for stack in plan.model.stacks}
    for prefix, layer in plan.layers.items():
        if prefix not in stacks:
            raise PlanError(f"the plan names layer {prefix!r}, which is no MoE layer; those are {', '.join(stacks)}")
        if len(layer.slots) != stacks[prefix].num_experts:
            raise PlanError(f"{prefix}: the plan has {len(layer.slots)} slots, the layer {stacks[prefix].num_experts}")
        check_layer(prefix, layer, top_k=model.top_k, groups=model.groups)
        context = Context(
            where=prefix,
            slots=layer.slots,
            top_k=model.top_k,
            stack=stacks[prefix],
            other=partial(_layer_and_answers, plan, stacks),
        )
        for slot, answer in enumerate(layer.slots):
            answer.check(slot, context)


def check_layer(where: str, layer: LayerPlan, *, top_k: int, groups: Groups) -> None:
    """Refuse a layer whose router could no longer choose.

    Args:
        where: name of the layer in messages.
        layer: its plan.
        top_k: experts of a token.
        groups: how groups limit the router's choice.

    Raises:
        PlanError: see the message.
    """
    left = layer.kept_slots
    if len(left) < top_k:
        raise PlanError(
            f"{where}: plan leaves {len(left)} slots but the router picks {top_k} per token; keep at least {top_k}"
        )
    if not layer.pool:
        raise PlanError(f"{where}: plan keeps no expert; keep at least 1")
    if odd := sorted(layer.widths.keys() - set(layer.pool)):
        raise PlanError(f"{where}: the plan says how expert {odd[0]} lies in few bits, which does not stay")
    if layer.widths and (fixed := [a for a in layer.slots if a.expert(0) is not None and a.placed(lambda *_: 0)]):
        raise PlanError(f"{where}: slots that are {fixed[0].label} need their experts as they are; leave widths out")
    pool_alone = not layer.slot_map().kinds
    if pool_alone and len(layer.pool) == len(layer.slots) and not layer.native:
        raise PlanError(f"{where}: plan changes slots but removes no expert; keep every slot as it is, or remove some")
    if groups.count == 1 or len(left) == len(layer.slots):
        return
    size = len(layer.slots) // groups.count
    sizes = [sum(slot // size == group for slot in left) for group in range(groups.count)]
    if len(set(sizes)) > 1:
        raise PlanError(
            f"{where}: the router chooses among {groups.count} groups of equal size; the plan leaves {sizes}; "
            "drop as many in each"
        )
    if sizes[0] < groups.least:
        raise PlanError(
            f"{where}: plan leaves {sizes[0]} slots in each group, the router scores groups by {groups.least}; "
            f"keep at least {groups.least} in each"
        )
    if sizes[0] * groups.used < top_k:
        raise PlanError(
            f"{where}: a token may use {groups.used} of {groups.count} groups with {sizes[0]} slots left in each, "
            f"but the router picks {top_k}; keep at least {-(-top_k // groups.used)} in each"
        )


def _layer_and_answers(
    plan: Plan, stacks: Mapping[str, Stack], layer: int
) -> tuple[Stack, Sequence[Answer] | None] | None:
    """Return a decoder layer on disk and its answers, see `Context.other`."""
    stack = next((stack for stack in stacks.values() if stack.index == layer), None)
    if stack is None:
        return None
    return stack, plan.layers[stack.prefix].slots if stack.prefix in plan.layers else None


def _weights(model: ModelFacts) -> dict:
    return model.fingerprint.get("shards", model.fingerprint)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
