"""Tokens that choose and are not fitted."""

from __future__ import annotations

import torch

EVERY, FOLDS = 8, 4


def held_out(token: torch.Tensor) -> torch.Tensor:
    """Return which tokens are held out, one in eight, bool [T].

    Args:
        token: places in the sample, [T]. Samples lie in the order of the hashes of their tokens, so that these are no
            others in kind than the rest.
    """
    return token % EVERY == EVERY - 1


def held_out_masks(token: torch.Tensor, few: int) -> list[torch.Tensor]:
    """Return masks of tokens, each of tokens that judge what was fitted to the others, bool [T].

    One mask with an eighth of the tokens; where they are few, four masks that hold out every token once.

    Args:
        token: places in the sample, [T].
        few: below so many tokens an eighth is too few.
    """
    if len(token) < few:
        return [torch.arange(len(token)) % FOLDS == fold for fold in range(FOLDS)]
    return [held_out(token)]
