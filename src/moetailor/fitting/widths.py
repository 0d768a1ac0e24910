"""Experts in few bits: each matrix by GPTQ on what it gets, the down projection fitted to what the others then give.

Moments are weighted by squared gates: that is what an expert's error adds to its layer's. Shapes: n experts, T tokens,
D model width, F expert width, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from moetailor.checkpoint.storage.integers import Codes, Integers
from moetailor.fitting.gptq import gptq
from moetailor.planning.view import LayerView

Rounding = Literal["gptq", "nearest"]
Matrices = Mapping[str, torch.Tensor]
# What is added to the diagonal of the moments that the down projection is fitted on, as a share of its mean.
RIDGE = 0.02
# Experts that are computed together.
BATCH = 16


def quantized(
    layer: LayerView,
    behind: Sequence[Mapping[int, float]],
    matrices: Matrices,
    storages: Mapping[str, Integers],
    *,
    dtype: torch.dtype,
    rounding: Rounding = "gptq",
) -> dict[str, Codes]:
    """Return the codes of some experts, by matrix.

    Args:
        layer: the layer.
        behind: the slots behind which each expert runs, with the factor on their gates.
        matrices: weights and biases of the experts, stacked in that order.
        storages: how each matrix lies.
        dtype: of the scales.
        rounding: ``nearest`` takes the nearest codes, whatever the inputs are.
    """
    found: dict[str, list[Codes]] = {name: [] for name in storages}
    for start in range(0, len(behind), BATCH):
        some = {name: part[start : start + BATCH].float() for name, part in matrices.items()}
        if rounding == "nearest":
            codes = {name: _nearest(some[name], storage, dtype) for name, storage in storages.items()}
        else:
            codes = _fitted(layer, behind[start : start + BATCH], some, storages, dtype)
        for name in storages:
            found[name].append(codes[name])
    return {name: Codes.joined(parts) for name, parts in found.items()}


def _nearest(weight: torch.Tensor, storage: Integers, dtype: torch.dtype) -> Codes:
    scale, zero = storage.fit(weight, torch.ones(weight.shape[-1], device=weight.device), dtype)
    return Codes(code=storage.round(weight, scale, zero), scale=scale, zero=zero)


def _fitted(
    layer: LayerView,
    behind: Sequence[Mapping[int, float]],
    matrices: Matrices,
    storages: Mapping[str, Integers],
    dtype: torch.dtype,
) -> dict[str, Codes]:
    experts, down = layer.experts, matrices["down"]
    inputs = [_inputs(layer, slots) for slots in behind]
    moments = torch.stack([_moment(x, x, weight) for x, weight in inputs])
    found = {name: gptq(matrices[name], moments, storages[name], dtype) for name in experts.inputs}
    rounded = dict(matrices) | {name: storages[name].numbers(found[name]).float() for name in experts.inputs}
    own, cross = (down.new_empty(len(down), down.shape[2], down.shape[2]) for _ in range(2))
    for number, (x, weight) in enumerate(inputs):
        was, now = (
            experts.hidden({name: part[number] for name, part in given.items()}, x) for given in (matrices, rounded)
        )
        own[number], cross[number] = _moment(now, now, weight), _moment(was, now, weight)
    found["down"] = gptq(_refitted(down, own, cross), own, storages["down"], dtype)
    return found


def _inputs(layer: LayerView, slots: Mapping[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of an expert, float32 [T, D], and what an error of its output weighs there, [T].

    The sampled tokens that chose it weigh as their squared gates. Where they are fewer than the expert is wide, tokens
    from all of the sample make up for them, each with the mean squared gate of the layer: moments of so few tokens
    would say nothing of most directions.

    Args:
        layer: the layer.
        slots: those behind which the expert runs, with the factor on their gates.
    """
    routed = [(*layer.routed(slot), factor) for slot, factor in slots.items()]
    token = torch.cat([token for token, _, _ in routed])
    weight = torch.cat([(gate.double() * factor).square() for _, gate, factor in routed])
    sample, device = layer.sample, layer.experts.device
    missing = min(sample.hidden.shape[1] - len(token), len(sample.hidden))
    if missing > 0:
        spread = torch.arange(missing) * len(sample.hidden) // missing
        token = torch.cat([token, spread])
        weight = torch.cat([weight, sample.gate.double().square().mean().expand(missing)])
    return sample.hidden[token].float().to(device), weight.float().to(device)


def _moment(one: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return sum w x y^T."""
    return (one * weight[:, None]).T @ other


def _refitted(down: torch.Tensor, own: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Return the down projection that gives for the new inner states what the old one gave for the old ones.

    Args:
        down: [n, D, F].
        own: moments of the new states h', sum g^2 h' h'^T, [n, F, F].
        cross: sum g^2 h h'^T, [n, F, F].
    """
    # W* = W (C_hh' + l I) (C_h'h' + l I)^-1
    more = RIDGE * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    ridge = more[:, None, None] * torch.eye(own.shape[-1], device=own.device)
    return torch.linalg.solve(own + ridge, (down @ (cross + ridge)).transpose(1, 2)).transpose(1, 2)
