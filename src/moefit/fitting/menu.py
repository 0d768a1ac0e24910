"""One choice for each expert, at the least total error within a budget of bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

GAP = 1e-3


def cheapest(
    errors: torch.Tensor, price: Sequence[int], whole: int, nbytes: int, kept: Collection[int] = ()
) -> list[int]:
    """Return which entry of the menu each expert takes, or the number of entries where it stays whole.

    A mixed-integer program (scipy's HiGHS), solved to within 0.1% of the best: one choice an expert, one budget, at
    least one expert whole.

    Args:
        errors: what each entry costs in error, [E, entries]; an expert that stays whole has none.
        price: bytes of each entry.
        whole: bytes of an expert.
        nbytes: bytes that all may take; enough for the cheapest entry everywhere and one expert.
        kept: experts that stay whole.
    """
    experts, entries = errors.shape
    cost = np.concatenate([errors.numpy(), np.zeros((experts, 1))], axis=1)
    stays = np.zeros((experts, entries + 1))
    stays[:, entries] = 1
    least = np.zeros_like(stays)
    least[list(kept), entries] = 1
    taken = np.tile(np.append(np.array(price), whole), (experts, 1))
    found = milp(
        cost.ravel() / max(float(cost.max()), 1e-300),
        constraints=[
            LinearConstraint(np.kron(np.eye(experts), np.ones(entries + 1)), 1, 1),
            LinearConstraint(taken.ravel()[None] / whole, -np.inf, nbytes / whole),
            LinearConstraint(stays.ravel()[None], 1, np.inf),
        ],
        integrality=np.ones(cost.size),
        bounds=Bounds(least.ravel(), np.ones(cost.size)),  # type: ignore[arg-type]
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message
    return [int(row.argmax()) for row in found.x.reshape(experts, entries + 1)]
