"""Layers of all that a slot may be, and every way to store codes: what few tokens are decoded with."""

import torch
from torch import nn

from moetailor.answers import WHOLE, Answer, Auxiliary, Constant, Keep, Linear, LowRank, Narrow, Remap, Width
from moetailor.checkpoint.anatomy import discover
from moetailor.planning.layer_plan import LayerPlan
from moetailor.runtime.reshape import LayerChange, reshape_model
from support.families import tiny_model

CODES = [
    "int8g16",
    "uint8g32",
    "uint7g16",
    "int6g32",
    "uint5g24",
    "uint4g16",
    "int4g10",
    "int3g32",
    "uint3g8",
    "uint2g24",
]
CODES += ["vq4g16", "vq3g32", "vq2g16", "vq1g24", "fp8", "fp8b128", "mxfp4", "nvfp4"]
BITS = ["8", "vq3/5", "int4g8", "fp8", "mxfp4", "nvfp4", "fp8b128", "int4g8"]
OWN: list[Answer] = [Keep()] * 8
SLOTS: dict[str, tuple[list[Answer], dict[int, Width]]] = {
    "answers": ([*OWN[:3], Remap(1, 0.5), Constant(), Linear(3), LowRank(6, 3), LowRank(6, 2)], {}),
    "int8": ([*OWN[:6], Linear(3, int8=True), Linear(2, int8=True)], {}),
    "shared": ([*OWN[:6], Linear(3, shared=True), Linear(3, shared=True)], {}),
    "auxiliary": ([*[Auxiliary(1, vectors="none", constants=True, rank=3)] * 6, Linear(2), Constant()], {}),
    "auxiliary in groups": ([Auxiliary(1, vectors="none", constants=True, rank=8)] * 8, {}),
    "narrow": ([*[Narrow(7)] * 6, Linear(2), Constant()], {}),
    "bits": (OWN, {expert: Width.parse(bits) for expert, bits in enumerate(BITS)}),
    "whole": (OWN, {0: WHOLE, 1: WHOLE, 2: Width.parse("4"), 3: Width.parse("vq2/4")}),
    "both": ([*OWN[:4], Constant(), LowRank(5, 0), Linear(2), Keep()], dict.fromkeys(range(3), Width.parse("vq4/5"))),
}


def layer(slots: list[Answer], widths: dict[int, Width], family: str = "olmoe") -> nn.Module:
    """Return the experts of a tiny layer with these answers and random numbers."""
    model, plan = tiny_model(family), LayerPlan(slots=tuple(slots), widths=widths)
    anatomy, slot_map = discover(model.config, model), plan.slot_map()
    first = next(iter(anatomy.layers.values()))
    change = LayerChange(experts=slot_map.plain_pool, slots=plan.kept_slots, slot_map=slot_map)
    reshape_model(model, anatomy, {first.index: change})
    module = model.get_submodule(first.experts)
    generator = torch.Generator().manual_seed(0)
    for name, spec in module.added.items():
        for part, stored in spec.encode(name, torch.randn(spec.shape, generator=generator) / 4, "F32").items():
            getattr(module, part).data.copy_(stored)
    return module
