"""Buddies: for each expert the others that may answer for it, as engines want to know them that hold few experts.

BuddyMoE (arXiv:2511.10054) lets a resident expert answer where the chosen one is not in memory yet, and picks it by how
often both run on the same tokens. Here they are ranked by what is lost when one answers for the other; how often they
run together is said beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# How many are named for each expert.
MOST = 8


@dataclass(frozen=True, kw_only=True)
class Buddy:
    """An expert that may answer for another one.

    Attributes:
        expert: which.
        factor: on its output, the best one.
        distance: the share of the other's energy that is lost then, from 0 to 1.
        together: the share of the other's tokens that this one runs on too.
    """

    expert: int
    factor: float
    distance: float
    together: float


def buddies(distance_EE: torch.Tensor, factor_EE: torch.Tensor, together_EE: torch.Tensor) -> list[tuple[Buddy, ...]]:
    """Return for each expert of a layer those that give anything of it, nearest first.

    Args:
        distance_EE: what is lost of an expert (row) when another one answers, float64 [E, E].
        factor_EE: the factors with which it does.
        together_EE: the share of an expert's tokens that the other runs on too.
    """
    found = []
    for expert, row in enumerate(distance_EE.tolist()):
        ranked = [other for other in sorted(range(len(row)), key=row.__getitem__) if other != expert and row[other] < 1]
        found.append(
            tuple(
                Buddy(
                    expert=other,
                    factor=float(factor_EE[expert, other]),
                    distance=row[other],
                    together=float(together_EE[expert, other]),
                )
                for other in ranked[:MOST]
            )
        )
    return found
