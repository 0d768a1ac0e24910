"""Tokens a second of prefill and decode, and bytes in memory, of one model at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moetailor.checkpoint.devices import finish


@dataclass(frozen=True)
class Speed:
    """Tokens a second: in the fastest of a few repeats and in the slowest, which differ where a machine has other work.

    Attributes:
        prefill: tokens of the prompt, one forward pass.
        decode: new tokens, one at a time with a cache.
        prefill_low: the former in the slowest.
        decode_low: the latter in the slowest.
    """

    prefill: float
    decode: float
    prefill_low: float
    decode_low: float


@torch.no_grad()
def measure_speed(model: Any, input_ids: torch.Tensor, *, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Measure a model a few times, after one warm-up.

    Args:
        model: a causal language model.
        input_ids: prompts, [B, L]; prefill runs all of it, decode starts from its first half.
        new_tokens: tokens to decode.
        repeats: how often to measure.
    """
    device = model.get_input_embeddings().weight.device
    input_ids = input_ids.to(device)
    prompt = input_ids[:, : max(input_ids.shape[1] // 2, 1)]

    def prefill() -> float:
        return _seconds(lambda: model(input_ids=input_ids, use_cache=False), device)

    def decode() -> float:
        out = model(input_ids=prompt, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        def steps() -> None:
            nonlocal cache, token
            for _ in range(new_tokens):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return _seconds(steps, device)

    prefill()
    first = sorted(input_ids.numel() / prefill() for _ in range(repeats))
    then = sorted(new_tokens * len(input_ids) / decode() for _ in range(repeats))
    return Speed(prefill=first[-1], decode=then[-1], prefill_low=first[0], decode_low=then[0])


def resident_nbytes(model: Any) -> int:
    """Return the bytes of a model's weights in memory; what is shared counts once."""
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(weights.values())


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    finish(device)
    began = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - began
