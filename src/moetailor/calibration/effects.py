"""What errors of experts cost the predictions: what `sensitivity` measured, and the prices that follow from it.

A layer's errors are c, the squared error of stand-ins, and n, that of rounding to few bits. Over all layers

    kl = sum_l (s_l c_l + a_l n_l) + sqrt(sum_l b_l^2 (c_l + n_l))

The sums are the plain second order of the predictions. The root is what routers add: a token whose experts were nearly
tied goes elsewhere as soon as its state moves, so what that costs grows with the size of errors, not with its square.
s comes from constants in place of all experts of a layer, a and b from experts rounded to 6 and to 3 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Annotated, Literal, TypedDict, get_args

from moetailor.schema import Count, Few, Within

Errors = Literal["constants", "bits6", "bits3"]
ERRORS: tuple[Errors, ...] = get_args(Errors)
TINY = 1e-300
Nats = Annotated[float, Within(0)]


class Effect(TypedDict):
    """What errors in one layer did, in sums over tokens: nats, and the squared error of its routed output."""

    kl: Nats
    squared_error: Annotated[float, Within(0)]


class LayerEffects(TypedDict):
    """What constants in place of one layer's experts did, and what rounding all of these to few bits did."""

    constants: Effect
    bits6: Effect
    bits3: Effect


class Together(TypedDict):
    """Nats of each kind of error in all layers at once."""

    constants: Nats
    bits6: Nats
    bits3: Nats


class Effects(TypedDict):
    """What is in sensitivity.json: how many tokens counted, each layer by its number, all layers together."""

    tokens: Count
    layers: Mapping[Few, LayerEffects]
    together: Together


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Nats a token that errors cost, by layer; errors are squared ones a token, summed over the layer's width.

    Attributes:
        coarse: s of each layer.
        noise: a of each layer.
        flips: b of each layer.
        together: (what the equation says, what was measured) for errors in all layers at once, nats a token.
    """

    coarse: Mapping[int, float]
    noise: Mapping[int, float]
    flips: Mapping[int, float]
    together: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, measured: Effects) -> Prices:
        """Return the prices that follow from what was measured."""
        tokens, layers = measured["tokens"], measured["layers"]
        coarse = {index: _slope(found["constants"]) for index, found in layers.items()}
        # What 6 bits cost in a layer may be one token that went elsewhere. The curve would then give all of
        # 3 bits to b, and more noise than that would seem to cost little. As shares of s, a is alike in all layers.
        alone = {i: _curve(found["bits6"], found["bits3"], tokens, 0.0)[0] for i, found in layers.items()}
        share = median(a / max(coarse[i], TINY) for i, a in alone.items())
        fitted = {i: _curve(found["bits6"], found["bits3"], tokens, share * coarse[i]) for i, found in layers.items()}
        noise, flips = ({index: found[at] for index, found in fitted.items()} for at in (0, 1))
        prices = cls(coarse=coarse, noise=noise, flips=flips, together=())
        joint = []
        for errors in ERRORS:
            each = {index: found[errors]["squared_error"] / tokens for index, found in layers.items()}
            said = prices.sum({i: (e, 0.0) if errors == "constants" else (0.0, e) for i, e in each.items()})
            joint.append((said, measured["together"][errors] / tokens))
        return cls(coarse=coarse, noise=noise, flips=flips, together=tuple(sorted(joint)))

    def moved(self, errors: Mapping[int, tuple[float, float]]) -> float:
        """Return the root in the equation.

        Args:
            errors: c and n of each layer.
        """
        return math.sqrt(sum(self.flips[index] ** 2 * (c + n) for index, (c, n) in errors.items()))

    def sum(self, errors: Mapping[int, tuple[float, float]]) -> float:
        """Return what the equation says; see `moved`."""
        plain = sum(self.coarse[index] * c + self.noise[index] * n for index, (c, n) in errors.items())
        return plain + self.moved(errors)

    def slopes(self, layer: int, moved: float) -> tuple[float, float]:
        """Return what a little more of c and of n in a layer adds to the sum.

        Args:
            layer: the layer.
            moved: the root in the equation as it stands.
        """
        more = self.flips[layer] ** 2 / (2 * moved) if moved > 0 else 0.0
        return self.coarse[layer] + more, self.noise[layer] + more

    def expected(self, errors: Mapping[int, tuple[float, float]]) -> dict[int, float]:
        """Return nats a token that errors of all layers together should cost, as each layer's part of them.

        What the equation says is corrected by what it said of the errors that were measured in all layers at once.

        Args:
            errors: c and n of each layer.
        """
        moved, factor = self.moved(errors), self._correction(self.sum(errors))
        found = {}
        for index, (c, n) in errors.items():
            root = self.flips[index] ** 2 * (c + n) / moved if moved > 0 else 0.0
            found[index] = factor * (self.coarse[index] * c + self.noise[index] * n + root)
        return found

    def _correction(self, said: float) -> float:
        """Return measured over said, between measured points on a straight line of logarithms."""
        points = [(math.log(x), math.log(y / x)) for x, y in self.together if x > 0 and y > 0]
        if not points or said <= 0:
            return 1.0
        at = min(max(math.log(said), points[0][0]), points[-1][0])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 <= at <= x1 and x1 > x0:
                return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
        return math.exp(points[0][1])


def _slope(effect: Effect) -> float:
    return effect["kl"] / max(effect["squared_error"], TINY)


def _curve(small: Effect, large: Effect, tokens: int, least: float) -> tuple[float, float]:
    """Return a and b of kl = a e^2 + b e through two points, neither below zero; through the large one with a at least
    `least`, as far as that does not pass it.
    """
    (k0, e0), (k1, e1) = ((part["kl"] / tokens, part["squared_error"] / tokens) for part in (small, large))
    if not 0 < e0 < e1:
        return _slope(large), 0.0
    r0, r1 = math.sqrt(e0), math.sqrt(e1)
    b = (k0 * e1 - k1 * e0) / (r0 * e1 - r1 * e0)
    if b <= 0:
        return k1 / e1, 0.0
    a = (k1 - b * r1) / e1
    if max(a, 0.0) < least:
        a = min(least, k1 / e1)
        return a, (k1 - a * e1) / r1
    # Where kl grows more slowly than the size of errors: the line that misses both by the same factor.
    return (a, b) if a > 0 else (0.0, math.sqrt(k0 * k1 / (r0 * r1)))
