"""Drop: nothing stands behind a slot; the router's row goes too."""

from __future__ import annotations

from dataclasses import dataclass

from moetailor.answers.answer import Answer, Context
from moetailor.errors import PlanError


@dataclass(frozen=True)
class Drop(Answer):
    """Nothing: the slot goes.

    Attributes:
        into: the centre of the merged expert that the slot's expert becomes a part of, if any.
    """

    into: int | None = None

    kind = "drop"
    letter = "."
    label = "dropped"
    color = "#d55e00"
    drops = True
    alike = True
    refers = "into"

    @classmethod
    def standing_for(cls, other: int) -> Drop:
        """Return a slot that goes, its expert with it."""
        return cls()

    def is_native(self, slot: int) -> bool:
        """Say yes."""
        return True

    def describe(self) -> str:
        """Say what the expert became a part of."""
        return self.label if self.into is None else f"{self.label}, merged into {self.into}"

    def check(self, slot: int, context: Context) -> None:
        """Refuse an expert that is merged into one that is none of several."""
        if self.into is not None and not context.slots[self.into].rebuilds:
            raise PlanError(
                f"{context.where}: slot {slot} is merged into {self.into}, whose own slot is not; a merged expert lies "
                "in the place of one of its members"
            )
