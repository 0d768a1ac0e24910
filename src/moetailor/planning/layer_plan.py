"""The plan of one layer: an answer for each slot of its router."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, TypeVar

from moetailor.answers import ANSWERS, WHOLE, Answer, Drop, Keep, Merged, Packed, Remap, SlotMap, Width
from moetailor.answers.groups import MOST_SLOTS, read_groups, write_groups
from moetailor.checkpoint.experts import ExpertShape
from moetailor.errors import PlanError
from moetailor.schema import Within, read

A = TypeVar("A", bound=Answer)
CURE = "mend the plan, or make it again"
# For questions about a plan that the sizes of its experts do not change.
ANY_SHAPE = ExpertShape(width=1, intermediate=1)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of the slots of one MoE layer.

    Attributes:
        slots: an answer for each slot, in the router's order.
        scores: what the method ranked by, one number a slot; empty when it had none.
        expected: KL that the method expects the layer to cost, nats a token; None when it does not say.
        widths: how experts of the pool lie that are kept in few bits; the others lie as they lay.
    """

    slots: tuple[Answer, ...]
    scores: tuple[float, ...] = ()
    expected: float | None = None
    widths: Mapping[int, Width] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Six digits, as in the file, so that a plan that was saved and loaded is the same plan.
        object.__setattr__(self, "scores", tuple(float(f"{float(score):.6g}") for score in self.scores))
        if self.expected is not None:
            object.__setattr__(self, "expected", float(f"{self.expected:.6g}"))

    @cached_property
    def pool(self) -> list[int]:
        """Experts in whose place weights stay, unchanged or computed anew, ascending."""
        return sorted({expert for expert, _ in self._in_pool})

    @cached_property
    def rebuilt(self) -> list[int]:
        """Those of the pool whose weights are computed anew, ascending."""
        return sorted({expert for expert, answer in self._in_pool if answer.rebuilds})

    @cached_property
    def plain(self) -> list[int]:
        """Those of the pool that lie as the family's own parameters, ascending."""
        beside = {expert for expert, answer in self._in_pool if answer.beside}
        return [expert for expert in self.pool if expert not in self.widths and expert not in beside]

    @cached_property
    def packed(self) -> dict[Width, list[int]]:
        """Those in few bits by their width, ascending."""
        found: dict[Width, list[int]] = {}
        for expert, width in sorted(self.widths.items()):
            found.setdefault(width, []).append(expert)
        return found

    @property
    def _in_pool(self) -> list[tuple[int, Answer]]:
        found = ((answer.expert(slot), answer) for slot, answer in enumerate(self.slots))
        return [(expert, answer) for expert, answer in found if expert is not None]

    @cached_property
    def answers(self) -> tuple[Answer, ...]:
        """What stands behind each slot, as it lies: a slot's own expert in few bits is another answer than one as it
        lay.
        """
        return tuple(
            Packed.of(self.widths[slot]) if answer == Keep() and slot in self.widths else answer
            for slot, answer in enumerate(self.slots)
        )

    def narrowed(self, width: Width | None) -> LayerPlan:
        """Return the plan with the whole pool in one width; itself for None."""
        return self if width is None else replace(self, widths=dict.fromkeys(self.pool, width))

    def beside_codes(self) -> LayerPlan:
        """Return the plan for a layer whose experts lie as codes: those computed anew lie beside as numbers."""
        anew = {expert: WHOLE for expert in self.rebuilt if expert not in self.widths}
        return replace(self, widths=anew | dict(self.widths)) if anew else self

    @property
    def kept_slots(self) -> list[int]:
        """Slots that stay in the router."""
        return [slot for slot, answer in enumerate(self.slots) if not answer.drops]

    def of(self, kind: type[A]) -> dict[int, A]:
        """Return the answers of a kind by slot."""
        return {slot: answer for slot, answer in enumerate(self.slots) if isinstance(answer, kind)}

    @property
    def stored(self) -> int:
        """Experts' worth of weights that stay: the pool, and whole experts that answers have of their own."""
        return self.slot_map().whole_experts

    @property
    def computed(self) -> set[str]:
        """The kinds of answers here for which a method must compute tensors."""
        added = self.slot_map()
        found = {
            kind.kind for kind in added.kinds if any(all(s.shape) for s in kind.tensors(added, ANY_SHAPE).values())
        }
        return found | {answer.kind for answer in self.slots if answer.rebuilds}

    @property
    def untouched(self) -> bool:
        """Whether every slot keeps its own expert as it lies."""
        return not self.widths and all(answer == Keep() for answer in self.slots)

    @property
    def only_drops(self) -> bool:
        """Whether each slot is dropped or has an expert of its own, however that lies."""
        return all(answer.is_native(slot) for slot, answer in enumerate(self.slots))

    @property
    def native(self) -> bool:
        """Whether an ordinary checkpoint with fewer experts can hold it."""
        return not self.widths and self.only_drops

    def slot_map(self, slot_of: Callable[[int, int], int] = lambda layer, expert: expert) -> SlotMap:
        """Return the map from the slots that are left to rows of the pool and other answers.

        Args:
            slot_of: see `Answer.placed`; as if all layers kept all slots, when it is left out.
        """
        row = {expert: number for number, expert in enumerate(self.pool)}
        left = [(slot, self.slots[slot]) for slot in self.kept_slots]
        scales = tuple(answer.scale for _, answer in left)
        experts = [answer.expert(slot) for slot, answer in left]
        placed = [answer.placed(slot_of) for _, answer in left]
        widths = [None if expert is None else self.widths.get(expert) for expert in experts]
        return SlotMap(
            experts=len(row),
            rows=tuple(-1 if expert is None else row[expert] for expert in experts),
            answers=tuple(Packed.of(width) if width else other for width, other in zip(widths, placed, strict=True)),
            scales=scales if any(scale != 1.0 for scale in scales) else None,
        )

    def to_json(self) -> dict:
        """Return the slots grouped by what became of them."""
        entry: dict[str, Any] = {"experts": len(self.slots)} | write_groups(dict(enumerate(self.slots)))
        lying = [{"experts": experts, **asdict(width)} for width, experts in self.packed.items()]
        entry |= {"widths": lying} if lying else {}
        entry |= {} if self.expected is None else {"expected": self.expected}
        return entry | ({"scores": list(self.scores)} if self.scores else {})

    @classmethod
    def from_json(cls, entry: Any, where: str) -> LayerPlan:
        """Read what `to_json` gave, perhaps edited by hand.

        Raises:
            PlanError: a slot is named twice or not at all, or a value does not fit.
        """

        def checked(kind: Any, name: str) -> Any:
            return read(kind, entry.get(name), f"{where}, {name}", error=PlanError, cure=CURE)

        read(dict[str, Any], entry, where, error=PlanError, cure=CURE)
        if unknown := set(entry) - {"experts", "scores", "expected", "widths", *ANSWERS}:
            raise PlanError(f"{where}: unknown keys {sorted(unknown)}; {CURE}")
        size = checked(Annotated[int, Within(1, MOST_SLOTS)], "experts")
        found = read_groups(entry, size, where, experts=size, error=PlanError, cure=CURE)
        if lost := [slot for slot in range(size) if slot not in found]:
            kinds = ", ".join(name for name, kind in ANSWERS.items() if kind.from_method)
            raise PlanError(f"{where}: slots {lost} are not named; each of {size} needs one of {kinds}")
        scores = checked(tuple[float, ...] | None, "scores") or ()
        if len(scores) not in (0, size):
            raise PlanError(f"{where}, scores: {len(scores)} for {size} experts; {CURE}")
        return cls(
            slots=tuple(found[slot] for slot in range(size)),
            scores=scores,
            expected=checked(float | None, "expected"),
            widths=_read_widths(checked(list[dict[str, Any]] | None, "widths") or [], size, f"{where}, widths"),
        )


