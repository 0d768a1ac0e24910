"""One entry for each item of some groups, at the least total error within a budget of bytes.

With a price r of a byte each item takes the entry with the least error + r bytes by itself, so all that is searched is
the price at which they fit; what bytes are left then go where they save most. Nothing is far from the best: of all
items one at most would be cut in the solution of the problem in which entries may be mixed.

Shapes: n items, m entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetailor.errors import TooSmallError

STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The entries of a group of items that share them.

    Attributes:
        errors: what each entry costs in error, float64 [n, m]; infinite for those that an item cannot take.
        nbytes: bytes of each entry, int64 [m].
        stays: entries that one item of the group, at least, has to take, bool [m].
    """

    errors: torch.Tensor
    nbytes: torch.Tensor
    stays: torch.Tensor

    def taken(self, rate: float) -> torch.Tensor:
        """Return the entry of each item when a byte costs `rate`, [n]."""
        cost = self.errors + rate * self.nbytes
        best, entry = cost.min(1)
        if not bool(self.stays[entry].any()):
            more = cost.where(self.stays, torch.inf) - best[:, None]
            item, other = divmod(int(more.argmin()), more.shape[1])
            entry[item] = other
        return entry

    def bytes_of(self, entry: torch.Tensor) -> int:
        """Return the bytes of some entries."""
        return int(self.nbytes[entry].sum())

    def best_swap(self, entry: torch.Tensor, left: int) -> tuple[float, int, int]:
        """Return the error that is saved for a byte, the item and its entry, of the best one that fits."""
        more = self.nbytes - self.nbytes[entry][:, None]
        saved = self.errors.gather(1, entry[:, None]) - self.errors
        # The last item that stays must go on to do so.
        allowed = self.stays | ~self.stays[entry][:, None] | (int(self.stays[entry].sum()) > 1)
        worth = (saved / more).where((more > 0) & (more <= left) & (saved > 0) & allowed, 0.0)
        item, other = divmod(int(worth.argmax()), worth.shape[1])
        return float(worth[item, other]), item, other


def cheapest(shelves: Sequence[Shelf], nbytes: int) -> list[list[int]]:
    """Return the entry of each item of each group.

    Args:
        shelves: the groups.
        nbytes: bytes that all may take.

    Raises:
        TooSmallError: the smallest entries take more.
    """
    small, large = 1e-40, 1e20
    found = [shelf.taken(large) for shelf in shelves]
    least = _total(shelves, found)
    if least > nbytes:
        raise TooSmallError(f"experts and stand-ins get {nbytes:,} bytes, the fewest that work take {least:,}", least)
    for _ in range(STEPS):
        rate = (small * large) ** 0.5
        tried = [shelf.taken(rate) for shelf in shelves]
        if _total(shelves, tried) <= nbytes:
            large, found = rate, tried
        else:
            small = rate
    left = nbytes - _total(shelves, found)
    while shelves:
        worth, item, entry, at = max(
            (*shelf.best_swap(taken, left), at) for at, (shelf, taken) in enumerate(zip(shelves, found, strict=True))
        )
        if worth <= 0:
            break
        left -= int(shelves[at].nbytes[entry] - shelves[at].nbytes[found[at][item]])
        found[at][item] = entry
    return [taken.tolist() for taken in found]


def _total(shelves: Sequence[Shelf], taken: Sequence[torch.Tensor]) -> int:
    return sum(shelf.bytes_of(entry) for shelf, entry in zip(shelves, taken, strict=True))
