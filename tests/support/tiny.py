"""The tiny checkpoints: which of them a test takes, text for them, how to load them, a plan with one of everything."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import moetailor
from moetailor.answers import Constant, Drop, Keep, Linear, Remap
from moetailor.checkpoint.anatomy import Anatomy, discover, tensors_of
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.methods.run import view_of
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan
from moetailor.planning.view import LayerView
from support.families import FAMILIES

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
# Families that differ most: biases, groups of experts, shared ones, and none of these.
ARCHETYPES = ["deepseek_v3", "gpt_oss", "olmoe", "qwen2_moe"]
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def every_family_with(argument: str, *variants: Any, ids: list[str] | None = None) -> pytest.MarkDecorator:
    """Run a test with every variant on the archetypes, and on the other families with one each, in turn; the rest of
    the product is marked slow.
    """
    told = ids or [str(variant) for variant in variants]
    return pytest.mark.parametrize(
        ("name", argument),
        [
            pytest.param(name, variant, id=f"{said}-{name}", marks=_marks(name, turn, len(variants)))
            for name in sorted(FAMILIES)
            for turn, (variant, said) in enumerate(zip(variants, told, strict=True))
        ],
    )


def families_in_turn(turn: int) -> pytest.MarkDecorator:
    """Run a test on the archetypes and on each third of the other families, the rest is marked slow.

    Args:
        turn: the first of them, 0 to 2. Tests of formats and answers have different ones: each family is in some.
    """
    names = [pytest.param(name, marks=_marks(name, turn, 3)) for name in sorted(FAMILIES)]
    return pytest.mark.parametrize("name", names)


def _marks(name: str, turn: int, turns: int) -> tuple[pytest.MarkDecorator, ...]:
    now = name in ARCHETYPES or sorted(FAMILIES).index(name) % turns == turn
    return () if now else (pytest.mark.slow,)


def token_batches(count: int = 2, length: int = 12, vocabulary: int = 128) -> list[moetailor.Batch]:
    """Return batches of random token ids: one of two sequences, the others of one, so that shapes differ."""
    generator = torch.Generator().manual_seed(1)
    sizes = [2] + [1] * (count - 1)
    return [moetailor.Batch.of(torch.randint(3, vocabulary, (size, length), generator=generator)) for size in sizes]


def load(folder: Path) -> nn.Module:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    # Mapped weights may lie at odd addresses, where a product can round another way.
    for tensor in tensors_of(model).values():
        tensor.data = tensor.data.clone()
    return eager(model.eval())


def stops_transformers_alone(folder: Path) -> bool:
    """Say whether transformers stops at a checkpoint, by the name of moetailor, where that was not imported."""
    with pytest.MonkeyPatch.context() as patch:
        for known in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
            patch.delitem(known, "moetailor")
        try:
            with quiet_transformers():
                AutoModelForCausalLM.from_pretrained(folder)
        except ValueError as error:
            return "moetailor" in str(error)
    return False


def eager(model: nn.Module) -> nn.Module:
    model.set_experts_implementation("eager")
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def anatomy_of(model: nn.Module) -> Anatomy:
    return discover(model.config, model)


def view(calibration: moetailor.Calibration, index: int = 1) -> LayerView:
    return view_of(calibration, index, ExpertWeights(calibration.model.source))


def mixed_plan(calibration: moetailor.Calibration, drop: bool) -> Plan:
    """Return a plan with a remap, a constant, a linear map and perhaps a drop in each layer, the rest kept."""
    facts = calibration.model
    layers = {}
    for stack in facts.stacks:
        slots = [Keep() for number in range(stack.num_experts)]
        slots[1] = Remap(3, 0.5)
        slots[2] = Constant()
        slots[5] = Linear(2)
        if drop:
            slots[0] = Drop()
        layers[stack.prefix] = LayerPlan(slots=tuple(slots))
    plan = moetailor.make_plan(calibration, "linear", moetailor.Budget.parse(keep=facts.stacks[0].num_experts - 1))
    return Plan(
        method="linear",
        parameters=plan.parameters,
        budget="by hand",
        model=facts,
        calibration=plan.calibration,
        layers=layers,
    )
