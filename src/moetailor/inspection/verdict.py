"""How far it is safe to go, in words, from what layers lose when experts are removed.

What layers lose is a table: for each share of experts removed, what each kind of stand-in loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Lost = dict[str, dict[str, float]]

# The plainest stand-in, and the fitted one that the method `linear` takes.
PLAIN, FITTED = "constant", "rank 8"
# Nats a token, and the mean share of the layers' energy. Below, benchmarks/redundancy.py measures KL up to .009 and
# .012, perplexity up to 1.1% and 1.4% higher, 97% and 96% of top words the same; above, KL from .007 and .011 on.
SAFE_KL, SAFE_LOST = 0.005, 0.005
# How many times less widths by expert must promise to lose to be worth an engine that can run them.
WORTH = 1.5


def weighed(layers: Sequence[tuple[float, Lost]]) -> Lost:
    """Return the sum of what layers lose, each times its weight.

    Args:
        layers: weight and loss of each.
    """
    _, first = layers[0]
    return {
        share: {name: sum(weight * lost[share][name] for weight, lost in layers) for name in by_name}
        for share, by_name in first.items()
    }


def verdict(lost: Lost, kl: Lost | None) -> str:
    """Return how far it is safe to go, a sentence for each share of experts removed.

    Args:
        lost: mean over layers of what they lose.
        kl: what the predictions are expected to lose, when that is known.
    """
    limit = SAFE_LOST if kl is None else SAFE_KL
    sentences = []
    for share, by_name in (kl or lost).items():
        plain, fitted = by_name[PLAIN], by_name[FITTED]
        both = f"linear maps of {FITTED} lose {_amount(fitted, kl)}, constants {_amount(plain, kl)}"
        if plain <= limit:
            told = f"safe with constants in their place, which lose {_amount(plain, kl)}"
        elif fitted <= limit:
            told = f"safe only with fitted stand-ins: {both}"
        else:
            told = f"not without damage: {both}"
        sentences.append(f"Remove {share}: {told}.")
    if kl is None:
        sentences.append(
            "These are shares of what the experts give; calibrate --sensitivity tells what they cost in nats."
        )
    return " ".join(sentences)


def spread(prices: Sequence[float]) -> float:
    """Return the arithmetic over the geometric mean of prices above zero: 1 where all are alike.

    Each bit less makes four times the noise. With the same bits in all, widths that follow the prices lose so many
    times less than equal widths (reverse water-filling of rate-distortion theory).
    """
    known = [price for price in prices if price > 0]
    if not known:
        return 1.0
    return sum(known) / len(known) / math.exp(sum(map(math.log, known)) / len(known))


def widths_told(spreads: dict[str, float]) -> str:
    """Return whether it is worth to give experts different widths, a sentence."""
    experts, layers = spreads["experts"], spreads["layers"]
    worth = "worth it" if experts >= WORTH else "hardly worth it"
    return (
        f"In few bits: by what noise in each costs, widths by expert would lose up to {experts:.1f} times less than "
        f"equal ones in the same bytes, widths by layer {layers:.1f} times: to mix widths is {worth}."
    )


def _amount(number: float, kl: Lost | None) -> str:
    return f"{number:.2%}" if kl is None else f"{number:.4f} nats a token"
