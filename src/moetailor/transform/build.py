"""The tensors that a plan needs and the original does not have: computed by the plan's method, and put in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from moetailor.answers import ANSWERS, SlotMap, Width
from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.files import DTYPE_NAMES, DTYPES
from moetailor.checkpoint.storage import TensorSpec
from moetailor.checkpoint.tensors import check_stored, is_finite
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import PlanError, did_you_mean
from moetailor.fitting.widths import Rounding, quantized
from moetailor.methods.registry import METHODS, find_method
from moetailor.methods.run import view_of
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan, calibration_hash
from moetailor.planning.view import LayerView
from moetailor.runtime.reshape import LayerChange, reshape_model

Tensors = dict[str, torch.Tensor]
Propagate = Literal["original", "compressed"]


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What was computed for one layer.

    Attributes:
        added: the numbers of the answers' tensors, by the names that they declare.
        rebuilt: experts whose weights are computed anew and lie plain, as the family's parameters with a row for each.
        packed: experts in few bits, as they are stored.
    """

    added: Tensors
    rebuilt: Tensors
    packed: Tensors


def check_calibration(plan: Plan, calibration: Calibration | None, propagate: Propagate = "original") -> None:
    """Refuse when what a plan adds cannot be computed.

    Args:
        plan: the plan.
        calibration: the calibration at hand, if any.
        propagate: what it is fitted on, see `apply_to_model`.

    Raises:
        PlanError: the plan adds tensors but there is no calibration, it is not the plan's, or the method computes none.
    """
    if propagate not in get_args(Propagate):
        raise PlanError(f"propagate {propagate!r}" + did_you_mean(propagate, get_args(Propagate)))
    if calibration is not None and calibration_hash(calibration.fingerprint) != plan.calibration:
        raise PlanError(
            f"{calibration.folder}: not the calibration that the plan was made from; give that one, or plan again"
        )
    if not plan.computed:
        if propagate == "compressed":
            raise PlanError(f"--propagate compressed: a plan of {plan.method!r} has nothing to fit; leave it out")
        return
    borrowing = [index for index, slots in plan.slot_maps.items() if slots.lenders]
    if propagate == "compressed" and borrowing:
        raise PlanError(
            f"--propagate compressed: layers change one by one, and layer {min(borrowing)} borrows experts of other "
            "layers; leave it out"
        )
    method = find_method(plan.method)
    by_method = {kind for kind in plan.computed if ANSWERS[kind].from_method}
    if lost := sorted(by_method - method.builds):
        able = ", ".join(name for name, other in sorted(METHODS.items()) if lost[0] in other.builds)
        raise PlanError(
            f"the plan has {lost[0]} slots, which method {plan.method!r} does not compute; set its method to one that "
            f"does: {able}"
        )
    method.of(plan.parameters)
    if calibration is None:
        raise PlanError(
            f"the plan has {sorted(plan.computed)[0]} slots, which are computed from the calibration; name it with "
            "--calibration"
        )


def layer_tensors(
    plan: Plan, calibration: Calibration | None, layer: int, weights: ExpertWeights
) -> LayerTensors | None:
    """Return what `compute_layer` gives for a decoder layer that changes; None where nothing is computed."""
    if not plan.by_layer[layer].computed:
        return None
    assert calibration is not None
    view = view_of(calibration, layer, weights)
    try:
        return compute_layer(plan, view)
    finally:
        view.close()


def compute_layer(plan: Plan, view: LayerView) -> LayerTensors:
    """Return what a plan needs computed for one layer, in the dtype that it was computed in.

    Raises:
        PlanError: a value is not finite.
    """
    layer, method = plan.by_layer[view.index], find_method(plan.method).of(plan.parameters)
    given = method.build(view, layer)
    for name, tensor in given.items():
        if not is_finite(tensor):
            raise PlanError(f"layer {view.index}: the new {name} is not finite; calibrate again in a wider --dtype")
    declared = added_by_method(plan.slot_maps[view.index], view.shape)
    matrices = {name: tensor for name, tensor in given.items() if name not in declared}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items() if name in declared}
    assert shapes == {name: spec.shape for name, spec in declared.items()}, f"{plan.method} gave {shapes}"
    assert bool(matrices) == bool(layer.rebuilt), f"{plan.method} planned {len(layer.rebuilt)} experts with new weights"
    # Without new experts the weights need not be loaded.
    plain = [row for row, expert in enumerate(layer.rebuilt) if expert in layer.plain]
    rebuilt = view.experts.packed({name: stack[plain] for name, stack in matrices.items()}) if plain else {}
    packed = rounded_experts(view, layer, matrices, method.rounding) if layer.widths else {}
    return LayerTensors(added={name: given[name] for name in declared}, rebuilt=rebuilt, packed=packed)


