"""Which tokens of a text are kept whole: the same ones in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.statistics import sample_keys
from moetailor.errors import CalibrationError

# For each batch, the keys of its sampled tokens and their places in the flattened batch.
Sampled = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which tokens are kept whole: the `tokens` smallest hashes of (document, position) under `seed`."""

    tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or not -(2**63) <= self.seed < 2**63:
            raise CalibrationError(
                f"{self.tokens} sampled tokens, seed {self.seed}: sample 1 or more, with 64 bits of seed"
            )


def sampled_positions(batches: Sequence[Batch], sample: SampleOptions) -> Sampled:
    """Return which tokens are sampled.

    Raises:
        CalibrationError: no token counts.
    """
    keys = [sample_keys(batch.document, batch.position, sample.seed).reshape(-1) for batch in batches]
    counted = [batch.counted.reshape(-1) for batch in batches]
    every = torch.cat([key[mask] for key, mask in zip(keys, counted, strict=True)])
    if len(every) == 0:
        raise CalibrationError("no token counts: the text is all special tokens or padding")
    # Ties at the limit are cut by place in the text, as a stable sort does.
    order = torch.argsort(every, stable=True)[: sample.tokens]
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[order] = True
    sampled = []
    for key, mask in zip(keys, counted, strict=True):
        here, chosen = chosen[: int(mask.sum())], chosen[int(mask.sum()) :]
        position = mask.nonzero().flatten()[here]
        sampled.append((key[position], position))
    return sampled
