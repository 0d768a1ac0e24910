"""How the slots of one layer find pool rows, guests and stand-ins: what config.json holds and the runtime needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from moefit.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What the runtime needs of one layer, as it stands in config.json.

    Attributes:
        slots: for each slot that is left, in the router's order: a pool row, or ``experts`` + n for guest n, or -1 - n
            for stand-in n.
        experts: rows of the pool.
        constants: stand-ins; each has a constant.
        scales: factor on each slot's gate; None when all are 1.
        ranks: rank of each stand-in's linear map; None when all are 0.
        shared_input: whether the maps of all stand-ins share their input factor.
        guests: (decoder layer, slot) of experts that lie in other layers: they answer as that slot of that layer does.
    """

    slots: tuple[int, ...]
    experts: int
    constants: int = 0
    scales: tuple[float, ...] | None = None
    ranks: tuple[int, ...] | None = None
    shared_input: bool = False
    guests: tuple[tuple[int, int], ...] = ()

    @cached_property
    def shared(self) -> bool:
        """Whether two slots share a pool row or a guest."""
        rows = [slot for slot in self.slots if slot >= 0]
        return len(set(rows)) < len(rows)

    @cached_property
    def plain(self) -> bool:
        """Whether each slot has a pool row of its own."""
        return not self.shared and not self.constants and not self.guests

    @property
    def linear_rows(self) -> tuple[int, int]:
        """Rows of the linear maps' input factors and of their output factors."""
        ranks = self.ranks or (0,)
        return (max(ranks) if self.shared_input else sum(ranks)), sum(ranks)

    def to_json(self) -> dict:
        """Return the map as JSON values, without what has its default."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        entry = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return entry | ({"guests": [list(guest) for guest in self.guests]} if self.guests else {})

    @classmethod
    def from_json(cls, entry: Mapping) -> SlotMap:
        """Read what `to_json` gave.

        Raises:
            PlanError: the entry has keys that this version does not know.
        """
        unknown = set(entry) - {f.name for f in fields(cls)}
        if unknown:
            raise PlanError(
                f"slot map has unknown keys {sorted(unknown)}: written by a later version of moefit; update it"
            )
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        read["guests"] = tuple((layer, slot) for layer, slot in entry.get("guests", ()))
        return cls(**read)
