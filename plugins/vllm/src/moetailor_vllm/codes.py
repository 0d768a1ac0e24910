"""What rows of codes stand for, as loops take it. Shapes: R parts of a code, see `lookups.PARTS`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from moetailor_vllm.lookups import PARTS, nbytes, tables, values_of

# What a byte stands for moves as so many elements of one of these types, by its numbers.
ELEMENTS = {1: (np.float32, 1), 2: (np.int64, 1), 4: (np.complex128, 1), 8: (np.complex128, 2)}


@dataclass(frozen=True)
class Codes:
    """What codes stand for.

    Attributes:
        starts: where the bytes of each part start in a row, int64 [R + 1].
        widths: bits of each part of codes that are numbers, int64 [R]; none where bytes are looked up.
        less: what is taken from these numbers.
        table: what a byte stands for, in `elements` elements for each.
        elements: see `ELEMENTS`; 0 where codes are numbers.
        book: the two weights that such a number is the row of, float32 [rows, 2]; no rows where it is the weight.
    """

    starts: np.ndarray
    widths: np.ndarray
    less: np.float32
    table: np.ndarray
    elements: int
    book: np.ndarray

    @classmethod
    @cache
    def of(cls, codes: str, bits: int, count: int) -> Codes:
        """Return it for rows of codes, as `cut` leaves them.

        Args:
            codes: their name.
            bits: of a weight.
            count: codes of a row.
        """
        with torch.device("cpu"):
            values_CV = values_of(codes, bits)
            bits *= values_CV.shape[1]
            integers, many = codes in ("uint", "int"), len(PARTS[bits]) > 1
            told, element, elements = np.zeros(0, np.float32), np.float32, 0
            if not integers and not many:
                (table,) = tables(values_CV, torch.float32)
                element, elements = ELEMENTS[table.shape[1]]
                told = table.flatten().numpy()
        counted = integers or many
        return cls(
            starts=np.cumsum([0, *nbytes(bits, count)]),
            widths=np.array(PARTS[bits] if counted else (), np.int64),
            # Integers of 8 bits have a zero point for it.
            less=np.float32(2 ** (bits - 1) if codes == "int" and bits < 8 else 0),
            table=told.view(element),
            elements=elements,
            book=values_CV.float().contiguous().numpy() if many and not integers else np.zeros((0, 2), np.float32),
        )

    @property
    def parts(self) -> tuple[Any, ...]:
        """What the loops take."""
        return self.starts, self.widths, self.less, self.table, self.elements, self.book
