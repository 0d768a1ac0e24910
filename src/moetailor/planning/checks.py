"""Every refusal that needs no weights, so that nothing long starts on a plan that cannot work."""

from __future__ import annotations

from collections.abc import Mapping

from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError
from moetailor.planning.plan import Plan
from moetailor.planning.slots import LayerPlan, Slot


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
        _check_guests(prefix, layer, plan, stacks)
        check_layer(prefix, layer, top_k=model.top_k, groups=model.groups)


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
    if layer.auxiliary is not None:
        _check_auxiliary(where, layer, top_k)
    elif layer.stored == len(layer.slots) and not layer.untouched:
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


def _check_auxiliary(where: str, layer: LayerPlan, top_k: int) -> None:
    """Refuse a split of slots that runs none or all of them, or that the other answers of the layer do not know."""
    assert layer.auxiliary is not None
    main, share = layer.auxiliary.main, layer.auxiliary.share
    if not 1 <= main <= top_k or not 0 < share <= 1:
        raise PlanError(
            f"{where}: {main} main slots of a token and a share of {share}; the router picks {top_k}: run 1 to {top_k} "
            "of them, and a share above 0 and at most 1"
        )
    if any(
        slot != Slot("expert", number) and slot.kind not in ("constant", "drop")
        for number, slot in enumerate(layer.slots)
    ):
        raise PlanError(f"{where}: beside auxiliary slots only kept experts, constants and dropped slots are known")


def _check_guests(where: str, layer: LayerPlan, plan: Plan, stacks: Mapping[str, Stack]) -> None:
    """Refuse answers from other layers that those layers do not keep, or whose experts have other shapes."""
    by_index = {stack.index: stack for stack in stacks.values() if stack.index is not None}
    for number, slot in enumerate(layer.slots):
        if slot.layer is None:
            continue
        host = by_index.get(slot.layer)
        if host is None or not 0 <= (slot.expert or 0) < host.num_experts:
            raise PlanError(
                f"{where}: slot {number} asks for expert {slot.expert} of layer {slot.layer}: no such expert"
            )
        mine = stacks[where]
        if (host.expert_bytes, host.dtype) != (mine.expert_bytes, mine.dtype):
            raise PlanError(
                f"{where}: slot {number} asks for an expert of {host.expert_bytes:,} bytes of layer {slot.layer}, its "
                f"own have {mine.expert_bytes:,}; only layers of one shape can share"
            )
        kept = plan.layers.get(host.prefix)
        if kept is not None and kept.slots[slot.expert or 0] != Slot("expert", slot.expert):
            raise PlanError(
                f"{where}: slot {number} asks for expert {slot.expert} of layer {slot.layer}, which does not keep it"
            )


def _weights(model: ModelFacts) -> dict:
    return model.fingerprint.get("shards", model.fingerprint)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
