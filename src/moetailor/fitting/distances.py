"""How far experts are from each other, by their weights or by what they give. Shapes: T tokens, E experts, D width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch

from moetailor.planning.view import LayerView

EPSILON = 1e-12
# Numbers that all experts give together, where that is for 128 tokens at least.
AT_ONCE = 2**26


def weight_products(layers: Sequence[LayerView]) -> dict[str, torch.Tensor]:
    """Return <W, W'> of each matrix of every two experts, float64 [E, E].

    Args:
        layers: of one shape; experts are numbered through them.
    """
    sizes = layers[0].experts.shape.matrices
    # Two blocks of experts are in memory at a time.
    at_once = max(layers[0].experts.working_nbytes // (8 * sum(map(math.prod, sizes.values()))), 1)
    blocks = [range(n)[i : i + at_once] for n in [layer.num_experts for layer in layers] for i in range(0, n, at_once)]
    owners = [layer for layer in layers for _ in range(0, layer.num_experts, at_once)]
    ends = list(accumulate(map(len, blocks)))

    def rows(block: int) -> dict[str, torch.Tensor]:
        found = owners[block].experts.matrices(slice(blocks[block].start, blocks[block].stop))
        return {name: found[name].flatten(1).float() for name in sizes}

    products = {name: torch.zeros(ends[-1], ends[-1], dtype=torch.float64) for name in sizes}
    for one in range(len(blocks)):
        mine, here = rows(one), slice(ends[one] - len(blocks[one]), ends[one])
        for other in range(one + 1):
            theirs, there = mine if other == one else rows(other), slice(ends[other] - len(blocks[other]), ends[other])
            for name, found in products.items():
                pairs = (mine[name] @ theirs[name].T).double().cpu()
                found[here, there], found[there, here] = pairs, pairs.T
    return products


def weight_distances(products: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean over matrices of 2 |W - W'| / (|W| + |W'|), Frobenius norms, float64 [E, E].

    Args:
        products: see `weight_products`.
    """
    total = torch.zeros((), dtype=torch.float64)
    for found in products.values():
        # |W - W'|^2 = |W|^2 + |W'|^2 - 2 <W, W'>
        square = found.diagonal()
        apart = (square[:, None] + square[None] - 2 * found).clamp_min(0).sqrt()
        apart.fill_diagonal_(0)
        norms = square.sqrt()
        total = total + 2 * apart / (norms[:, None] + norms[None] + EPSILON)
    return total / len(products)


def functional_distances(
    layers: Sequence[LayerView], tokens: int, scaled: bool, limits: tuple[float, float] = (0.0, 1.5)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each expert loses when another answers its sampled tokens, and the best scale of the answer.

    d(e, p) = sum g^2 |f_e - c f_p|^2 / sum g^2 |f_e|^2 and c = sum g^2 <f_e, f_p> / sum g^2 |f_p|^2, clipped to
    the limits, over tokens routed to e; c = 1 when not `scaled`. An expert without sampled tokens loses 1 everywhere
    and keeps scale 1. Experts are numbered through the layers; both results are float64 [E, E].
    """
    experts = [(layer, expert) for layer in layers for expert in range(layer.num_experts)]
    routed = [tuple(part[:tokens] for part in layer.routed(expert)) for layer, expert in experts]
    owner = torch.cat([torch.full_like(token, number) for number, (token, _) in enumerate(routed)])
    weight = torch.cat([gate for _, gate in routed]).double().square()
    pairs = list(zip(experts, routed, strict=True))
    x_TD = torch.cat([layer.sample.hidden[token] for (layer, _), (token, _) in pairs])
    own_TD = torch.empty(x_TD.shape, device=layers[0].experts.device)  # in place first, see `outputs_of_all`
    counts = [len(token) for token, _ in routed]
    for (layer, expert), (token, _), own_nD in zip(experts, routed, own_TD.split(counts), strict=True):
        own_nD.copy_(layer.experts.outputs(expert, layer.inputs(token)))

    def summed(values_T: torch.Tensor) -> torch.Tensor:
        """Return sum g^2 value over the tokens of each expert, float64 [E]."""
        total = torch.zeros(len(experts), dtype=torch.float64)
        return total.index_add_(0, owner, weight * values_T.double().cpu())

    energy = summed(own_TD.square().sum(1))
    reached, energy = energy > 0, energy.clamp_min(EPSILON)
    distances, scales = torch.ones(2, len(experts), len(experts), dtype=torch.float64)
    for number, (layer, expert) in enumerate(experts):
        # One expert on the tokens of all: products of many rows.
        given_TD = layer.experts.outputs(expert, x_TD).to(own_TD)
        product, square = summed((own_TD * given_TD).sum(1)), summed(given_TD.square().sum(1))
        c = (product / square.clamp_min(EPSILON)).clamp(*limits) if scaled else torch.ones_like(product)
        distances[:, number] = torch.where(reached, (energy - 2 * c * product + c**2 * square) / energy, 1.0)
        scales[:, number] = torch.where(reached, c, 1.0)
    return distances.clamp_min(0).fill_diagonal_(0), scales.fill_diagonal_(1)


def output_gram(layer: LayerView, tokens: int, gate_TE: torch.Tensor | None = None) -> torch.Tensor:
    """Return sum_t g_ti g_tj <f_i(x_t), f_j(x_t)> of each pair of experts, all on the same tokens, float64 [E, E].

    Args:
        layer: the layer.
        tokens: how many sampled tokens, routed to an expert or not.
        gate_TE: factor on each expert's output, 1 when None.
    """
    gram = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    for token, outputs_EnD in outputs_of_all(layer, torch.arange(min(tokens, len(layer.sample.hidden)))):
        if gate_TE is not None:
            outputs_EnD *= gate_TE[token].T[..., None].to(outputs_EnD)
        rows = outputs_EnD.flatten(1)
        gram += (rows @ rows.T).double().cpu()
    return gram


def outputs_of_all(layer: LayerView, token: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield some of the sampled tokens, [n], and what every expert gives for them, float32 [E, n, D].

    Args:
        layer: the layer.
        token: sampled tokens, routed to an expert or not.
    """
    width = layer.sample.hidden.shape[1]
    for some in token.split(max(AT_ONCE // (layer.num_experts * width), 128)):
        # In place before experts are read: what is put between these as they come and go leaves the heap in pieces.
        outputs_EnD = torch.empty(layer.num_experts, len(some), width, device=layer.experts.device)
        for expert, outputs_nD in enumerate(outputs_EnD):
            outputs_nD.copy_(layer.experts.outputs(expert, layer.inputs(some)))
        yield some, outputs_EnD
