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
from moetailor.checkpoint.models import working_nbytes
from moetailor.checkpoint.storage.integers import Codes, Integers
from moetailor.fitting.constants import constant_errors
from moetailor.fitting.gptq import Seen, gptq
from moetailor.fitting.held_out import held_out
from moetailor.planning.view import LayerView

Rounding = Literal["gptq", "nearest"]
Matrices = Mapping[str, torch.Tensor]
# Bits of gate and up, and of the down projection, which wants about two more.
PAIRS = ((8, 8), (6, 6), (5, 6), (5, 5), (4, 6), (4, 5), (4, 4), (3, 5), (3, 4), (3, 3), (2, 4), (2, 3), (2, 2))
WIDTHS = tuple(Width(bits=bits, down=0 if down == bits else down) for bits, down in PAIRS)
# Wider ones are not measured: each bit more takes a quarter of the noise.
WIDEST = 5
# What is added to the diagonal of the moments that the down projection is fitted on, as a share of its mean.
RIDGE = 0.02
# The fewest held-out tokens that judge an expert, and the share of its energy that a constant must lose to measure by:
# where it loses less, the tokens were all alike.
FEW, ALIKE = 8, 1e-3


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
    batch = _batch(layer)
    for start in range(0, len(behind), batch):
        some = {name: part[start : start + batch].float() for name, part in matrices.items()}
        if rounding == "nearest":
            codes = {name: storage.nearest(some[name], dtype) for name, storage in storages.items()}
        else:
            inputs = [_inputs(layer, slots) for slots in behind[start : start + batch]]
            half = _Batch.of(layer, some, inputs).half(storages, dtype)
            codes = {**half.codes, "down": gptq(half.down, half.seen, storages["down"], dtype)}
        for name in storages:
            found[name].append(codes[name])
    return {name: Codes.joined(parts) for name, parts in found.items()}


def held_out_errors(layer: LayerView, widths: Sequence[Width], *, dtype: torch.dtype) -> torch.Tensor:
    """Return what each expert adds to the layer's error in some widths, on tokens that it was not fitted on.

    Squared errors a token, float64 [E, widths]; zeros for experts that no token reached.

    Args:
        layer: the layer.
        widths: which.
        dtype: of the scales.
    """
    found, batch = torch.zeros(layer.num_experts, len(widths), dtype=torch.float64), _batch(layer)
    # What is measured: by how gate and up lie, by how the down projection does, the widths that it tells of.
    halves: dict[Width, dict[Width, list[int]]] = {}
    for at, width in enumerate(widths):
        told_by = _measured(width)
        halves.setdefault(replace(told_by, down=0), {}).setdefault(told_by, []).append(at)
    for start in range(0, layer.num_experts, batch):
        numbers = range(start, min(start + batch, layer.num_experts))
        matrices = {name: stack.float() for name, stack in layer.experts.matrices(numbers).items()}
        inputs = [_inputs(layer, {expert: 1.0}, held_out_too=False) for expert in numbers]
        together, judges = _Batch.of(layer, matrices, inputs), [_Judge.of(layer, expert) for expert in numbers]
        biases = matrices.get("down_bias", [None] * len(judges))
        for like, measured in halves.items():
            half = together.half(like.storages(layer.shape), dtype)
            states = [half.states(layer, number, judge.x) for number, judge in enumerate(judges)]
            for width, told in measured.items():
                storage = width.storages(layer.shape)["down"]
                down = storage.numbers(gptq(half.down, half.seen, storage, dtype)).float()
                each = zip(judges, states, down, biases, strict=True)
                errors = [judge.error(F.linear(state, one, bias)) for judge, state, one, bias in each]
                for at in told:
                    found[numbers, at] = torch.tensor(errors, dtype=found.dtype) * 4.0 ** (width.bits - widths[at].bits)
    return found


def _measured(width: Width) -> Width:
    """Return the width whose errors say what those of another one are."""
    return replace(width, bits=WIDEST) if width.bits > WIDEST and not width.down else width


