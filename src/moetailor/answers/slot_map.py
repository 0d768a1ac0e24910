"""How the slots of one compressed layer find rows of the pool and other answers: what config.json holds of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from moetailor.answers.answer import ANSWERS, Answer
from moetailor.answers.fields import group, grouped_answers, ungrouped
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What the running model needs of one layer, as it stands in config.json.

    Attributes:
        experts: rows of the pool.
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
    def pool_rows(self) -> tuple[int, ...]:
        """The row of each slot whose row is all, -1 for the others."""
        return tuple(row if answer is None else -1 for row, answer in zip(self.rows, self.answers, strict=True))

    @cached_property
    def shared(self) -> bool:
        """Whether two slots have one row."""
        rows = [row for row in self.pool_rows if row >= 0]
        return len(set(rows)) < len(rows)

    @cached_property
    def plain(self) -> bool:
        """Whether each slot has a row of its own and nothing else."""
        return not self.shared and not self.kinds

    def of(self, kind: type[Answer]) -> list[int]:
        """Return the slots behind which answers of a kind stand."""
        return [slot for slot, answer in enumerate(self.answers) if isinstance(answer, kind)]

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
        """Return what follows from the map and the running model needs as tensors."""
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
        return entry | grouped_answers({slot: answer for slot, answer in enumerate(self.answers) if answer})

    @classmethod
    def from_json(cls, entry: Any, where: str) -> SlotMap:
        """Read what `to_json` gave.

        Raises:
            CheckpointError: the entry is no slot map: unknown keys, numbers out of range, slots without an answer.
        """

        def refuse(what: str) -> CheckpointError:
            return CheckpointError(f"{where}: {what}; the checkpoint is damaged or of a later moetailor")

        if not isinstance(entry, Mapping):
            raise refuse("not a JSON object")
        experts, rows, scales = (entry.get(name) for name in ("experts", "rows", "scales"))
        if unknown := set(entry) - {"experts", "rows", "scales", *ANSWERS}:
            raise refuse(f"unknown keys {sorted(unknown)}")
        if type(experts) is not int or experts < 1:
            raise refuse(f"experts is {experts!r}, not a positive whole number")
        if not isinstance(rows, list) or not rows or not all(type(row) is int and -1 <= row < experts for row in rows):
            raise refuse(f"rows are not whole numbers from -1 to {experts - 1}")
        if scales is not None and not group.are_numbers(scales, len(rows)):
            raise refuse(f"scales are not {len(rows)} finite numbers")
        try:
            found = ungrouped(entry, len(rows), where)
        except ValueError as error:
            raise refuse(str(error)) from None
        if lost := [slot for slot, row in enumerate(rows) if row < 0 and slot not in found]:
            raise refuse(f"slots {lost[:8]} have neither a row nor another answer")
        answers = tuple(found.get(slot) for slot in range(len(rows)))
        for slot, answer in found.items():
            if (answer.expert(slot) is None) != (rows[slot] < 0):
                raise refuse(f"slot {slot} has row {rows[slot]} and the answer {answer.label!r}")
        return cls(experts=experts, rows=tuple(rows), answers=answers, scales=None if scales is None else tuple(scales))
