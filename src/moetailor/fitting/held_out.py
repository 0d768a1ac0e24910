"""Tokens that choose and are not fitted."""

from __future__ import annotations

import torch

EVERY, FOLDS = 8, 4


def choosing(token: torch.Tensor, few: int) -> list[torch.Tensor]:
    """Return masks of tokens, each to choose among what is fitted without it: one eighth, or with few tokens four folds
    that hold out every token once.

    Args:
        token: places in the sample, [T]; it lies in the order of its hashes, so any share of it is as good as another.
        few: below so many tokens an eighth is too few.
    """
    if len(token) < few:
        return [torch.arange(len(token)) % FOLDS == fold for fold in range(FOLDS)]
    return [token % EVERY == EVERY - 1]
