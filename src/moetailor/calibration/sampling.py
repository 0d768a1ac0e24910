"""Which tokens of a text are kept whole: the same ones in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.statistics import sample_keys
from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import CalibrationError

# The fewest that are sampled where there is room, and what experts need for each dimension.
USUAL, PER_DIMENSION = 16384, 2

# For each batch, the keys of its sampled tokens and their places in the flattened batch.
Sampled = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which tokens are kept whole: the `tokens` smallest hashes of (document, position) under `seed`.

    Attributes:
        tokens: how many; as many as the model's experts need when None, see `of_model`.
        seed: another one samples others.
        nbytes: what the samples of all layers may take then.
    """

    tokens: int | None = None
    seed: int = 0
    nbytes: int = 8 * 10**9

    def __post_init__(self) -> None:
        if (self.tokens is not None and self.tokens < 1) or not -(2**63) <= self.seed < 2**63:
            raise CalibrationError(
                f"{self.tokens} sampled tokens, seed {self.seed}: sample 1 or more, with 64 bits of seed"
            )

    def of_model(self, facts: ModelFacts, itemsize: int) -> int:
        """Return how many tokens of a model's text are sampled.

        Two for each expert and dimension of the widest layer, where routing is even, and at least 16,384, as far as
        there is room.

        Args:
            facts: what is known of the model.
            itemsize: bytes of a number of its hidden states.

        Raises:
            CalibrationError: there is no room for a token.
        """
        if self.tokens is not None:
            return self.tokens
        layers = [(stack.num_experts, stack.shape.width) for stack in facts.stacks if stack.shape is not None]
        wanted = max([USUAL, *(-(-PER_DIMENSION * width * experts // facts.top_k) for experts, width in layers)])
        # Of each layer: a key, the hidden state, experts and gates of the token, and its router logits.
        token = sum(8 + width * itemsize + 8 * facts.top_k + 4 * experts for experts, width in layers)
        if token > self.nbytes:
            raise CalibrationError(f"--sample-size {self.nbytes:,}: one token of all layers takes {token:,} bytes")
        return min(wanted, self.nbytes // token)


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