def _batch(layer: LayerView) -> int:
    """Return how many experts are computed together, each step of all at once: the more, the fewer the steps."""
    width, inner = layer.shape.width, layer.shape.intermediate
    tokens = len(layer.sample.key) * layer.top_k // layer.num_experts + width
    numbers = 4 * width**2 + 4 * inner**2 + 12 * width * inner + tokens * (width + 2 * inner)
    return max(1, working_nbytes(layer.experts.device) // (4 * numbers))


@dataclass(frozen=True, kw_only=True)
class _Half:
    """Experts of which all but the down projections are rounded.

    Attributes:
        codes: those of the matrices that are.
        matrices: all, with what the codes stand for.
        down: down projections for what they then give, [n, D, F].
        seen: what is known of that.
    """

    codes: Mapping[str, Codes]
    matrices: Matrices
    down: torch.Tensor
    seen: Seen

    def states(self, layer: LayerView, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection gets, [T, F]."""
        return layer.experts.hidden({name: part[number] for name, part in self.matrices.items()}, x)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Experts that are rounded together, and what does not depend on the width.

    Attributes:
        layer: the layer.
        matrices: theirs, stacked.
        inputs: of each, [T, D], and what an error weighs there, [T].
        given: what the down projection of each gets, [T, F].
        seen: what is known of the inputs.
    """

    layer: LayerView
    matrices: Matrices
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    given: Sequence[torch.Tensor]
    seen: Seen

    @classmethod
    def of(cls, layer: LayerView, matrices: Matrices, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Batch:
        each = [{name: part[number] for name, part in matrices.items()} for number in range(len(inputs))]
        given = [layer.experts.hidden(own, x) for own, (x, _) in zip(each, inputs, strict=True)]
        seen = Seen.of(torch.stack([_moment(x, x, weight) for x, weight in inputs]))
        return cls(layer=layer, matrices=matrices, inputs=inputs, given=given, seen=seen)

    def half(self, storages: Mapping[str, Integers], dtype: torch.dtype) -> _Half:
        """Round gate and up projections, and fit down projections to what they then give.

        Args:
            storages: how each matrix lies; gate and up alike.
            dtype: of the scales.
        """
        names, down, storage = self.layer.experts.inputs, self.matrices["down"], storages["up"]
        # They have the same inputs, so their outputs are as those of one matrix.
        both = gptq(torch.cat([self.matrices[name] for name in names], 1), self.seen, storage, dtype)
        codes = dict(zip(names, both.split(len(names)), strict=True))
        rounded = dict(self.matrices) | {name: storage.numbers(part).float() for name, part in codes.items()}
        own, cross = (down.new_empty(len(down), down.shape[2], down.shape[2]) for _ in range(2))
        for number, (x, weight) in enumerate(self.inputs):
            now = self.layer.experts.hidden({name: part[number] for name, part in rounded.items()}, x)
            own[number], cross[number] = _moment(now, now, weight), _moment(self.given[number], now, weight)
        return _Half(codes=codes, matrices=rounded, down=_refitted(down, own, cross), seen=Seen.of(own))


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Tokens that judge an expert.

    Attributes:
        x: inputs, [T, D].
        weight: what an error weighs there, [T, 1].
        y: the expert's outputs, [T, D].
        part: what a constant in its place loses there, or its energy.
        whole: the same on all tokens of the calibration, for each of these.
    """

    x: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    part: float
    whole: float

    @classmethod
    def of(cls, layer: LayerView, expert: int) -> _Judge:
        token, gate = layer.routed(expert)
        weight, sums = gate.double().square(), layer.sums
        if len(token) < FEW and sums.count[expert]:
            token, weight = _tokens(layer, {expert: 1.0})
        weight = weight[:, None].to(layer.experts.device)
        y = layer.outputs(expert, token).double()
        judged = held_out(token)
        if int(judged.sum()) < FEW:  # all judge, and all say what the constant is
            judged = torch.ones_like(judged)
        fitted = ~judged if not bool(judged.all()) else judged
        mean = (weight * y)[fitted].sum(0) / weight[fitted].sum().clamp_min(1e-300)
        x, weight, y = layer.sample.hidden[token[judged]].float().to(weight.device), weight[judged], y[judged]
        part, whole = float((weight * (y - mean).square()).sum()), float(constant_errors(sums)[expert])
        energy, energies = float((weight * y.square()).sum()), float(sums.gate_sq_norm_sq[expert] / sums.tokens)
        if min(part * energies, whole * energy) <= ALIKE * energy * energies:
            part, whole = energy, energies
        return cls(x=x, weight=weight, y=y, part=part, whole=whole)

    def error(self, given: torch.Tensor) -> float:
        """Return the squared error of some outputs, for each token of the calibration."""
        return self.whole * float((self.weight * (self.y - given.double()).square()).sum()) / max(self.part, 1e-300)


def _inputs(
    layer: LayerView, slots: Mapping[int, float], *, held_out_too: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of an expert, float32 [T, D], and what an error of its output weighs there, [T]; see `_tokens`."""
    token, weight = _tokens(layer, slots, held_out_too=held_out_too)
    device = layer.experts.device
    return layer.sample.hidden[token].float().to(device), weight.float().to(device)


def _tokens(
    layer: LayerView, slots: Mapping[int, float], *, held_out_too: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens that say what an expert gets, as places in the sample, and what its error weighs there, [T].

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
    sample = layer.sample
    missing = min(sample.hidden.shape[1] - len(token), len(sample.hidden))
    if missing > 0:
        spread = torch.arange(missing) * len(sample.hidden) // missing
        token = torch.cat([token, spread])
        weight = torch.cat([weight, sample.gate.double().square().mean().expand(missing)])
    return token, weight


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
    factor = torch.linalg.cholesky(own + ridge)
    return torch.cholesky_solve((down @ (cross + ridge)).transpose(1, 2), factor).transpose(1, 2)
