"""Remap: another expert of the same layer answers, with a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moetailor.answers.answer import Answer, Context
from moetailor.errors import PlanError


@dataclass(frozen=True)
class Remap(Answer):
    """Another expert of the layer, unchanged.

    Attributes:
        to: that expert.
        scale: factor on the slot's gate.
    """

    to: int
    scale: float = 1.0

    kind = "remap"
    letter = ">"
    label = "another expert"
    color = "#56b4e9"
    expands = True
    refers = "to"

    def expert(self, slot: int) -> int:
        """Return the expert that answers."""
        return self.to

    def describe(self) -> str:
        """Name the expert and the scale."""
        return f"expert {self.to}" + ("" if self.scale == 1.0 else f" x {self.scale:.3g}")

    def check(self, slot: int, context: Context) -> None:
        """Refuse an expert whose weights do not stay as they are."""
        if context.slots[self.to].rebuilds:
            raise PlanError(
                f"{context.where}: slot {slot} asks for expert {self.to} unchanged, which is "
                f"{context.slots[self.to].label}"
            )

    def placed(self, slot_of: Callable[[int, int], int]) -> None:
        """Return nothing: the row is all."""
