"""The tokens that say what an expert does: its own, and where these are few, others of the layer's.

Moments of fewer tokens than an expert is wide say nothing of most directions. What it does on tokens that went to
other experts is known as well, though, and those are more like its own than none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moetailor.planning.view import LayerView

# An expert has enough with so many tokens for each dimension. Of what it lacks, so many times as many others are taken.
ENOUGH, TIMES = 2, 2
# What others weigh beside its own: in what is fitted little, as those are what counts; in what rounding must not do
# more, since GPTQ makes up for errors in whatever direction it believes unused.
FITTED, ROUNDED = 0.02, 0.3


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a layer's sample, an expert's own first.

    Attributes:
        place: which, [T].
        weight: what an error weighs there, float64 [T].
        own: how many are its own.
    """

    place: torch.Tensor
    weight: torch.Tensor
    own: int

    def but(self, held: torch.Tensor) -> Tokens:
        """Return them without some of its own.

        Args:
            held: bool [own].
        """
        stay = self.rest(held)
        return Tokens(place=self.place[stay], weight=self.weight[stay], own=self.own - int(held.sum()))

    def rest(self, held: torch.Tensor) -> torch.Tensor:
        """Return which stay without some of its own, bool [T]; see `but`."""
        return pad(~held, (0, len(self.place) - self.own), value=True)


def tokens_of(layer: LayerView, slots: Mapping[int, float], share: float = FITTED) -> Tokens:
    """Return the tokens that say what an expert does.

    Its own are those that chose it, with their squared gates.

    Args:
        layer: the layer.
        slots: those behind which the expert runs, with the factor on their gates.
        share: of the layer's mean squared gate, the weight of each other token.
    """
    routed = [(*layer.routed(slot), factor) for slot, factor in slots.items()]
    place = torch.cat([token for token, _, _ in routed])
    weight = torch.cat([(gate.double() * factor).square() for _, gate, factor in routed])
    return among_others(layer, place, weight, share)


def among_others(layer: LayerView, place: torch.Tensor, weight: torch.Tensor, share: float = FITTED) -> Tokens:
    """Return some tokens of an expert, joined by others where they are few.

    Args:
        layer: the layer.
        place: its own, [T].
        weight: what an error weighs there, float64 [T].
        share: of the layer's mean squared gate, the weight of each other token.
    """
    own, sample = len(place), layer.sample
    if (wanted := lacking(own, sample.hidden.shape[1])) > 0:
        is_own = torch.zeros(len(sample.hidden), dtype=torch.bool)
        is_own[place] = True
        others = (~is_own).nonzero().flatten()
        # Spread over the sample.
        count = min(int(wanted), len(others))
        others = others[torch.arange(count) * len(others) // max(count, 1)]
        place = torch.cat([place, others])
        weight = torch.cat([weight, share * sample.gate.double().square().mean().expand(count)])
    return Tokens(place=place, weight=weight, own=own)


def lacking(own: float, width: int) -> float:
    """Return how many others should join so many tokens of an expert's own in a model of some width."""
    return TIMES * max(ENOUGH * width - own, 0)


def joined(own: Iterable[float], width: int, sampled: int) -> list[float]:
    """Return how many tokens say what each of some experts does, its own and others.

    Args:
        own: those of each.
        width: of the model, D.
        sampled: all of the sample.
    """
    return [min(some + lacking(some, width), sampled) for some in own]
