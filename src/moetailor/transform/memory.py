"""The plan carried out on a model in memory, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from moetailor.calibration.folder import Calibration
from moetailor.calibration.layers import ResidentModel
from moetailor.checkpoint import family
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.config import IMPLEMENTATION
from moetailor.checkpoint.facts import facts_of_model
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.planning.checks import check_plan
from moetailor.planning.plan import Plan
from moetailor.runtime.quantizer import QUANT_METHOD, MoetailorConfig, MoetailorQuantizer
from moetailor.transform.build import Propagate, change_layer, check_calibration, layer_tensors
from moetailor.transform.propagate import propagated


def apply_to_model(
    plan: Plan, model: nn.Module, calibration: Calibration | None = None, *, propagate: Propagate = "original"
) -> nn.Module:
    """Compress a model in memory, in place, and return it.

    It can then run, be saved with ``save_pretrained`` and loaded again. Layers change one after the other: when it is
    interrupted, the model is of no more use.

    Args:
        plan: what becomes of the slots.
        model: the original model.
        calibration: the calibration of the plan; needed when the plan has stand-ins or merged experts.
        propagate: what these are fitted on: the inputs of their layer in the ``original`` model, or those that the
            ``compressed`` layers before it give.

    Raises:
        PlanError: the plan does not fit, or needs a calibration.
    """
    anatomy = discover(model.config, model)
    check_plan(plan, facts_of_model(model, anatomy), allow_other_weights=True)
    check_calibration(plan, calibration, propagate)

    if propagate == "compressed":
        assert calibration is not None
        for _ in propagated(plan, calibration, ResidentModel(model), anatomy):
            pass  # each layer is changed on the way, once the next ones have no need of it
    else:
        weights = ExpertWeights(model, anatomy=anatomy)
        for layer in sorted(plan.by_layer):
            change_layer(model, anatomy, plan, layer, layer_tensors(plan, calibration, layer, weights))
    if plan.native:
        _shrink_counts(model, plan)
    else:
        _mark(model, plan)
    return model


def _shrink_counts(model: Any, plan: Plan) -> None:
    left = len(next(iter(plan.by_layer.values())).pool) if plan.by_layer else None
    if left is None:
        return
    for name in family.expert_count_spellings(model.config):
        setattr(model.config, name, left)


def _mark(model: Any, plan: Plan) -> None:
    """Make the model one of the moetailor format, as if it had been loaded from it."""
    config = MoetailorConfig.of(plan.slot_maps)
    model.config.quantization_config = config
    setattr(model.config, IMPLEMENTATION, QUANT_METHOD)
    model.hf_quantizer = MoetailorQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
