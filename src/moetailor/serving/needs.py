"""What a served model holds in memory beside its weights: the keys and values of the tokens that it has read.

Each family has its own cache. What it takes is asked of the family's own code, which runs without numbers on a few
tokens: some layers keep as much of each token, others of no more tokens than they look back, others a state of one
size. Where keys and values are made of fewer numbers (MLA, arXiv:2405.04434, section 2.1), it is these that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.fx.experimental import _config

from moetailor.calibration.capture import replaced_forward
from moetailor.checkpoint.original import Original

# Bytes of a number in the cache, bfloat16.
CACHED = 2


def cache_nbytes(original: Original, context: int) -> int:
    """Return the bytes of the cache of one sequence, over all layers.

    Args:
        original: the model.
        context: tokens of the sequence.
    """
    total = 0
    for one, two in zip(_caches(original, 1), _caches(original, 2), strict=True):
        kept, of_token = _numbers(vars(one)), _numbers(vars(two)) - _numbers(vars(one))
        window = getattr(two, "sliding_window", None)
        total += kept + of_token * (min(context, window or context) - 1)
    return CACHED * total


def _caches(original: Original, tokens: int) -> list[Any]:
    """Return the cache of each layer that has one after some tokens, without numbers."""
    model = original.skeleton.model
    with ExitStack() as replaced, torch.no_grad():
        # Some look up which words are special: whichever they are, the cache is as large.
        settings: Any = _config
        replaced.enter_context(settings.patch(meta_nonzero_assume_all_nonzero=True))
        for layer in original.anatomy.layers.values():  # which experts run would depend on numbers
            experts = model.get_submodule(layer.experts)
            replaced.enter_context(replaced_forward(experts, lambda hidden, *args, **kwargs: torch.empty_like(hidden)))
        words = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        return list(model(input_ids=words, use_cache=True, logits_to_keep=1).past_key_values.layers)


def _numbers(kept: Any) -> int:
    """Return how many numbers lie in tensors, wherever these are kept."""
    return sum(tensor.numel() for tensor in _tensors(kept) if tensor.is_floating_point())


def _tensors(kept: Any) -> Iterator[torch.Tensor]:
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, dict | list | tuple):
        for part in kept.values() if isinstance(kept, dict) else kept:
            yield from _tensors(part)
