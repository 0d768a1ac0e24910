"""One choice for each expert of some layers, at the least total error within a budget of bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

GAP, SECONDS, TIE = 1e-3, 120.0, 1e-7


@dataclass(frozen=True, kw_only=True)
class Menu:
    """What the experts of one layer may become.

    Attributes:
        errors: what each entry costs in error, [E, entries]; an expert that stays whole has none.
        price: bytes of each entry.
        whole: bytes of an expert.
        kept: experts that stay whole; at least one always does.
    """

    errors: torch.Tensor
    price: Sequence[int]
    whole: int
    kept: Collection[int] = ()


def cheapest(menus: Sequence[Menu], nbytes: int) -> list[list[int]]:
    """Return for each layer which entry each expert takes, or the number of entries where it stays whole.

    A mixed-integer program (scipy's HiGHS), solved to within 0.1% of the best or as far as two minutes go: one choice
    an expert, one budget, at least one expert of each layer whole.

    Args:
        menus: the layers.
        nbytes: bytes that all may take; enough for the cheapest entry everywhere and the experts that stay.
    """
    cost = np.concatenate([np.pad(menu.errors.double().numpy(), ((0, 0), (0, 1))).ravel() for menu in menus])
    taken = np.concatenate([np.tile(np.append(np.array(menu.price), menu.whole), len(menu.errors)) for menu in menus])
    unit = max(menu.whole for menu in menus)
    once = [np.ones((1, len(menu.price) + 1)) for menu in menus for _ in menu.errors]
    found = milp(
        # Of answers that lose the same, as for experts that no token reached, the smaller one.
        cost / max(float(cost.max()), 1e-300) + TIE * taken / unit,
        constraints=[
            LinearConstraint(block_diag(once, format="csr"), 1, 1),
            LinearConstraint(csr_array(taken[None] / unit), -np.inf, nbytes / unit),
            LinearConstraint(block_diag([_whole(menu, range(len(menu.errors))) for menu in menus], "csr"), 1, np.inf),
        ],
        integrality=np.ones(cost.size),
        bounds=Bounds(np.concatenate([_whole(menu, menu.kept)[0] for menu in menus]), np.ones(cost.size)),  # type: ignore[arg-type]
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    assert found.x is not None, found.message
    chosen, start = [], 0
    for menu in menus:
        rows, columns = len(menu.errors), len(menu.price) + 1
        chosen.append(found.x[start : start + rows * columns].reshape(rows, columns).argmax(1).tolist())
        start += rows * columns
    return chosen


def _whole(menu: Menu, experts: Collection[int]) -> np.ndarray:
    """Return a row with ones where some experts of a layer stay whole, [1, E (entries + 1)]."""
    row = np.zeros((len(menu.errors), len(menu.price) + 1))
    row[list(experts), -1] = 1
    return row.reshape(1, -1)
