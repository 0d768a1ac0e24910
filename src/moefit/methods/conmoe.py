"""ConMoE: keep prototype experts and remap every other slot to one (arXiv:2605.29350)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from moefit.methods.choose import top
from moefit.methods.registry import AtLeast, choice, method
from moefit.planning.slots import LayerPlan, Slot
from moefit.planning.view import LayerView

EPSILON = 1e-12


@method("conmoe", removed="expert", paper="arXiv:2605.29350", needs={"count", "gated_norm"}, weights=True)
def conmoe(
    layer: LayerView,
    keep: int,
    *,
    distance: Literal["weights", "functional"] = "weights",
    scale: bool = False,
    tokens: Annotated[int, AtLeast(1)] = 256,
) -> LayerPlan:
    """Keep the experts that contribute most and are hardest to replace; map every other slot to its nearest one.

    Args:
        layer: the layer (the paper's scope of one layer).
        keep: prototypes.
        distance: ``weights`` (paper: mean relative Frobenius distance of gate, up and down), or ``functional``: the
            share of an expert's gated output energy that is lost when another expert answers its tokens.
        scale: multiply a remapped slot's gate by the factor that fits the prototype's outputs to the expert's best.
        tokens: sampled tokens of each expert that the functional distance and the scale are measured on.
    """
    distances, scales = _distances(layer, choice("distance", distance, ("weights", "functional")), scale, tokens)
    # a_e = mean over routed tokens of g |f_e(x)|;  b_e = min_{e' != e} d(e, e');  s_e = minmax(a)_e minmax(b)_e
    nearest = distances.masked_fill(torch.eye(layer.num_experts, dtype=torch.bool), float("inf")).min(1).values
    score = _min_max(layer.mean("gated_norm")) * _min_max(nearest)
    prototypes = top(layer, score, keep)
    slots = []
    for expert in range(layer.num_experts):
        # m(e) = argmin_p d(e, p), a prototype answers for itself
        answer = expert if expert in prototypes else prototypes[int(distances[expert, prototypes].argmin())]
        factor = float(f"{float(scales[expert, answer]):.6g}") if answer != expert else 1.0
        slots.append(Slot("expert", answer, factor))
    return LayerPlan(slots=tuple(slots), scores=tuple(score.tolist()))


def _distances(layer: LayerView, distance: str, scale: bool, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distance and slot scale of every pair (expert, answering expert), float64 [E, E]."""
    ones = torch.ones(layer.num_experts, layer.num_experts, dtype=torch.float64)
    if distance == "weights" and not scale:
        return weight_distances(layer.experts.matrices()), ones
    functional, scales = functional_distances(layer, tokens, scale)
    return (weight_distances(layer.experts.matrices()) if distance == "weights" else functional), (
        scales if scale else ones
    )


def weight_distances(matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean over matrices of 2 |W - W'| / (|W| + |W'|), Frobenius norms, float64 [E, E].

    Args:
        matrices: each [E, rows, columns].
    """
    total = torch.zeros((), dtype=torch.float64)
    for weight in matrices.values():
        flat = weight.flatten(1).float()
        # |W - W'|^2 = |W|^2 + |W'|^2 - 2 <W, W'>: one product for all pairs
        products = (flat @ flat.T).double()
        square = products.diagonal()
        apart = (square[:, None] + square[None] - 2 * products).clamp_min(0).sqrt()
        apart.fill_diagonal_(0)
        norms = square.sqrt()
        total = total + 2 * apart / (norms[:, None] + norms[None] + EPSILON)
    return total / len(matrices)


def functional_distances(layer: LayerView, tokens: int, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each expert loses when another answers its sampled tokens, and the best scale of the answer.

    d(e, p) = sum g^2 |f_e - c f_p|^2 / sum g^2 |f_e|^2 and c = sum g^2 <f_e, f_p> / sum g^2 |f_p|^2, clipped to
    [0, 1.5], over tokens routed to e; c = 1 when not `scaled`. An expert without sampled tokens loses 1 everywhere and
    keeps scale 1.
    """
    count = layer.num_experts
    distances, scales = torch.ones(count, count, dtype=torch.float64), torch.ones(count, count, dtype=torch.float64)
    distances.fill_diagonal_(0)
    sample = layer.sample
    for expert in range(count):
        token, place = (sample.index == expert).nonzero()[:tokens].unbind(1)
        if not len(token):
            continue
        x_TD, weight = sample.hidden[token], sample.gate[token, place].double().square()
        own = layer.experts.outputs(expert, x_TD).double().cpu()
        energy = (weight * own.square().sum(1)).sum().clamp_min(EPSILON)
        for other in range(count):
            if other == expert:
                continue
            theirs = layer.experts.outputs(other, x_TD).double().cpu()
            product = (weight * (own * theirs).sum(1)).sum()
            square = (weight * theirs.square().sum(1)).sum().clamp_min(EPSILON)
            c = (product / square).clamp(0, 1.5) if scaled else torch.ones(())
            distances[expert, other] = (energy - 2 * c * product + c**2 * square) / energy
            scales[expert, other] = c
    return distances, scales


def _min_max(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min() + EPSILON)
