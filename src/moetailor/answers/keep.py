"""Keep: a slot's own expert, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moetailor.answers.answer import Answer


@dataclass(frozen=True)
class Keep(Answer):
    """The slot's own expert, unchanged."""

    kind = "keep"
    letter = "#"
    label = "kept"
    color = "#8f979f"
    expands = True

    def expert(self, slot: int) -> int:
        """Return the slot's own expert."""
        return slot

    def is_native(self, slot: int) -> bool:
        """Say yes."""
        return True

    def placed(self, slot_of: Callable[[int, int], int]) -> None:
        """Return nothing: the row is all."""
