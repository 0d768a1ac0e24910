"""The answer to the one question, slot by slot: an expert of the pool, nothing, or a light stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from moetailor.errors import PlanError
from moetailor.planning.slot_map import Auxiliary, SlotMap

Kind = Literal["expert", "merged", "drop", "constant", "linear", "lowrank"]
STAND_INS = ("constant", "linear")
BUILT = (*STAND_INS, "lowrank", "merged")


@dataclass(frozen=True)
class Slot:
    """What stands behind one output of a router.

    Attributes:
        kind: ``expert`` (its own or another one answers, unchanged), ``merged`` (an expert made of several answers),
            ``drop`` (nothing: the router's row goes too), ``constant`` (a vector, a novice), ``linear`` (a constant
            plus a linear map of low rank) or ``lowrank`` (a base that several share, plus an own part of low rank in
            each of its matrices).
        expert: the expert that answers, for ``expert``; the centre in whose place the merged expert lies, for
            ``merged``; the centre that this slot's expert is folded into, if any, for ``drop``; the member that the
            base is named after, for ``lowrank``.
        scale: factor on the slot's gate, for ``expert``.
        layer: decoder layer of the expert, when it is another layer's.
        rank: rank of the map, for ``linear``, or of the own part, for ``lowrank``.
    """

    kind: Kind
    expert: int | None = None
    scale: float = 1.0
    layer: int | None = None
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of the slots of one MoE layer.

    Attributes:
        slots: one entry for each slot, in the router's order.
        scores: what the method ranked by, one number a slot; empty when it had none.
        shared_input: whether the linear maps of the layer share their input factor.
        auxiliary: how the slots of a token split into main and auxiliary ones; None when all run.
        expected: KL that the method expects the layer to cost, nats a token; None when it does not say.
    """

    slots: tuple[Slot, ...]
    scores: tuple[float, ...] = ()
    shared_input: bool = False
    auxiliary: Auxiliary | None = None
    expected: float | None = None

    def __post_init__(self) -> None:
        # Six digits, as in the file, so that a plan that was saved and loaded is the same plan.
        object.__setattr__(self, "scores", tuple(float(f"{float(score):.6g}") for score in self.scores))
        if self.expected is not None:
            object.__setattr__(self, "expected", float(f"{self.expected:.6g}"))

    @property
    def pool(self) -> list[int]:
        """Experts in whose place weights stay, unchanged or merged, ascending."""
        stored = [slot for slot in self.slots if slot.kind in ("expert", "merged") and slot.layer is None]
        return sorted({slot.expert for slot in stored if slot.expert is not None})

    @property
    def kept_slots(self) -> list[int]:
        """Slots that stay in the router."""
        return [number for number, slot in enumerate(self.slots) if slot.kind != "drop"]

    @property
    def stand_ins(self) -> list[int]:
        """Slots behind which a constant or a linear map stands."""
        return [number for number, slot in enumerate(self.slots) if slot.kind in STAND_INS]

    @property
    def ranks(self) -> list[int]:
        """Rank of each stand-in, 0 for constants."""
        return [self.slots[number].rank for number in self.stand_ins]

    @property
    def bases(self) -> dict[int, list[int]]:
        """Members of each base of low-rank experts by the one that it is named after, ascending."""
        named = sorted({slot.expert for slot in self.slots if slot.kind == "lowrank" and slot.expert is not None})
        return {
            base: [n for n, s in enumerate(self.slots) if (s.kind, s.expert) == ("lowrank", base)] for base in named
        }

    @property
    def low_ranks(self) -> dict[int, int]:
        """Rank of each low-rank expert's own part by slot, base by base."""
        return {slot: self.slots[slot].rank for members in self.bases.values() for slot in members}

    @property
    def stored(self) -> int:
        """Experts' worth of weights that stay: the pool and the bases."""
        return len(self.pool) + len(self.bases)

    @property
    def merged(self) -> dict[int, list[int]]:
        """Members of each merged expert by its centre, dropped ones included, ascending."""
        centres = sorted({slot.expert for slot in self.slots if slot.kind == "merged" and slot.expert is not None})
        folded = ("merged", "drop")
        return {
            centre: [n for n, slot in enumerate(self.slots) if slot.kind in folded and slot.expert == centre]
            for centre in centres
        }

    def is_fitted(self, number: int) -> bool:
        """Say whether an expert stays in its slot with weights fitted anew: merged of itself alone."""
        folded = [n for n, slot in enumerate(self.slots) if slot.kind in ("merged", "drop") and slot.expert == number]
        return self.slots[number] == Slot("merged", number) and folded == [number]

    @property
    def built(self) -> set[str]:
        """The answers whose tensors the original does not have: kinds of slots, and ``vector`` for auxiliary ones."""
        modulated = self.auxiliary is not None and (self.auxiliary.vectors != "none" or self.auxiliary.constants)
        return {slot.kind for slot in self.slots if slot.kind in BUILT} | ({"vector"} if modulated else set())

    @property
    def untouched(self) -> bool:
        """Whether every slot keeps its own expert and runs it."""
        return self.auxiliary is None and all(slot == Slot("expert", number) for number, slot in enumerate(self.slots))

    @property
    def native(self) -> bool:
        """Whether every slot keeps the expert in its own place or is dropped, which an ordinary checkpoint can say."""
        own = ("expert", "merged")
        return self.auxiliary is None and all(
            slot.kind == "drop" or any(slot == Slot(kind, number) for kind in own)
            for number, slot in enumerate(self.slots)
        )

    def slot_map(self, guest_slot: Callable[[int, int], int] | None = None) -> SlotMap:
        """Return the map from the slots that are left to pool rows, guests and stand-ins.

        Args:
            guest_slot: (decoder layer, expert) -> the slot behind which that layer keeps the expert, in the order of
                the slots it has left; needed when experts of other layers answer.
        """
        row = {expert: number for number, expert in enumerate(self.pool)}
        stand_in = {slot: -1 - number for number, slot in enumerate(self.stand_ins)}
        left = [(number, self.slots[number]) for number in self.kept_slots]
        abroad = sorted({(slot.layer, slot.expert or 0) for _, slot in left if slot.layer is not None})
        guest = {at: len(row) + number for number, at in enumerate(abroad)}
        base = {named: number for number, named in enumerate(self.bases)}
        low = {slot: len(row) + len(guest) + number for number, slot in enumerate(self.low_ranks)}
        assert guest_slot is not None or not guest

        def answer(number: int, slot: Slot) -> int:
            if slot.kind in STAND_INS:
                return stand_in[number]
            if slot.kind == "lowrank":
                return low[number]
            assert slot.expert is not None
            return row[slot.expert] if slot.layer is None else guest[slot.layer, slot.expert]

        scales = tuple(slot.scale for _, slot in left)
        return SlotMap(
            slots=tuple(answer(number, slot) for number, slot in left),
            experts=len(row),
            constants=len(stand_in),
            scales=scales if any(scale != 1.0 for scale in scales) else None,
            ranks=tuple(self.ranks) if any(self.ranks) else None,
            shared_input=self.shared_input,
            guests=tuple((layer, guest_slot(layer, expert)) for layer, expert in abroad) if guest_slot else (),
            low=tuple((base[self.slots[slot].expert or 0], rank) for slot, rank in self.low_ranks.items()),
            auxiliary=self.auxiliary,
        )

    def to_json(self) -> dict:
        """Return the slots grouped by what became of them."""
        groups: dict = {"keep": [], "drop": [], "constant": [], "linear": {}, "lowrank": {}, "merged": {}, "remap": {}}
        for number, slot in enumerate(self.slots):
            if slot == Slot("expert", number):
                groups["keep"].append(number)
            elif slot.kind == "expert":
                more = {"layer": slot.layer} if slot.layer is not None else {}
                more |= {"scale": slot.scale} if slot.scale != 1.0 else {}
                groups["remap"][str(number)] = {"expert": slot.expert} | more if more else slot.expert
            elif slot.kind == "linear":
                groups["linear"][str(number)] = slot.rank
            elif slot.kind == "lowrank":
                groups["lowrank"].setdefault(str(slot.expert), {})[str(number)] = slot.rank
            elif slot.kind != "merged":
                groups[slot.kind].append(number)
        groups["merged"] = {str(centre): members for centre, members in self.merged.items()}
        entry: dict = {"experts": len(self.slots)} | {name: group for name, group in groups.items() if group}
        entry |= {"shared_input": True} if self.shared_input else {}
        entry |= {"auxiliary": asdict(self.auxiliary)} if self.auxiliary else {}
        entry |= {} if self.expected is None else {"expected": self.expected}
        return entry | ({"scores": list(self.scores)} if self.scores else {})

    @classmethod
    def from_json(cls, entry: Mapping, where: str) -> LayerPlan:
        """Read what `to_json` gave, perhaps edited by hand.

        Raises:
            PlanError: a slot is named twice or not at all, or a number is out of range.
        """
        groups = ("keep", "drop", "constant", "linear", "lowrank", "merged", "remap")
        if unknown := set(entry) - {"experts", "scores", "shared_input", "auxiliary", "expected", *groups}:
            raise PlanError(f"{where}: unknown keys {sorted(unknown)}")
        size = entry["experts"]
        slots: dict[int, Slot] = {}
        for number, slot in _named(entry, where):
            whole = (number, slot.expert or 0, slot.rank, slot.layer or 0)
            if any(type(value) is not int for value in whole):
                raise PlanError(f"{where}: slot {number!r} or its expert {slot.expert!r} is not a whole number")
            if not math.isfinite(slot.scale):
                raise PlanError(f"{where}: slot {number} has scale {slot.scale}; give a finite number")
            if slot.kind == "linear" and slot.rank < 1:
                raise PlanError(f"{where}: slot {number} has a linear map of rank {slot.rank}; give at least 1")
            if slot.kind == "lowrank" and slot.rank < 0:
                raise PlanError(f"{where}: slot {number} has a part of rank {slot.rank}; give at least 0")
            if number in slots:
                raise PlanError(f"{where}: slot {number} is named twice")
            if not 0 <= number < size or not 0 <= (slot.expert or 0) < size:
                raise PlanError(f"{where}: slot {number} or its expert {slot.expert} is outside 0..{size - 1}")
            slots[number] = slot
        lost = [number for number in range(size) if number not in slots]
        if lost:
            raise PlanError(f"{where}: slots {lost} are not named; each of {size} needs one of {', '.join(groups)}")
        _check_merged(slots, where)
        auxiliary = entry.get("auxiliary")
        return cls(
            slots=tuple(slots[number] for number in range(size)),
            scores=tuple(entry.get("scores", ())),
            shared_input=bool(entry.get("shared_input", False)),
            auxiliary=Auxiliary(**auxiliary) if auxiliary else None,
            expected=entry.get("expected"),
        )


