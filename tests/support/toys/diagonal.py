"""An answer: the input, each number times a weight of its own and plus a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moetailor.answers import Answer, Call, SlotMap
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import TensorSpec


@dataclass(frozen=True)
class Diagonal(Answer):
    """w x + b. Tensors: ``diagonal_weight`` and ``diagonal_bias`` [n, D]."""

    storage: str = "plain"

    kind = "diagonal"
    letter = "/"
    label = "diagonal map"
    color = "#663399"

    def describe(self) -> str:
        return f"diagonal, {self.storage}"

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        found = list(slots.of(cls).values())
        size = (len(found), shape.width)
        return {
            "diagonal_weight": TensorSpec(shape=size, storage=found[0].storage),
            "diagonal_bias": TensorSpec(shape=size, dtype="F32"),
        }

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        return {"diagonal_slot": slots.numbered(slots.of(cls))}

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        number_TK = call.of_slots(module.diagonal_slot)
        gate_TK1 = call.gate_TK.masked_fill(number_TK < 0, 0)[..., None]
        number_TK = number_TK.clamp_min(0)
        weight, bias = (module.tensor(f"diagonal_{name}")[number_TK] for name in ("weight", "bias"))
        return out_TD + (gate_TK1 * (weight * call.hidden_TD[:, None] + bias)).sum(1)