def built_matrices(plan: Plan, view: LayerView) -> Tensors:
    """Return the new matrices and biases of a layer's experts, stacked in the order of `LayerPlan.rebuilt`."""
    given = find_method(plan.method).of(plan.parameters).build(view, plan.by_layer[view.index])
    declared = added_by_method(plan.slot_maps[view.index], view.shape)
    return {name: tensor for name, tensor in given.items() if name not in declared}


def added_by_method(slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
    """Return those of the tensors beside the pool that a method computes."""
    every = ((kind, kind.tensors(slots, shape)) for kind in slots.kinds if kind.from_method)
    return {name: spec for _, specs in every for name, spec in specs.items() if all(spec.shape)}


def rounded_experts(view: LayerView, layer: LayerPlan, rebuilt: Tensors, rounding: Rounding) -> Tensors:
    """Return the experts in few bits as they are stored.

    Args:
        view: the layer.
        layer: its plan.
        rebuilt: matrices of the experts whose weights are computed anew, stacked.
        rounding: how codes are found.
    """
    dtype, found = DTYPES[view.dtype], {}
    behind: dict[int, dict[int, float]] = {expert: {} for expert in layer.pool}
    for slot, answer in enumerate(layer.slots):
        if (expert := answer.expert(slot)) is not None:
            behind[expert][slot] = answer.scale
    for width, experts in layer.packed.items():
        storages, slots = width.storages(view.shape), [behind[expert] for expert in experts]

        def read(places: Sequence[int], experts: Sequence[int] = experts) -> Tensors:
            some = [experts[place] for place in places]
            matrices = view.experts.matrices(some)  # of a list: a copy
            for row, expert in enumerate(some):
                for name, stack in rebuilt.items() if expert in layer.rebuilt else ():
                    matrices[name][row] = stack[layer.rebuilt.index(expert)]
            return matrices

        rounded = quantized(view, slots, read, storages, dtype=dtype, rounding=rounding) if storages else ()
        # Packed at once: codes that wait take a byte for each weight, and several while they are packed.
        found |= _joined(
            width, ({n + s: part for n in c for s, part in storages[n].pack(c[n]).items()} for c in rounded)
        )
        if plain := view.shape.tensors.keys() - storages.keys():
            every = (read([place]) for place in range(len(experts)))
            found |= _joined(width, ({name: matrices[name].to(dtype) for name in plain} for matrices in every))
    return found


def _joined(width: Width, parts: Iterable[Tensors]) -> Tensors:
    """Return tensors of all experts of a width, of those of some after the other, under the names that they have."""
    found: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            found.setdefault(f"{width.stem}_{name}", []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def stored_tensors(plan: Plan, layer: int, shape: ExpertShape, tensors: LayerTensors, dtype: str) -> Tensors:
    """Return the answers' tensors as they are stored: rounded, or turned into codes.

    Args:
        plan: the plan.
        layer: decoder layer.
        shape: what the layer's experts are made of.
        tensors: what was computed.
        dtype: safetensors dtype of the layer's experts.

    Raises:
        CheckpointError: a number is larger than the dtype holds.
    """
    declared, stored = plan.slot_maps[layer].tensors(shape), dict(tensors.packed)
    for name, numbers in tensors.added.items():
        stored |= declared[name].encode(name, numbers, dtype)
    for name, tensor in stored.items():
        check_stored(tensor, f"layer {layer}: {name}")
    return stored


def change_layer(model: nn.Module, anatomy: Anatomy, plan: Plan, layer: int, tensors: LayerTensors | None) -> None:
    """Change one layer of a model in memory, in place.

    Args:
        model: the model, with this layer's weights.
        anatomy: its MoE layers.
        plan: what becomes of the layer.
        layer: which decoder layer.
        tensors: what `compute_layer` gave for it; None where nothing is computed.
    """
    layer_plan, moe = plan.by_layer[layer], anatomy.layers[layer]
    slot_map = None if plan.native else plan.slot_maps[layer]
    change = LayerChange(experts=layer_plan.plain, slots=layer_plan.kept_slots, slot_map=slot_map)
    reshape_model(model, anatomy, {layer: change})
    if tensors is None:
        return
    module: nn.Module = model.get_submodule(moe.experts)
    stored = stored_tensors(plan, layer, moe.expert_shape, tensors, DTYPE_NAMES[Experts(module).dtype])
    rows = [row for row, expert in enumerate(layer_plan.plain) if expert in layer_plan.rebuilt]
    with torch.no_grad():
        for name, tensor in stored.items():
            getattr(module, name).copy_(tensor)
        for name, tensor in tensors.rebuilt.items():
            parameter = getattr(module, name)
            rounded = tensor.to(parameter)
            check_stored(rounded, f"layer {layer}: {name}")
            parameter[rows] = rounded
