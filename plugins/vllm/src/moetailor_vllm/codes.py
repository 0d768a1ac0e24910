"""What rows of codes stand for, as loops take it. Shapes: R parts of a code, see `lookups.PARTS`."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from moetailor_vllm.lookups import FLOATS, PARTS, nbytes, tables, values_of

# What a byte stands for moves as so many elements of one of these types, by its numbers.
ELEMENTS = {1: (np.float32, 1), 2: (np.int64, 1), 4: (np.complex128, 1), 8: (np.complex128, 2)}


# Nothing to take away, no elements of a table, and no rows of a book.
NOTHING, NO_TABLE, NO_BOOK = np.float32(0), np.zeros(0, np.float32), np.zeros((0, 2), np.float32)


class Codes(NamedTuple):
    """What codes stand for: for numbers, for what a table says of bytes, or for two weights in a row of a book.

    Attributes:
        starts: where the bytes of each part start in a row, int64 [R + 1].
        widths: bits of each part of codes that are numbers, int64 [R]; none where bytes are looked up.
        less: what is taken from these numbers.
        table: what a byte stands for, in `elements` elements for each.
        elements: see `ELEMENTS`; 0 where codes are numbers of their own or rows of a book, -1 for floats of 8 bits.
        book: the two weights that such a number is the row of, float32 [rows, 2]; no rows where it is the weight.
    """

    starts: np.ndarray
    widths: np.ndarray
    less: np.float32 = NOTHING
    table: np.ndarray = NO_TABLE
    elements: int = 0
    book: np.ndarray = NO_BOOK

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
            values_CV = values_of(codes, bits).float()
        code = bits * values_CV.shape[1]
        starts, widths = np.cumsum([0, *nbytes(code, count)]), np.array(PARTS[code], np.int64)
        if codes in ("uint", "int"):
            # Those of 8 bits have a zero point for it.
            less = np.float32(2 ** (bits - 1) if codes == "int" and bits < 8 else 0)
            return cls(starts=starts, widths=widths, less=less)
        if len(widths) > 1:
            return cls(starts=starts, widths=widths, book=values_CV.contiguous().numpy())
        if codes in FLOATS and bits == 8:
            return cls(starts=starts, widths=widths[:0], table=NO_TABLE.view(np.uint32), elements=-1)
        (table,) = tables(values_CV, torch.float32)
        element, elements = ELEMENTS[table.shape[1]]
        told = table.flatten().numpy().view(element)
        return cls(starts=starts, widths=widths[:0], table=told, elements=elements)
