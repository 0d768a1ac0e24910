"""Codes in words of 32 bits, turned into what a table says of them: several codes with one look-up.

Shapes: K rows of a table, V numbers of a row, W words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

# What a look-up gives moves as one element, of at most 16 bytes: by the float32 numbers in it.
ELEMENTS = {2: torch.int64, 4: torch.complex128}
# Bits of what is looked up at once where codes lie across bytes: the table should stay in caches.
MOST_BITS = 14

# By a name and a device: a plain dictionary, which graphs can be traced through.
LOOKUPS: dict[str, Lookup] = {}


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What codes stand for, by several codes next to each other.

    Attributes:
        bits: of a code.
        codes: that are looked up at once.
        table: float32 [2^(bits codes), codes V], the first code in the lowest bits.
        told: how loops tell codes without the table: ``integers`` less half of all, or ``float8``, e4m3.
    """

    bits: int
    codes: int
    table: torch.Tensor
    told: Literal["", "integers", "float8"] = ""

    @classmethod
    def of(cls, table_KV: torch.Tensor, bits: int) -> Lookup:
        """Return it for the table of one code, float32."""
        codes, table = 8 // bits, table_KV
        if 8 % bits:
            codes = min(4 // table_KV.shape[1], MOST_BITS // bits)
            codes = 1 << codes.bit_length() - 1  # as many as divide eight
        for _ in range(codes - 1):
            table = torch.cat([table.repeat(len(table_KV), 1), table_KV.repeat_interleave(len(table), 0)], 1)
        return cls(bits=bits, codes=codes, table=table)

    @classmethod
    def of_integers(cls, bits: int, device: torch.device) -> Lookup:
        """Return it for integers that are stored with half of all added."""
        half = 2 ** (bits - 1)
        return replace(cls.of(torch.arange(-half, half, device=device).float()[:, None], bits), told="integers")

    def numbers(self, words: torch.Tensor, count: int) -> torch.Tensor:
        """Return what rows of codes stand for, float32 [..., count].

        Args:
            words: int32 [..., W], the first code in the lowest bits.
            count: numbers of a row.
        """
        found, each = self._rows(words, count).flatten(), self.table.shape[1]
        if each in ELEMENTS:
            found = self.table.view(ELEMENTS[each]).flatten().index_select(0, found).view(torch.float32)
        else:
            found = self.table.index_select(0, found)
        return found.view(*words.shape[:-1], -1)[..., :count]

    def _rows(self, words: torch.Tensor, count: int) -> torch.Tensor:
        """Return the rows of the table that stand for at least so many numbers, [..., rows]."""
        octets = octets_of(words)
        if 8 % self.bits == 0:
            return octets.int()
        # Eight codes lie in as many bytes as a code has bits: put into eight bytes, they are one number.
        eights = -(-count * self.codes // (8 * self.table.shape[1]))
        octets = longer(octets, eights * self.bits - octets.shape[-1]).unflatten(-1, (eights, self.bits))
        eight = longer(octets, 8 - self.bits).flatten().view(torch.int64).view(*words.shape[:-1], eights, 1)
        step = self.bits * self.codes
        steps = torch.arange(0, 8 * self.bits, step, device=words.device)
        return (eight >> steps).bitwise_and_((1 << step) - 1)


def lookup(name: str, device: torch.device, make: Callable[[torch.device], Lookup]) -> Lookup:
    """Return the look-up of a name on a device, made where it is asked for the first time."""
    key = f"{name} {device}"
    if key not in LOOKUPS:
        LOOKUPS[key] = make(device)
    return LOOKUPS[key]


def octets_of(words: torch.Tensor) -> torch.Tensor:
    """Return the bytes of rows, uint8 [..., B]."""
    # Flat, as axes of length one may have strides with which bytes cannot be viewed as others.
    return words.contiguous().flatten().view(torch.uint8).view(*words.shape[:-1], -1)


def longer(each: torch.Tensor, more: int) -> torch.Tensor:
    """Return rows with so many zeros more, or numbers less; no copy where there is nothing to do."""
    return F.pad(each, (0, more)) if more else each
