"""How the slots of one compressed layer find rows of the pool and other answers: what config.json holds of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, TypeVar

import torch

from moetailor.answers.answer import ANSWERS, Answer
from moetailor.answers.groups import MOST_SLOTS, read_groups, write_groups
from moetailor.answers.packed import Packed
from moetailor.answers.width import Width
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import CheckpointError
from moetailor.schema import Within, read

A = TypeVar("A", bound=Answer)
CURE = "the checkpoint is damaged: write it again"


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What the running model needs of one layer, as it stands in config.json.

    Attributes:
        experts: rows of the pool, those in few bits included.
        rows: row of the pool for each slot that is left, in the router's order; -1 for slots that have none.
        answers: what else stands behind each of them; None where the row is all.
        scales: factor on each slot's gate; None when all are 1.
    """

    experts: int
    rows: tuple[int, ...]
    answers: tuple[Answer | None, ...]
    scales: tuple[float, ...] | None = None

    @classmethod
    def of_rows(cls, rows: Iterable[int], experts: int) -> SlotMap:
        """Return the map of slots that have rows of the pool and nothing else."""
        rows = tuple(rows)
        return cls(experts=experts, rows=rows, answers=(None,) * len(rows))

    @cached_property
    def kinds(self) -> tuple[type[Answer], ...]:
        """The kinds of answers beside rows of the pool, in the order in which they are registered."""
        there = {type(answer) for answer in self.answers}
        return tuple(kind for kind in ANSWERS.values() if kind in there)

    @cached_property
    def packed(self) -> dict[Width, dict[int, int]]:
        """The widths of the experts in few bits, each with the number of the expert behind every slot of it: experts of
        one width are numbered as they follow each other in the pool.
        """
        slots_of: dict[Width, list[int]] = {}
        for slot, answer in self.of(Packed).items():
            slots_of.setdefault(answer.width, []).append(slot)
        found = {}
        for width, behind in sorted(slots_of.items(), key=lambda item: item[0].stem):
            pool = sorted({self.rows[slot] for slot in behind})
            found[width] = {slot: pool.index(self.rows[slot]) for slot in behind}
        return found

    @cached_property
    def plain_pool(self) -> tuple[int, ...]:
        """The rows of the pool that lie as the family's own parameters."""
        beside = {row for row, answer in zip(self.rows, self.answers, strict=True) if answer and answer.beside}
        return tuple(row for row in range(self.experts) if row not in beside)

    @cached_property
    def pool_rows(self) -> tuple[int, ...]:
        """The row in the family's parameters of each slot whose row is all, -1 for the others."""
        place = {row: number for number, row in enumerate(self.plain_pool)}
        return tuple(place[row] if answer is None else -1 for row, answer in zip(self.rows, self.answers, strict=True))

    @cached_property
    def pool_numbers(self) -> dict[int, int]:
        """The same by slot, without the others."""
        return {slot: row for slot, row in enumerate(self.pool_rows) if row >= 0}

    @cached_property
    def in_bits(self) -> dict[int, tuple[str, int]]:
        """The stem of the class of each slot whose expert is to lie in few bits, and its number there."""
        classes = [(width.stem, numbers) for width, numbers in self.packed.items() if not width.whole]
        return {slot: (stem, number) for stem, numbers in classes for slot, number in numbers.items()}

    @cached_property
    def shared(self) -> bool:
        """Whether two slots have one row."""
        rows = [row for row in self.pool_rows if row >= 0]
        return len(set(rows)) < len(rows)

    @cached_property
    def plain(self) -> bool:
        """Whether each slot has a row of its own and nothing else."""
        return not self.shared and not self.kinds

    @cached_property
    def lenders(self) -> set[int]:
        """Decoder layers whose experts modules answer here."""
        found = (answer.lender() for answer in self.answers if answer is not None)
        return {layer for layer in found if layer is not None}

    @cached_property
    def by_kind(self) -> dict[type[Answer], dict[int, Any]]:
        """The answers of each kind by slot."""
        every = list(enumerate(self.answers))
        return {kind: {slot: each for slot, each in every if isinstance(each, kind)} for kind in ANSWERS.values()}

    def of(self, kind: type[A]) -> dict[int, A]:
        """Return the answers of a kind by slot."""
        return self.by_kind[kind]

    def numbered(self, slots: Iterable[int]) -> torch.Tensor:
        """Return a number for each slot: its place among some of them, -1 for the others, int32."""
        number = torch.full((len(self.answers),), -1, dtype=torch.int32)
        for place, slot in enumerate(slots):
            number[slot] = place
        return number

    def tensors(self, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the tensors that are stored beside the pool, those without numbers left out.

        Args:
            shape: the layer's experts.
        """
        every = {name: spec for kind in self.kinds for name, spec in kind.tensors(self, shape).items()}
        return {name: spec for name, spec in every.items() if all(spec.shape)}

    def nbytes(self, shape: ExpertShape, dtype: str) -> int:
        """Return the bytes of these tensors.

        Args:
            shape: the layer's experts.
            dtype: their safetensors dtype.
        """
        return sum(spec.nbytes(dtype) for spec in self.tensors(shape).values())

    @property
    def whole_experts(self) -> int:
        """Experts' worth of weights that are stored: the pool, and what answers have of their own."""
        return self.experts + sum(kind.whole_experts(self) for kind in self.kinds)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return what follows from the map and the running model needs as tensors, on the default device."""
        found = {"slot_map": torch.tensor(self.pool_rows, dtype=torch.int32)}
        if self.scales is not None:
            found["slot_scale"] = torch.tensor(self.scales)
        for kind in self.kinds:
            found |= kind.buffers(self)
        return found

    def to_json(self) -> dict:
        """Return the map as JSON values."""
        entry: dict[str, Any] = {"experts": self.experts, "rows": list(self.rows)}
        entry |= {} if self.scales is None else {"scales": list(self.scales)}
        return entry | write_groups({slot: answer for slot, answer in enumerate(self.answers) if answer})

    @classmethod
    def from_json(cls, entry: Any, where: str) -> SlotMap:
        """Read what `to_json` gave.

        Args:
            entry: JSON values.
            where: what they were read from.

        Raises:
            CheckpointError: the entry is no slot map: unknown keys, numbers out of range, slots without an answer.
        """

        def checked(kind: Any, name: str) -> Any:
            return read(kind, entry.get(name), f"{where}, {name}", error=CheckpointError, cure=CURE)

        read(dict[str, Any], entry, where, error=CheckpointError, cure=CURE)
        if unknown := set(entry) - {"experts", "rows", "scales", *ANSWERS}:
            raise CheckpointError(f"{where}: unknown keys {sorted(unknown)}, perhaps of another moetailor; {CURE}")
        experts = checked(Annotated[int, Within(1, MOST_SLOTS)], "experts")
        rows = checked(tuple[Annotated[int, Within(-1, experts - 1)], ...], "rows")
        scales = checked(tuple[float, ...] | None, "scales")
        if not rows or (scales is not None and len(scales) != len(rows)):
            raise CheckpointError(f"{where}: {len(rows)} rows and {len(scales or ())} scales; {CURE}")
        found = read_groups(entry, len(rows), where, error=CheckpointError, cure=CURE)
        for slot, row in enumerate(rows):
            needs_row = slot not in found or found[slot].expert(slot) is not None
            if needs_row != (row >= 0):
                said = found[slot].label if slot in found else "nothing else"
                raise CheckpointError(f"{where}: slot {slot} has row {row} of the pool and {said}; {CURE}")
        made = cls(experts=experts, rows=rows, answers=tuple(map(found.get, range(len(rows)))), scales=scales)
        packed = {slot: answer.width for slot, answer in made.of(Packed).items()}
        widths = {rows[slot]: width for slot, width in packed.items()}
        if odd := [slot for slot, row in enumerate(rows) if row in widths and packed.get(slot) != widths[row]]:
            raise CheckpointError(f"{where}: slot {odd[0]} has row {rows[odd[0]]} in another width than others; {CURE}")
        return made