def keep_only(experts: int, kept: Iterable[int], otherwise: Slot, scores: Sequence[float] = ()) -> LayerPlan:
    """Return the plan in which some experts stay and every other slot gets the same answer.

    Args:
        experts: slots of the layer.
        kept: experts that stay.
        otherwise: the answer of the others.
        scores: what they were chosen by.
    """
    kept = set(kept)
    slots = tuple(Slot("expert", number) if number in kept else otherwise for number in range(experts))
    return LayerPlan(slots=slots, scores=tuple(scores))


def merge_into(
    centres: Sequence[int], scores: Sequence[float] = (), *, drop: bool = False, unchanged: Collection[int] = ()
) -> LayerPlan:
    """Return the plan in which each expert is merged into its centre; an expert that is alone stays as it is.

    Args:
        centres: the centre of each expert; a centre is its own.
        scores: what the centres were chosen by.
        drop: drop the slots of the others, so that only the centres' rows of the router stay.
        unchanged: centres that keep their weights: the others of their clusters are answered by them, not merged.
    """

    def slot(number: int, centre: int) -> Slot:
        if drop and number != centre:
            return Slot("drop", None if centre in unchanged else centre)
        return Slot("expert" if centre in unchanged or centres.count(centre) == 1 else "merged", centre)

    centres = list(centres)
    assert all(centres[centre] == centre for centre in centres)
    return LayerPlan(slots=tuple(slot(n, centre) for n, centre in enumerate(centres)), scores=tuple(scores))


