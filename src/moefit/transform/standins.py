"""The tensors of a layer's stand-ins, computed by the method that planned them."""

from __future__ import annotations

import torch

from moefit.calibration.folder import Calibration
from moefit.checkpoint.weights import ExpertWeights
from moefit.errors import PlanError
from moefit.methods.registry import find_method
from moefit.methods.run import view_of
from moefit.planning.plan import Plan, calibration_hash


def check_calibration(plan: Plan, calibration: Calibration | None) -> None:
    """Refuse when a plan's stand-ins cannot be computed.

    Args:
        plan: the plan.
        calibration: the calibration at hand, if any.

    Raises:
        PlanError: stand-ins are planned but there is no calibration, it is not the plan's, or the method computes none.
    """
    if not any(layer.constants for layer in plan.layers.values()):
        return
    if find_method(plan.method).build is None:
        raise PlanError(
            f"the plan has constant slots, which method {plan.method!r} does not compute; set its method to 'mone'"
        )
    find_method(plan.method).resolve(plan.parameters)
    if calibration is None:
        raise PlanError(
            "the plan has constant slots, which are computed from the calibration; name it with --calibration"
        )
    if calibration_hash(calibration.fingerprint) != plan.calibration:
        raise PlanError(
            f"{calibration.folder}: not the calibration that the plan was made from; give that one, or plan again"
        )


def build_stand_ins(
    plan: Plan, layer: int, calibration: Calibration, weights: ExpertWeights
) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer's stand-ins, ``constant`` [n, D].

    Raises:
        PlanError: an expert that no token reached would become a constant without a value; that is a zero vector and
            allowed, anything not finite is not.
    """
    method, layer_plan = find_method(plan.method), plan.by_layer[layer]
    if not layer_plan.constants:
        return {}
    assert method.build is not None
    view = view_of(calibration, layer, weights)
    tensors = method.build(view, layer_plan, **method.resolve(plan.parameters))
    view.close()
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PlanError(f"layer {layer}: the stand-ins' {name} is not finite; calibrate again in a wider --dtype")
    return tensors
