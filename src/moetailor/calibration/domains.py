"""Which domain of the text each sampled token comes from, and what it weighs when domains are balanced."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.sampling import SampleOptions, sampled_positions

# No domain counts as if it were smaller: a stray label on a document must not steer everything.
LEAST = 0.01


def sampled_domains(batches: Sequence[Batch], sample: SampleOptions) -> tuple[list[str], torch.Tensor]:
    """Return the names of the domains, and which of them each sampled token comes from, [N] in the order of every
    layer's sample.

    Args:
        batches: the text.
        sample: which of its tokens were sampled.
    """
    sampled = sampled_positions(batches, sample)
    names = sorted({name for batch in batches for name in batch.domains})
    # Batches number their domains each on its own; a layer's sample lies in the order of the keys.
    domain = torch.cat(
        [
            torch.tensor([names.index(name) for name in batch.domains])[batch.domain.reshape(-1)[position]]
            for batch, (_, position) in zip(batches, sampled, strict=True)
        ]
    )
    return names, domain[torch.argsort(torch.cat([key for key, _ in sampled]), stable=True)]


def balanced(domain_N: torch.Tensor, balance: float) -> torch.Tensor:
    """Return what tokens weigh when the share s of a domain counts as s^(1 - balance), 1 on average, float64 [N].

    Args:
        domain_N: the domain of each token.
        balance: 0 for all tokens alike, 1 for all domains alike.
    """
    share_N = torch.bincount(domain_N)[domain_N].double() / len(domain_N)
    weight_N = share_N.clamp_min(LEAST) ** -balance
    return weight_N / weight_N.mean()
