"""The slot map of a layer, as config.json has it: which row of the pool, or what else, stands behind each router slot.

The format is described in docs/formats.md of moetailor. Nothing here needs vLLM or moetailor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Constant:
    """A vector."""


@dataclass(frozen=True)
class Linear:
    """A constant and a linear map; its input factor is `shared` by all maps of the layer, its factors lie in `int8`."""

    rank: int
    shared: bool = False
    int8: bool = False


@dataclass(frozen=True)
class LowRank:
    """An expert of rank `rank` over the base that is named after slot `base`."""

    base: int
    rank: int = 0


@dataclass(frozen=True)
class Packed:
    """An expert in few bits, see `stored.Width`; experts alike in all four are a class."""

    bits: int
    down: int = 0
    group: int = 128
    codes: str = "uint"


Answer = Constant | Linear | LowRank | Packed
KINDS: dict[str, type[Answer]] = {"constant": Constant, "linear": Linear, "low_rank": LowRank, "packed": Packed}
REFUSED = {
    "borrowed": "experts of other layers",
    "auxiliary": "auxiliary slots (compressed_experts)",
    "narrow": "narrow experts (camera), which --format narrow writes as an ordinary checkpoint",
}


@dataclass(frozen=True)
class Slots:
    """The slot map of a layer.

    Attributes:
        experts: rows of the pool, those in few bits included.
        rows: row of the pool of each slot, -1 for slots that have none.
        answers: what else stands behind a slot, by slot.
        scales: factor on the gate of each slot; None when all are 1.
    """

    experts: int
    rows: tuple[int, ...]
    answers: Mapping[int, Answer]
    scales: tuple[float, ...] | None = None

    @classmethod
    def read(cls, entry: Mapping[str, Any], where: str) -> Slots:
        """Read an entry of config.json.

        Args:
            entry: its JSON values.
            where: the layer, for messages.

        Raises:
            NotImplementedError: it asks for what is not served.
            ValueError: it is no slot map.
        """
        if named := [words for key, words in REFUSED.items() if key in entry]:
            raise NotImplementedError(f"{where}: moetailor-vllm does not serve {' or '.join(named)}; use transformers")
        if unknown := sorted(set(entry) - {"experts", "rows", "scales", *KINDS}):
            raise ValueError(f"{where}: unknown keys {unknown}; a newer moetailor-vllm may know them")
        answers: dict[int, Answer] = {}
        for key, kind in KINDS.items():
            for group in entry.get(key, ()):
                fields = {"slots": [group]} if isinstance(group, int) else dict(group)
                for slot in fields.pop("slots"):
                    answers[slot] = kind(**fields)
        rows, scales = tuple(entry["rows"]), entry.get("scales")
        for slot, row in enumerate(rows):
            if (row >= 0) != (slot not in answers or isinstance(answers[slot], Packed)) or row >= entry["experts"]:
                raise ValueError(f"{where}: slot {slot} has row {row} of {entry['experts']} and {answers.get(slot)}")
        return cls(entry["experts"], rows, dict(sorted(answers.items())), tuple(scales) if scales else None)

    def of(self, kind: type[Answer]) -> dict[int, Any]:
        """Return the answers of a kind by slot."""
        return {slot: answer for slot, answer in self.answers.items() if isinstance(answer, kind)}

    @cached_property
    def pool(self) -> tuple[int, ...]:
        """The rows of the pool that lie as the family's own weights."""
        packed = {self.rows[slot] for slot in self.of(Packed)}
        return tuple(row for row in range(self.experts) if row not in packed)

    @cached_property
    def pool_rows(self) -> list[int]:
        """The place among these of each slot whose row is all, -1 for others."""
        place = {row: number for number, row in enumerate(self.pool)}
        return [-1 if slot in self.answers else place[row] for slot, row in enumerate(self.rows)]

    @cached_property
    def classes(self) -> dict[Packed, dict[int, int]]:
        """The widths of experts in few bits, each with the number of the expert behind every slot of it."""
        found = {}
        for width in dict.fromkeys(self.of(Packed).values()):
            behind = [slot for slot, answer in self.of(Packed).items() if answer == width]
            pool = sorted({self.rows[slot] for slot in behind})
            found[width] = {slot: pool.index(self.rows[slot]) for slot in behind}
        return found

    def numbered(self, number: Mapping[int, int]) -> list[int]:
        """Return a number for each slot, -1 where there is none."""
        return [number.get(slot, -1) for slot in range(len(self.rows))]
