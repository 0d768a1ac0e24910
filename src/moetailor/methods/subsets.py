"""The subset of a layer's experts whose output is nearest to that of all, by trying many.

Shapes: S subsets, T tokens, E experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations, product

import torch

from moetailor.calibration.statistics import Sample
from moetailor.fitting.distances import outputs_of_all
from moetailor.methods.choose import kept_of_group, refuse_protected
from moetailor.methods.routing import own_gates, routing_of
from moetailor.planning.view import LayerView

# Gates held at once while subsets are tried.
PORTION = 2**22


def best_subset(
    layer: LayerView, keep: int, name: str, *, exhaustive: int, samples: int, swaps: int, tokens: int, seed: int
) -> list[int]:
    """Return the experts of a layer whose output alone is nearest to that of all.

    Args:
        layer: the layer.
        keep: experts that stay.
        name: the method that asks, for messages.
        exhaustive: up to so many subsets all are tried; of more, some drawn at random.
        samples: how many are drawn.
        swaps: so many times the best exchange of a kept expert for a dropped one is made, as long as one helps.
        tokens: sampled tokens that every expert is run on.
        seed: another seed draws other subsets.

    Raises:
        PlanError: more experts are protected than may stay, or what the router would do is not known.
    """
    refuse_protected(layer.index, layer.protected, layer.num_experts, keep, layer.groups)
    each, errors = kept_of_group(keep, layer.groups), subset_errors(layer, tokens, f"{name}, layer {layer.index}")
    count = math.prod(math.comb(len(free), stay) for free, stay in _free(layer, each))
    tried = _all(layer, each) if count <= exhaustive else _drawn(layer, each, samples, seed)
    best = tried[errors(tried).argmin()]
    for _ in range(swaps):
        near = _exchanged(layer, best)
        if not (at := int(errors(near).argmin())):
            break
        best = near[at]
    return best.nonzero().flatten().tolist()


def subset_errors(layer: LayerView, tokens: int, where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives |F(X) - F_C(X)|^2 of subsets C [S, E], float64 [S].

    Args:
        layer: the layer.
        tokens: sampled tokens that every expert is run on.
        where: the layer and method, for messages.
    """
    sample = Sample(**{name: part[:tokens] for name, part in vars(layer.sample).items()})
    rule, known_T = routing_of(sample, layer.limits, layer.correction, where)
    rule, own_TE = replace(rule, logits=rule.logits[known_T]), own_gates(sample)[known_T]
    every = (outputs_EnD.transpose(0, 1) for _, outputs_EnD in outputs_of_all(layer, known_T.nonzero().flatten()))
    gram_TEE = torch.cat([(y_nED @ y_nED.mT).cpu() for y_nED in every])

    def errors(kept_SE: torch.Tensor) -> torch.Tensor:
        found = []
        for part_SE in kept_SE.split(max(1, PORTION // own_TE.numel())):
            # |F(x) - F_C(x)|^2 = d^T (Y Y^T) d, with d = g - g_C and Y the outputs of all experts for x
            lost_TSE = (own_TE - rule.gates(part_SE)).transpose(0, 1)
            found.append(((lost_TSE @ gram_TEE) * lost_TSE).sum((0, 2), dtype=torch.float64))
        return torch.cat(found)

    return errors


def _free(layer: LayerView, each: int) -> list[tuple[list[int], int]]:
    """Return, for each group, the experts that may go and how many of them stay."""
    size = layer.num_experts // layer.groups
    groups = [range(start, start + size) for start in range(0, layer.num_experts, size)]
    free = [[expert for expert in group if expert not in layer.protected] for group in groups]
    return [(some, each - size + len(some)) for some in free]


def _all(layer: LayerView, each: int) -> torch.Tensor:
    """Return all subsets with `each` experts of every group, bool [S, E]."""
    chosen = product(*(combinations(free, stay) for free, stay in _free(layer, each)))
    kept = torch.tensor([[*chain(*subset), *layer.protected] for subset in chosen], dtype=torch.long)
    return torch.zeros(len(kept), layer.num_experts, dtype=torch.bool).scatter_(1, kept, True)


def _drawn(layer: LayerView, each: int, samples: int, seed: int) -> torch.Tensor:
    """Return random subsets with `each` experts of every group, bool [S, E]."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer.index)
    rank = torch.rand(samples, layer.num_experts, generator=generator)
    rank[:, list(layer.protected)] = 2.0
    rank = rank.unflatten(1, (layer.groups, -1))
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(2, rank.topk(each).indices, True).flatten(1)


def _exchanged(layer: LayerView, kept_E: torch.Tensor) -> torch.Tensor:
    """Return a subset, then all that differ from it by a kept and a dropped expert of one group, bool [S, E]."""
    size = layer.num_experts // layer.groups
    kept = [expert for expert in kept_E.nonzero().flatten().tolist() if expert not in layer.protected]
    dropped = (~kept_E).nonzero().flatten().tolist()
    pairs = [(out, into) for out in kept for into in dropped if out // size == into // size]
    found = kept_E.repeat(1 + len(pairs), 1)
    for row, (out, into) in zip(found[1:], pairs, strict=True):
        row[out], row[into] = False, True
    return found
