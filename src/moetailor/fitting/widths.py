"""Experts in few bits: each matrix by GPTQ on what it gets, the down projection fitted to what the others then give.

Moments are weighted by squared gates: that is what an expert's error adds to its layer's. Shapes: n experts, T tokens,
D model width, F expert width, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

from moetailor.answers import Width
from moetailor.checkpoint.storage.integers import Codes, Integers
from moetailor.fitting.gptq import gptq
from moetailor.fitting.held_out import held_out
from moetailor.planning.view import LayerView

Rounding = Literal["gptq", "nearest"]
Matrices = Mapping[str, torch.Tensor]
# Bits of gate and up, and of the down projection, which wants about two more.
PAIRS = ((8, 8), (6, 6), (5, 6), (5, 5), (4, 6), (4, 5), (4, 4), (3, 5), (3, 4), (3, 3), (2, 4), (2, 3), (2, 2))
WIDTHS = tuple(Width(bits=bits, down=0 if down == bits else down) for bits, down in PAIRS)
# What is added to the diagonal of the moments that the down projection is fitted on, as a share of its mean.
RIDGE = 0.02
# Experts that are computed together, and the fewest held-out tokens that judge one.
BATCH, FEW = 16, 8


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
            codes = {name: storage.nearest(some[name], dtype) for name, storage in storages.items()}
        else:
            inputs = [_inputs(layer, slots) for slots in behind[start : start + BATCH]]
            half = _half(layer, inputs, some, storages, dtype)
            codes = {**half.codes, "down": gptq(half.down, half.moments, storages["down"], dtype)}
        for name in storages:
            found[name].append(codes[name])
    return {name: Codes.joined(parts) for name, parts in found.items()}


def held_out_errors(layer: LayerView, widths: Sequence[Width], *, dtype: torch.dtype) -> torch.Tensor:
    """Return what each expert adds to the layer's error in some widths, on tokens that it was not fitted on.

    As a share of what its best constant adds there, float64 [E, widths]; zeros for experts that no token reached.

    Args:
        layer: the layer.
        widths: which.
        dtype: of the scales.
    """
    found = torch.zeros(layer.num_experts, len(widths), dtype=torch.float64)
    for start in range(0, layer.num_experts, BATCH):
        numbers = range(start, min(start + BATCH, layer.num_experts))
        matrices = {name: stack.float() for name, stack in layer.experts.matrices(numbers).items()}
        inputs = [_inputs(layer, {expert: 1.0}, held_out_too=False) for expert in numbers]
        judges = [_Judge.of(layer, expert) for expert in numbers]
        for like in {replace(width, down=0): width for width in widths}:
            half = _half(layer, inputs, matrices, like.storages(layer.shape), dtype)
            for at, width in enumerate(widths):
                if replace(width, down=0) == like:
                    storage = width.storages(layer.shape)["down"]
                    down = storage.numbers(gptq(half.down, half.moments, storage, dtype)).float()
                    found[start : start + BATCH, at] = half.errors(layer, down, judges)
    return found


@dataclass(frozen=True, kw_only=True)
class _Half:
    """Experts of which all but the down projections are rounded.

    Attributes:
        codes: those of the matrices that are.
        matrices: all, with what the codes stand for.
        down: down projections for what they then give, [n, D, F].
        moments: of that, [n, F, F].
    """

    codes: Mapping[str, Codes]
    matrices: Matrices
    down: torch.Tensor
    moments: torch.Tensor

    def errors(self, layer: LayerView, down: torch.Tensor, judges: Sequence[_Judge]) -> torch.Tensor:
        """Return what is lost with some down projections, float64 [n]."""
        found = torch.zeros(len(judges), dtype=torch.float64)
        for number, judge in enumerate(judges):
            mine = {name: part[number] for name, part in self.matrices.items()}
            given = F.linear(layer.experts.hidden(mine, judge.x), down[number], mine.get("down_bias"))
            found[number] = judge.share(given)
        return found


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Tokens that judge an expert: inputs [T, D], weights [T, 1], its own outputs, and what a constant loses there."""

    x: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    constant: float

    @classmethod
    def of(cls, layer: LayerView, expert: int) -> _Judge:
        token, gate = layer.routed(expert)
        weight = gate.double().square()[:, None].to(layer.experts.device)
        y = layer.outputs(expert, token).double()
        judged = held_out(token)
        if int(judged.sum()) < FEW:  # all judge, and all say what the constant is
            judged = torch.ones_like(judged)
        fitted = ~judged if not bool(judged.all()) else judged
        mean = (weight * y)[fitted].sum(0) / weight[fitted].sum().clamp_min(1e-300)
        constant = float((weight[judged] * (y[judged] - mean).square()).sum())
        x = layer.sample.hidden[token[judged]].float().to(layer.experts.device)
        return cls(x=x, weight=weight[judged], y=y[judged], constant=constant)

    def share(self, given: torch.Tensor) -> float:
        """Return the squared error of some outputs over that of the constant."""
        return float((self.weight * (self.y - given.double()).square()).sum()) / self.constant if self.constant else 0.0


def _half(
    layer: LayerView,
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    matrices: Matrices,
    storages: Mapping[str, Integers],
    dtype: torch.dtype,
) -> _Half:
    """Round gate and up projections, and fit down projections to what they then give.

    Args:
        layer: the layer.
        inputs: of each expert, and what an error weighs there.
        matrices: the experts', stacked.
        storages: how each matrix lies.
        dtype: of the scales.
    """
    experts, down = layer.experts, matrices["down"]
    moments = torch.stack([_moment(x, x, weight) for x, weight in inputs])
    codes = {name: gptq(matrices[name], moments, storages[name], dtype) for name in experts.inputs}
    rounded = dict(matrices) | {name: storages[name].numbers(codes[name]).float() for name in codes}
    own, cross = (down.new_empty(len(down), down.shape[2], down.shape[2]) for _ in range(2))
    for number, (x, weight) in enumerate(inputs):
        was, now = (
            experts.hidden({name: part[number] for name, part in given.items()}, x) for given in (matrices, rounded)
        )
        own[number], cross[number] = _moment(now, now, weight), _moment(was, now, weight)
    return _Half(codes=codes, matrices=rounded, down=_refitted(down, own, cross), moments=own)


def _inputs(
    layer: LayerView, slots: Mapping[int, float], *, held_out_too: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of an expert, float32 [T, D], and what an error of its output weighs there, [T].

    The sampled tokens that chose it weigh as their squared gates. Where they are fewer than the expert is wide, tokens
    from all of the sample make up for them, each with the mean squared gate of the layer: moments of so few tokens
    would say nothing of most directions.

    Args:
        layer: the layer.
        slots: those behind which the expert runs, with the factor on their gates.
        held_out_too: whether with the tokens that are held out.
    """
    routed = [(*layer.routed(slot), factor) for slot, factor in slots.items()]
    token = torch.cat([token for token, _, _ in routed])
    weight = torch.cat([(gate.double() * factor).square() for _, gate, factor in routed])
    if not held_out_too:
        token, weight = token[~held_out(token)], weight[~held_out(token)]
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
