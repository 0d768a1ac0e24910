"""One choice for each expert of some layers, at the least total error within a budget of bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from moetailor.errors import PlanError

GAP, SECONDS, TIE = 1e-3, 120.0, 1e-7


@dataclass(frozen=True, kw_only=True)
class Menu:
    """What the experts of one layer may become.

    Attributes:
        errors: what each entry costs in error, [E, entries]; an expert that stays whole has none.
        price: bytes of each entry.
        expert_nbytes: bytes of an expert.
        must_keep: experts that stay whole; at least one always does.
        requires: the expert of the same layer that must stay whole for an entry, -1 for entries that require none,
            [E, entries]; None when none does.
    """

    errors: torch.Tensor
    price: Sequence[int]
    expert_nbytes: int
    must_keep: Collection[int] = ()
    requires: torch.Tensor | None = None


def cheapest(menus: Sequence[Menu], nbytes: int) -> list[list[int]]:
    """Return for each layer which entry each expert takes, or the number of entries where it stays whole.

    A mixed-integer program (scipy's HiGHS), solved to within 0.1% of the best or as far as two minutes go: one choice
    an expert, one budget, at least one expert of each layer whole, and those that other experts' entries need.

    Args:
        menus: the layers; an entry with an infinite error is never chosen.
        nbytes: bytes that all may take; enough for the cheapest entry everywhere and the experts that stay.

    Raises:
        PlanError: the solver found none, in time or at all.
    """
    cost = np.concatenate([np.pad(menu.errors.double().numpy(), ((0, 0), (0, 1))).ravel() for menu in menus])
    nbytes_of = np.concatenate(
        [np.tile(np.append(np.array(menu.price), menu.expert_nbytes), len(menu.errors)) for menu in menus]
    )
    unit = max(menu.expert_nbytes for menu in menus)
    priced = np.isfinite(cost)
    cost = np.where(priced, cost, 0)
    required = block_diag([_requirements(menu) for menu in menus], "csr")
    once = [csr_array(np.ones((1, len(menu.price) + 1))) for menu in menus for _ in menu.errors]
    whole = [csr_array(_whole(menu, range(len(menu.errors)))) for menu in menus]
    found = milp(
        # Of answers that lose the same, as for experts that no token reached, the smaller one.
        cost / max(float(cost.max()), 1e-300) + TIE * nbytes_of / unit,
        constraints=[
            LinearConstraint(block_diag(once, format="csr"), 1, 1),
            LinearConstraint(csr_array(nbytes_of[None] / unit), -np.inf, nbytes / unit),
            LinearConstraint(block_diag(whole, "csr"), 1, np.inf),
            *([LinearConstraint(required, -np.inf, 0)] if any(menu.requires is not None for menu in menus) else []),
        ],
        integrality=np.ones(cost.size),
        bounds=Bounds(np.concatenate([_whole(menu, menu.must_keep)[0] for menu in menus]), priced),  # type: ignore[arg-type]
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        raise PlanError(f"no choice of answers was found for {nbytes:,} bytes ({found.message}); give more bytes")
    chosen, start = [], 0
    for menu in menus:
        rows, columns = len(menu.errors), len(menu.price) + 1
        chosen.append(found.x[start : start + rows * columns].reshape(rows, columns).argmax(1).tolist())
        start += rows * columns
    return chosen


def _requirements(menu: Menu) -> csr_array:
    """Return a row for each entry that requires another expert: chosen at most as often as that one stays whole."""
    width = len(menu.price) + 1
    requires = torch.full_like(menu.errors, -1) if menu.requires is None else menu.requires
    expert, entry = (requires >= 0).nonzero().numpy().T
    other = requires[expert, entry].long().numpy()
    rows = np.arange(len(expert))
    places = np.concatenate([expert * width + entry, other * width + width - 1])
    signs = np.concatenate([np.ones(len(rows)), -np.ones(len(rows))])
    return csr_array((signs, (np.tile(rows, 2), places)), shape=(len(rows), len(menu.errors) * width))


def _whole(menu: Menu, experts: Collection[int]) -> np.ndarray:
    """Return a row with ones where some experts of a layer stay whole, [1, E (entries + 1)]."""
    row = np.zeros((len(menu.errors), len(menu.price) + 1))
    row[list(experts), -1] = 1
    return row.reshape(1, -1)
