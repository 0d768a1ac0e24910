"""The tensors that a plan adds to a layer, stand-ins and merged experts: computed, and put in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import nn

from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import PlanError, did_you_mean
from moetailor.methods.registry import METHODS, find_method
from moetailor.methods.run import view_of
from moetailor.planning.plan import Plan, calibration_hash
from moetailor.planning.view import LayerView
from moetailor.runtime.experts import STAND_IN_TENSORS
from moetailor.runtime.reshape import Change, reshape_model

Tensors = dict[str, torch.Tensor]
Propagate = Literal["original", "compressed"]


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
    if not plan.built:
        if propagate == "compressed":
            raise PlanError(f"--propagate compressed: a plan of {plan.method!r} has nothing to fit; leave it out")
        return
    method = find_method(plan.method)
    if lost := sorted(plan.built - method.builds):
        able = ", ".join(name for name, other in sorted(METHODS.items()) if lost[0] in other.builds)
        raise PlanError(
            f"the plan has {lost[0]} slots, which method {plan.method!r} does not compute; set its method to one that "
            f"does: {able}"
        )
    method.resolve(plan.parameters)
    if calibration is None:
        raise PlanError(
            f"the plan has {sorted(plan.built)[0]} slots, which are computed from the calibration; name it with "
            "--calibration"
        )
    if calibration_hash(calibration.fingerprint) != plan.calibration:
        raise PlanError(
            f"{calibration.folder}: not the calibration that the plan was made from; give that one, or plan again"
        )


def opened(
    plan: Plan, calibration: Calibration | None, weights: ExpertWeights
) -> Iterator[tuple[int, LayerView | None]]:
    """Yield the decoder layers that change, in order, and what their new tensors, if any, are computed from."""
    for layer in sorted(plan.by_layer):
        if not plan.by_layer[layer].built:
            yield layer, None
            continue
        assert calibration is not None
        view = view_of(calibration, layer, weights)
        yield layer, view
        view.close()


def build_layer(plan: Plan, view: LayerView) -> Tensors:
    """Return the tensors that a plan adds to one layer, in the dtype that they were computed in.

    Those of stand-ins have their own names (see `CompressedExperts`); those of merged experts have the names of the
    family's parameters, with a row for each merged expert in the order of the centres.

    Raises:
        PlanError: a value is not finite.
    """
    method, layer = find_method(plan.method), plan.by_layer[view.index]
    assert method.build is not None
    given = method.build(view, layer, **method.resolve(plan.parameters))
    for name, tensor in given.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PlanError(f"layer {view.index}: the new {name} is not finite; calibrate again in a wider --dtype")
    stand_ins = {name: tensor for name, tensor in given.items() if name in STAND_IN_TENSORS}
    merged = {name: tensor for name, tensor in given.items() if name not in STAND_IN_TENSORS}
    assert bool(merged) == bool(layer.merged), f"{plan.method} planned {len(layer.merged)} merged experts"
    # Without merged experts the weights need not be loaded.
    return stand_ins | (view.experts.packed(merged) if merged else {})


def carry_out(model: nn.Module, anatomy: Anatomy, plan: Plan, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Change one layer of a model in memory, in place.

    Args:
        model: the model, with this layer's weights.
        anatomy: its MoE layers.
        plan: what becomes of the layer.
        layer: which decoder layer.
        tensors: what `build_layer` gave for it.
    """
    layer_plan = plan.by_layer[layer]
    slot_map = None if plan.native else plan.slot_maps[layer]
    reshape_model(
        model,
        anatomy,
        {layer: Change(experts=layer_plan.pool, slots=layer_plan.kept_slots, slot_map=slot_map)},
    )
    module = model.get_submodule(anatomy.layers[layer].experts)
    rows = [layer_plan.pool.index(centre) for centre in layer_plan.merged]
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter = getattr(module, name)
            if name in STAND_IN_TENSORS:
                parameter.copy_(tensor)
            else:
                parameter[rows] = tensor.to(parameter)
