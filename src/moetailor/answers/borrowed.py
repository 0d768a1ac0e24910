"""Borrowed: an expert that another layer stores answers, as that layer's experts module gives it.

Nothing is stored, tied or copied: saving needs no rule, and accelerate's hooks see an ordinary call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.keep import Keep
from moetailor.answers.products import joined_gates
from moetailor.checkpoint.experts import Experts
from moetailor.errors import PlanError

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap


@dataclass(frozen=True)
class Borrowed(Answer):
    """An expert of another layer, unchanged.

    Attributes:
        layer: the decoder layer that stores it, the lender.
        source: the expert there; in config.json the slot behind which the lender keeps it.
        scale: factor on the slot's gate.
    """

    layer: int
    source: int
    scale: float = 1.0

    kind = "borrowed"
    letter = "<"
    label = "another layer's expert"
    color = "#56b4e9"
    expands = True

    @classmethod
    def standing_for(cls, other: int) -> Borrowed:
        """Return an expert of the first layer."""
        return cls(0, other)

    def lender(self) -> int:
        """Return the layer that stores the expert."""
        return self.layer

    def describe(self) -> str:
        """Name the layer, the expert and the scale."""
        return f"expert {self.source} of layer {self.layer}" + ("" if self.scale == 1.0 else f" x {self.scale:.3g}")

    def check(self, slot: int, context: Context) -> None:
        """Refuse an expert that its layer does not keep, or of another shape."""
        where, lender = context.where, context.other(self.layer)
        if lender is None or not 0 <= self.source < lender[0].num_experts:
            raise PlanError(f"{where}: slot {slot} asks for expert {self.source} of layer {self.layer}: no such expert")
        stack, slots = lender
        mine = context.stack
        if mine is not None and (stack.expert_bytes, stack.dtype) != (mine.expert_bytes, mine.dtype):
            raise PlanError(
                f"{where}: slot {slot} asks for an expert of {stack.expert_bytes:,} bytes of layer {self.layer}, its "
                f"own have {mine.expert_bytes:,}; only layers of one shape can share"
            )
        if slots is not None and slots[self.source] != Keep():
            raise PlanError(
                f"{where}: slot {slot} asks for expert {self.source} of layer {self.layer}, which does not keep it"
            )

    def weights(self, module: Any, slot: int) -> dict[str, torch.Tensor]:
        """Return the lender's expert."""
        lender = module.lenders[self.layer]
        return lender.weights(self.source) if hasattr(lender, "slots") else Experts(lender).expert(self.source)

    def placed(self, slot_of: Callable[[int, int], int]) -> Borrowed:
        """Return it with the slot that the lender has for the expert; the map holds its scale."""
        return replace(self, source=slot_of(self.layer, self.source), scale=1.0)

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return ``borrowed_slot``: the number of each slot's lender and source, -1 for none."""
        every = sources(slots)
        number = torch.full((len(slots.answers),), -1, dtype=torch.int32)
        for slot, answer in slots.of(cls).items():
            number[slot] = every.index(answer)
        return {"borrowed_slot": number}

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add what the lenders give; slots with one source run it once for a token."""
        number_TK, gate_TK = joined_gates(call.of_slots(module.borrowed_slot), call.gate_TK)
        for number, source in enumerate(sources(module.slots)):
            token, place = (number_TK == number).nonzero().unbind(1)
            if len(token):
                gate_P1 = gate_TK[token, place, None]
                given_PD = _asked(module.lenders[source.layer], call.hidden_TD[token], source.source, gate_P1)
                out_TD.index_add_(0, token, given_PD.to(out_TD))
        return out_TD


def sources(slots: SlotMap) -> list[Borrowed]:
    """Return the experts of other layers that a layer asks for, each once."""
    return sorted(set(slots.of(Borrowed).values()), key=lambda answer: (answer.layer, answer.source))


def _asked(lender: Any, hidden_PD: torch.Tensor, slot: int, gate_P1: torch.Tensor) -> torch.Tensor:
    """Ask the experts module of another layer for one of its own slots."""
    # Adapters may be around it; experts in few bits are buffers.
    device = next(chain(lender.parameters(), lender.buffers())).device
    if device.type != "meta":  # weights that accelerate has put elsewhere: its hooks move the inputs
        hidden_PD, gate_P1 = hidden_PD.to(device), gate_P1.to(device)
    return lender(hidden_PD, torch.full_like(gate_P1, slot, dtype=torch.long), gate_P1)
