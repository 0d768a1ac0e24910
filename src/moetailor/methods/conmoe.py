"""ConMoE: keep prototype experts and remap every other slot to one (arXiv:2605.29350).

Published: in a scope of consecutive layers, an expert's score is its mean gated output norm times its distance to the
nearest other expert, both scaled to [0, 1] in the scope; the highest scores are prototypes, and every other slot is
answered by the nearest one, of whichever layer, by the mean relative distance of the three weight matrices.

Here: the same, except that every layer keeps its best expert, so that no layer stands empty. The published checkpoint
holds a copy for each slot; here a shared expert is stored once. Beyond it: a distance by what experts do instead of by
weights, which no permutation of neurons changes, and a scale for each slot in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from moetailor.answers import Borrowed, Keep, Remap
from moetailor.errors import PlanError
from moetailor.fitting.distances import EPSILON, functional_distances, weight_distances, weight_products
from moetailor.methods.choose import refuse_protected
from moetailor.methods.method import AtLeast, JointMethod
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class ConMoE(JointMethod):
    """Keep the experts that contribute most and are hardest to replace; map every other slot to its nearest one.

    Attributes:
        scope: consecutive MoE layers that share their prototypes (paper: 4 for Qwen3-30B-A3B, 1 for others).
        distance: ``weights`` (paper: mean relative Frobenius distance of gate, up and down), or ``functional``: the
            share of an expert's gated output energy that is lost when another expert answers its tokens.
        scale: multiply a remapped slot's gate by the factor that fits the prototype's outputs to the expert's best.
        tokens: sampled tokens of each expert that the functional distance and the scale are measured on.
    """

    scope: Annotated[int, AtLeast(1)] = 1
    distance: Literal["weights", "functional"] = "weights"
    scale: bool = False
    tokens: Annotated[int, AtLeast(1)] = 256

    name = "conmoe"
    paper = "arXiv:2605.29350"
    replaces_with = Remap
    needs = frozenset({"count", "gated_norm"})
    reads_weights = True

    @property
    def decides_counts(self) -> bool:
        """Whether several layers share their prototypes."""
        return self.scope > 1

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide scope by scope."""
        for start in range(0, len(layers), self.scope):
            block = layers[start : start + self.scope]
            distances, scales = self._distances(block)
            yield from _remapped(block, sum(keeps[start : start + self.scope]), distances, scales)
            for layer in block:
                layer.close()

    def _distances(self, layers: Sequence[LayerView]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distance and slot scale of every pair (expert, answering expert) of a scope, float64 [E, E]."""
        _check_shapes(layers)
        by_weights = weight_distances(weight_products(layers)) if self.distance == "weights" else torch.empty(0)
        if self.distance == "weights" and not self.scale:
            return by_weights, torch.ones_like(by_weights)
        functional, scales = functional_distances(layers, self.tokens, self.scale)
        distances = by_weights if self.distance == "weights" else functional
        return distances, scales if self.scale else torch.ones_like(scales)


def _remapped(
    layers: Sequence[LayerView], keep: int, distances: torch.Tensor, scales: torch.Tensor
) -> Iterator[LayerPlan]:
    """Yield the plans of the layers of one scope; experts are numbered through the scope, layer after layer."""
    owner = [(at, expert) for at, layer in enumerate(layers) for expert in range(layer.num_experts)]
    # a_e = mean over routed tokens of g |f_e(x)|;  b_e = min_{e' != e} d(e, e');  s_e = minmax(a)_e minmax(b)_e
    nearest = distances.masked_fill(torch.eye(len(owner), dtype=torch.bool), float("inf")).min(1).values
    score = _min_max(torch.cat([layer.mean("gated_norm") for layer in layers])) * _min_max(nearest)
    prototypes = _prototypes(layers, owner, score.tolist(), keep)
    start = 0
    for at, layer in enumerate(layers):
        slots = []
        for number in range(start, start + layer.num_experts):
            # m(e) = argmin_p d(e, p), a prototype answers for itself
            answer = number if number in prototypes else prototypes[int(distances[number, prototypes].argmin())]
            factor = float(f"{float(scales[number, answer]):.6g}") if answer != number else 1.0
            home, expert = owner[answer]
            if answer == number:
                slots.append(Keep())
            elif home == at:
                slots.append(Remap(expert, factor))
            else:
                slots.append(Borrowed(layers[home].index, expert, factor))
        yield LayerPlan(slots=tuple(slots), scores=tuple(score[start : start + layer.num_experts].tolist()))
        start += layer.num_experts


def _prototypes(
    layers: Sequence[LayerView], owner: Sequence[tuple[int, int]], score: Sequence[float], keep: int
) -> list[int]:
    """Return the prototypes of a scope: protected experts, the best of each layer, then the highest scores."""
    for layer in layers:
        refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
    # Of equal scores, often several of 0, those that no token reached go first.
    unused = [float(layers[at].sums.count[expert]) == 0 for at, expert in owner]
    ranked = sorted(range(len(owner)), key=lambda number: (-score[number], unused[number], number))
    first = {number for number, (at, expert) in enumerate(owner) if expert in layers[at].protected}
    for at in range(len(layers)):
        if not any(owner[number][0] == at for number in first):
            first.add(next(number for number in ranked if owner[number][0] == at))
    if len(first) > keep:
        raise PlanError(
            f"layers {layers[0].index} to {layers[-1].index}: {len(first)} experts must stay (protected, or the only "
            f"one of a layer), the budget keeps {keep}; protect fewer"
        )
    return sorted(sorted(ranked, key=lambda number: number not in first)[:keep])


def _check_shapes(layers: Sequence[LayerView]) -> None:
    """Refuse layers whose experts have other shapes."""
    first = layers[0].experts.shape.matrices
    for layer in layers:
        if (shapes := layer.experts.shape.matrices) != first:
            raise PlanError(
                f"scope={len(layers)}: layers {layers[0].index} and {layer.index} have experts of other shapes "
                f"({list(first.values())} and {list(shapes.values())}); only layers of one shape can share"
            )


def _min_max(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min() + EPSILON)
