"""Constant: a vector in place of an expert's output, a novice (MoNE, arXiv:2507.00390)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moetailor.answers.answer import Answer, Call
from moetailor.answers.products import added_rows, weighted_rows
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import TensorSpec

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap


@dataclass(frozen=True)
class Constant(Answer):
    """A vector. Tensor: ``constant`` [n, D]."""

    kind = "constant"
    letter = "c"
    label = "constant"
    color = "#e69f00"

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return a row for each slot."""
        return {"constant": TensorSpec(shape=(len(slots.of(cls)), shape.width))}

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return ``constant_slot``: the row of each slot, -1 for none."""
        return {"constant_slot": slots.numbered(slots.of(cls))}

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add g c for each slot."""
        table = module.tensor("constant")
        if call.listed is not None:
            numbers = {slot: number for number, slot in enumerate(module.slots.of(cls))}
            return added_rows(out_TD, table, call.gates(numbers))
        given_TD = weighted_rows(table, call.of_slots(module.constant_slot), call.gate_TK)
        return out_TD.add_(given_TD)
