"""The answer to the one question, slot by slot: an expert of the pool, nothing, or a constant vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from moefit.errors import PlanError

Kind = Literal["expert", "drop", "constant"]


@dataclass(frozen=True)
class Slot:
    """What stands behind one output of a router.

    Attributes:
        kind: ``expert`` (its own or another one answers), ``drop`` (nothing: the router's row goes too) or
            ``constant`` (a vector that the calibration gives, a novice).
        expert: the expert that answers, for ``expert``.
        scale: factor on the slot's gate, for ``expert``.
    """

    kind: Kind
    expert: int | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What the runtime needs of one layer, as it stands in config.json.

    Attributes:
        slots: for each slot that is left, in the router's order: a pool row, or -1 - n for stand-in n.
        experts: rows of the pool.
        constants: constant stand-ins.
        scales: factor on each slot's gate; None when all are 1.
    """

    slots: tuple[int, ...]
    experts: int
    constants: int = 0
    scales: tuple[float, ...] | None = None

    @cached_property
    def shared(self) -> bool:
        """Whether two slots share a pool row."""
        rows = [slot for slot in self.slots if slot >= 0]
        return len(set(rows)) < len(rows)

    @cached_property
    def plain(self) -> bool:
        """Whether each slot has a pool row of its own."""
        return not self.shared and not self.constants

    def to_json(self) -> dict:
        """Return the map as JSON values, without what has its default."""
        entry: dict = {"slots": list(self.slots), "experts": self.experts}
        if self.constants:
            entry["constants"] = self.constants
        if self.scales is not None:
            entry["scales"] = list(self.scales)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping) -> SlotMap:
        """Read what `to_json` gave.

        Raises:
            PlanError: the entry has keys that this version does not know.
        """
        unknown = set(entry) - {"slots", "experts", "constants", "scales"}
        if unknown:
            raise PlanError(
                f"slot map has unknown keys {sorted(unknown)}: written by a later version of moefit; update it"
            )
        scales = entry.get("scales")
        return cls(
            slots=tuple(entry["slots"]),
            experts=entry["experts"],
            constants=entry.get("constants", 0),
            scales=None if scales is None else tuple(scales),
        )


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of the slots of one MoE layer.

    Attributes:
        slots: one entry for each slot, in the router's order.
        scores: what the method ranked by, one number a slot; empty when it had none.
    """

    slots: tuple[Slot, ...]
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # Six digits, as in the file, so that a plan that was saved and loaded is the same plan.
        object.__setattr__(self, "scores", tuple(float(f"{float(score):.6g}") for score in self.scores))

    @property
    def pool(self) -> list[int]:
        """Experts whose weights stay, ascending."""
        return sorted({slot.expert for slot in self.slots if slot.expert is not None})

    @property
    def kept_slots(self) -> list[int]:
        """Slots that stay in the router."""
        return [number for number, slot in enumerate(self.slots) if slot.kind != "drop"]

    @property
    def constants(self) -> list[int]:
        """Slots behind which a constant stands."""
        return [number for number, slot in enumerate(self.slots) if slot.kind == "constant"]

    @property
    def untouched(self) -> bool:
        """Whether every slot keeps its own expert."""
        return all(slot == Slot("expert", number) for number, slot in enumerate(self.slots))

    @property
    def native(self) -> bool:
        """Whether every slot keeps its own expert or is dropped, which an ordinary checkpoint can say."""
        return all(slot == Slot("expert", number) for number, slot in enumerate(self.slots) if slot.kind != "drop")

    def slot_map(self) -> SlotMap:
        """Return the map from the slots that are left to pool rows and stand-ins."""
        row = {expert: number for number, expert in enumerate(self.pool)}
        constant = {slot: -1 - number for number, slot in enumerate(self.constants)}
        left = [(number, self.slots[number]) for number in self.kept_slots]
        scales = tuple(slot.scale for _, slot in left)
        return SlotMap(
            slots=tuple(constant[number] if slot.expert is None else row[slot.expert] for number, slot in left),
            experts=len(row),
            constants=len(constant),
            scales=scales if any(scale != 1.0 for scale in scales) else None,
        )

    def to_json(self) -> dict:
        """Return the slots grouped by what became of them."""
        groups: dict = {"keep": [], "drop": [], "constant": [], "remap": {}}
        for number, slot in enumerate(self.slots):
            if slot == Slot("expert", number):
                groups["keep"].append(number)
            elif slot.kind == "expert":
                answer = slot.expert if slot.scale == 1.0 else {"expert": slot.expert, "scale": slot.scale}
                groups["remap"][str(number)] = answer
            else:
                groups[slot.kind].append(number)
        entry: dict = {"experts": len(self.slots)} | {name: group for name, group in groups.items() if group}
        return entry | ({"scores": list(self.scores)} if self.scores else {})

    @classmethod
    def from_json(cls, entry: Mapping, where: str) -> LayerPlan:
        """Read what `to_json` gave, perhaps edited by hand.

        Raises:
            PlanError: a slot is named twice or not at all, or a number is out of range.
        """
        unknown = set(entry) - {"experts", "keep", "drop", "constant", "remap", "scores"}
        if unknown:
            raise PlanError(f"{where}: unknown keys {sorted(unknown)}")
        size = entry["experts"]
        slots: dict[int, Slot] = {}
        named: list[tuple[int, Slot]] = [(n, Slot("expert", n)) for n in entry.get("keep", ())]
        named += [(n, Slot("drop")) for n in entry.get("drop", ())]
        named += [(n, Slot("constant")) for n in entry.get("constant", ())]
        for number, answer in entry.get("remap", {}).items():
            full = answer if isinstance(answer, dict) else {"expert": answer}
            if unknown := set(full) - {"expert", "scale"}:
                raise PlanError(f"{where}: slot {number} has unknown keys {sorted(unknown)}")
            named.append((int(number), Slot("expert", full["expert"], float(full.get("scale", 1.0)))))
        for number, slot in named:
            if type(number) is not int or type(slot.expert or 0) is not int:
                raise PlanError(f"{where}: slot {number!r} or its expert {slot.expert!r} is not a whole number")
            if not math.isfinite(slot.scale):
                raise PlanError(f"{where}: slot {number} has scale {slot.scale}; give a finite number")
            if number in slots:
                raise PlanError(f"{where}: slot {number} is named twice")
            if not 0 <= number < size or not 0 <= (slot.expert or 0) < size:
                raise PlanError(f"{where}: slot {number} or its expert {slot.expert} is outside 0..{size - 1}")
            slots[number] = slot
        lost = [number for number in range(size) if number not in slots]
        if lost:
            raise PlanError(f"{where}: slots {lost} are not named; each of {size} needs keep, drop, constant or remap")
        return cls(slots=tuple(slots[number] for number in range(size)), scores=tuple(entry.get("scores", ())))


def keep_only(experts: int, kept: Iterable[int], otherwise: Kind, scores: Sequence[float] = ()) -> LayerPlan:
    """Return the plan in which some experts stay and every other slot gets the same answer.

    Args:
        experts: slots of the layer.
        kept: experts that stay.
        otherwise: ``drop`` or ``constant``.
        scores: what they were chosen by.
    """
    kept = set(kept)
    slots = tuple(Slot("expert", number) if number in kept else Slot(otherwise) for number in range(experts))
    return LayerPlan(slots=slots, scores=tuple(scores))