def _named(entry: Mapping, where: str) -> list[tuple[int, Slot]]:
    """Return the slots that a layer's entry names, with their answers."""
    named: list[tuple[int, Slot]] = [(n, Slot("expert", n)) for n in entry.get("keep", ())]
    named += [(n, Slot("constant")) for n in entry.get("constant", ())]
    named += [(int(n), Slot("linear", rank=rank)) for n, rank in entry.get("linear", {}).items()]
    for base, members in entry.get("lowrank", {}).items():
        named += [(int(n), Slot("lowrank", int(base), rank=rank)) for n, rank in members.items()]
    dropped: dict[int, Slot] = {n: Slot("drop") for n in entry.get("drop", ())}
    if len(dropped) < len(entry.get("drop", ())):
        raise PlanError(f"{where}: a dropped slot is named twice")
    for centre, members in entry.get("merged", {}).items():
        for number in members:
            if number in dropped and dropped[number].expert is None:
                dropped[number] = Slot("drop", int(centre))
            else:
                named.append((number, Slot("merged", int(centre))))
    for number, answer in entry.get("remap", {}).items():
        full = answer if isinstance(answer, dict) else {"expert": answer}
        if unknown := set(full) - {"expert", "scale", "layer"}:
            raise PlanError(f"{where}: slot {number} has unknown keys {sorted(unknown)}")
        named.append((int(number), Slot("expert", full["expert"], float(full.get("scale", 1.0)), full.get("layer"))))
    return named + list(dropped.items())


def _check_merged(slots: Mapping[int, Slot], where: str) -> None:
    """Refuse merged experts whose place is not their own slot's or is that of an unchanged expert, and stray bases."""
    for number, slot in slots.items():
        named = slots[slot.expert or 0]
        if slot.kind == "lowrank" and (named.kind, named.expert) != ("lowrank", slot.expert):
            raise PlanError(
                f"{where}: slot {number} shares base {slot.expert}, whose own slot does not; a base is named after one "
                "of its members"
            )
        if slot.kind == "merged" or (slot.kind == "drop" and slot.expert is not None):
            assert slot.expert is not None
            if slots[slot.expert] != Slot("merged", slot.expert):
                raise PlanError(
                    f"{where}: slot {number} is merged into {slot.expert}, whose own slot is not; a merged expert lies "
                    "in the place of one of its members"
                )
        if slot.kind == "expert" and slot.layer is None and slots[slot.expert or 0].kind == "merged":
            raise PlanError(f"{where}: slot {number} asks for expert {slot.expert} unchanged, which is merged")
