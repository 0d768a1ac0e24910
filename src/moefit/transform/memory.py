"""The plan carried out on a model in memory, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moefit.calibration.facts import facts_of_model
from moefit.calibration.folder import Calibration
from moefit.checkpoint import family
from moefit.checkpoint.anatomy import discover
from moefit.checkpoint.weights import ExpertWeights
from moefit.planning.checks import check_plan
from moefit.planning.plan import Plan
from moefit.runtime.experts import Change, reshape_model
from moefit.runtime.quantizer import QUANT_METHOD, MoefitConfig, MoefitQuantizer
from moefit.transform.standins import build_stand_ins, check_calibration


def apply_to_model(plan: Plan, model: nn.Module, calibration: Calibration | None = None) -> nn.Module:
    """Compress a model in memory, in place, and return it.

    It can then run, be saved with ``save_pretrained`` and loaded again.

    Args:
        plan: what becomes of the slots.
        model: the original model.
        calibration: the calibration of the plan; needed when the plan has stand-ins.

    Raises:
        PlanError: the plan does not fit, or needs a calibration.
    """
    anatomy = discover(model.config, model)
    check_plan(plan, facts_of_model(model, anatomy), allow_other_weights=True)
    check_calibration(plan, calibration)
    stand_ins = {}
    if calibration is not None:
        weights = ExpertWeights(model)
        stand_ins = {layer: build_stand_ins(plan, layer, calibration, weights) for layer in plan.by_layer}
    changes = {
        layer: Change(experts=p.pool, slots=p.kept_slots, slot_map=None if plan.native else p.slot_map())
        for layer, p in plan.by_layer.items()
    }
    reshape_model(model, anatomy, changes)
    for layer, tensors in stand_ins.items():
        module = model.get_submodule(anatomy.layers[layer].experts)
        for name, tensor in tensors.items():
            with torch.no_grad():
                getattr(module, name).copy_(tensor)
    if plan.native:
        _shrink_counts(model, plan, anatomy.model_counts)
    else:
        _mark(model, plan)
    return model


def _shrink_counts(model: Any, plan: Plan, counts: tuple[tuple[str, str], ...]) -> None:
    left = len(next(iter(plan.by_layer.values())).pool) if plan.by_layer else None
    if left is None:
        return
    for name in family.expert_count_spellings(model.config):
        setattr(model.config, name, left)
    for path, attribute in counts:
        setattr(model.get_submodule(path), attribute, left)


def _mark(model: Any, plan: Plan) -> None:
    """Make the model one of the moefit format, as if it had been loaded from it."""
    config = MoefitConfig.of({layer: p.slot_map() for layer, p in plan.by_layer.items()})
    model.config.quantization_config = config
    model.hf_quantizer = MoefitQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
