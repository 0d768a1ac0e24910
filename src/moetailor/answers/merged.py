"""Merged: one expert made of several answers for all of them; it lies in the place of one of them, the centre."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moetailor.answers.answer import Answer, Context
from moetailor.answers.drop import Drop
from moetailor.errors import PlanError


@dataclass(frozen=True)
class Merged(Answer):
    """An expert made of several.

    Attributes:
        into: the centre, in whose place it lies.
    """

    into: int

    kind = "merged"
    letter = "m"
    label = "merged"
    color = "#cc79a7"
    expands = True
    rebuilds = True
    refers = "into"

    def expert(self, slot: int) -> int:
        """Return the centre."""
        return self.into

    def is_native(self, slot: int) -> bool:
        """Say yes for the centre itself: with the other slots dropped it is an expert like any other."""
        return slot == self.into

    def describe(self) -> str:
        """Name the centre."""
        return f"merged into {self.into}"

    def check(self, slot: int, context: Context) -> None:
        """Refuse a centre that is not merged itself."""
        if context.slots[self.into] != Merged(self.into):
            raise PlanError(
                f"{context.where}: slot {slot} is merged into {self.into}, whose own slot is not; a merged expert lies "
                "in the place of one of its members"
            )

    def placed(self, slot_of: Callable[[int, int], int]) -> None:
        """Return nothing: the row is all."""


def clusters(slots: Sequence[Answer]) -> dict[int, list[int]]:
    """Return the members of each merged expert by its centre, dropped ones included, ascending."""
    found: dict[int, list[int]] = {}
    for slot, answer in enumerate(slots):
        if isinstance(answer, Merged | Drop) and answer.into is not None:
            found.setdefault(answer.into, []).append(slot)
    return dict(sorted(found.items()))
