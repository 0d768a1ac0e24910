"""How the slots of one layer find pool rows, guests and stand-ins: what config.json holds and the runtime needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from moetailor.errors import PlanError

Vectors = Literal["expert", "layer", "none"]


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """A token's slots split in two: the main ones run their experts, the others only modulate them.

    Attributes:
        main: slots of a token that run, those with the largest gates.
        share: fewer of them run once their gates have this share of all the token's gates; 1 for always `main`.
        renormalise: scale the gates of the main slots so that they sum to those of all slots.
        vectors: the vectors that modulate: one set for each ``expert``, one for the whole ``layer`` or ``none``.
        constants: whether an auxiliary slot gives a constant of its own, as a novice does.
    """

    main: int
    share: float = 1.0
    renormalise: bool = False
    vectors: Vectors = "expert"
    constants: bool = False

    def rows(self, slots: int) -> int:
        """Return how many sets of vectors a layer has.

        Args:
            slots: slots of the layer.
        """
        return {"expert": slots, "layer": 1, "none": 0}[self.vectors]


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What the runtime needs of one layer, as it stands in config.json.

    Attributes:
        slots: for each slot that is left, in the router's order: a pool row; or ``experts`` + n for guest n, and after
            the guests for low-rank expert n; or -1 - n for stand-in n.
        experts: rows of the pool.
        constants: stand-ins; each has a constant.
        scales: factor on each slot's gate; None when all are 1.
        ranks: rank of each stand-in's linear map; None when all are 0.
        shared_input: whether the maps of all stand-ins share their input factor.
        guests: (decoder layer, slot) of experts that lie in other layers: they answer as that slot of that layer does.
        low: (base, rank) of each low-rank expert: it answers as that base plus a part of its own. Bases ascend.
        auxiliary: how slots split into main and auxiliary ones; None when all run.
    """

    slots: tuple[int, ...]
    experts: int
    constants: int = 0
    scales: tuple[float, ...] | None = None
    ranks: tuple[int, ...] | None = None
    shared_input: bool = False
    guests: tuple[tuple[int, int], ...] = ()
    low: tuple[tuple[int, int], ...] = ()
    auxiliary: Auxiliary | None = None

    @cached_property
    def shared(self) -> bool:
        """Whether two slots share a pool row or a guest."""
        rows = [slot for slot in self.slots if slot >= 0]
        return len(set(rows)) < len(rows)

    @cached_property
    def plain(self) -> bool:
        """Whether each slot has a pool row of its own."""
        return not self.shared and not self.constants and not self.guests and not self.low

    @property
    def linear_rows(self) -> tuple[int, int]:
        """Rows of the linear maps' input factors and of their output factors."""
        ranks = self.ranks or (0,)
        return (max(ranks) if self.shared_input else sum(ranks)), sum(ranks)

    @property
    def bases(self) -> int:
        """Shared bases of the low-rank experts."""
        return 1 + max((base for base, _ in self.low), default=-1)

    @property
    def low_rows(self) -> int:
        """Rows of the factors of the low-rank experts' own parts."""
        return sum(rank for _, rank in self.low)

    def to_json(self) -> dict:
        """Return the map as JSON values, without what has its default."""
        return _given(self)

    @classmethod
    def from_json(cls, entry: Mapping) -> SlotMap:
        """Read what `to_json` gave.

        Raises:
            PlanError: the entry has keys that this version does not know.
        """
        _refuse_unknown(cls, entry)
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        read |= {name: tuple((a, b) for a, b in entry.get(name, ())) for name in ("guests", "low")}
        if auxiliary := entry.get("auxiliary"):
            _refuse_unknown(Auxiliary, auxiliary)
            read["auxiliary"] = Auxiliary(**auxiliary)
        return cls(**read)


def _given(entry: Any) -> Any:
    """Return fields that differ from their defaults, as JSON values."""
    if isinstance(entry, tuple):
        return [_given(value) for value in entry]
    if not isinstance(entry, SlotMap | Auxiliary):
        return entry
    return {f.name: _given(getattr(entry, f.name)) for f in fields(entry) if getattr(entry, f.name) != f.default}


def _refuse_unknown(cls: type, entry: Mapping) -> None:
    if unknown := set(entry) - {f.name for f in fields(cls)}:
        raise PlanError(
            f"slot map has unknown keys {sorted(unknown)}: written by a later version of moetailor; update it"
        )