def _read_widths(groups: Sequence[dict[str, Any]], size: int, where: str) -> dict[int, Width]:
    """Read what `LayerPlan.to_json` gave of widths."""
    found: dict[int, Width] = {}
    for group in groups:
        kind = list[Annotated[int, Within(0, size - 1)]]
        stated = {name: value for name, value in group.items() if name != "experts"}
        experts = read(kind, group.get("experts"), f"{where}, experts", error=PlanError, cure=CURE)
        if twice := [expert for expert in experts if expert in found or experts.count(expert) > 1]:
            raise PlanError(f"{where}: expert {twice[0]} is named twice; {CURE}")
        found |= dict.fromkeys(experts, read(Width, stated, where, error=PlanError, cure=CURE))
    return found


def keep_only(experts: int, kept: Iterable[int], otherwise: Answer, scores: Sequence[float] = ()) -> LayerPlan:
    """Return the plan in which some experts stay and every other slot gets the same answer.

    Args:
        experts: slots of the layer.
        kept: experts that stay.
        otherwise: the answer of the others.
        scores: what they were chosen by.
    """
    kept = set(kept)
    slots = tuple(Keep() if number in kept else otherwise for number in range(experts))
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
    centres = list(centres)
    assert all(centres[centre] == centre for centre in centres)

    def answer(slot: int, centre: int) -> Answer:
        whole = centre in unchanged or centres.count(centre) == 1
        if drop and slot != centre:
            return Drop(None if whole else centre)
        if whole:
            return Keep() if slot == centre else Remap(centre)
        return Merged(centre)

    return LayerPlan(slots=tuple(answer(slot, centre) for slot, centre in enumerate(centres)), scores=tuple(scores))


def keep_first(experts: int, kept: Collection[int], kind: type[Answer]) -> LayerPlan:
    """Return a plan with the counts and bytes of one in which answers of a kind replace all but some experts.

    Args:
        experts: slots of the layer.
        kept: experts that stay, at least one.
        kind: of the other answers.
    """
    if len(kept) == experts:
        return untouched(experts)
    last = max(kept)
    other = kind.standing_for(last)
    # What is merged lies in the place of an expert that is merged too.
    slots = (Keep() if slot in kept and not (kind.rebuilds and slot == last) else other for slot in range(experts))
    return LayerPlan(slots=tuple(slots))


def untouched(experts: int) -> LayerPlan:
    """Return the plan in which every slot keeps its own expert."""
    return LayerPlan(slots=(Keep(),) * experts)
