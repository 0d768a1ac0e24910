"""What experts in few bits add to their layer's error: each rounded on most of its tokens, judged on the others.

Shapes: n experts, E experts of a layer, T tokens, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from moetailor.answers import Width
from moetailor.checkpoint.devices import in_batches
from moetailor.checkpoint.storage import Codebook, FewBits, Integers
from moetailor.fitting.constants import constant_errors
from moetailor.fitting.gptq import gptq
from moetailor.fitting.held_out import held_out
from moetailor.fitting.tokens import ROUNDED, tokens_of
from moetailor.fitting.widths import Together, at_once, inputs_of
from moetailor.planning.view import LayerView

# The fewest held-out tokens that judge an expert, and the share of its energy that a constant must lose to measure by:
# where it loses less, the tokens were all alike.
FEW, ALIKE = 8, 1e-3
# Wider integers are not measured, as each bit more takes a quarter of the noise, nor wider codebooks, whose noise is
# that of their tables.
WIDEST: dict[type[FewBits], int] = {Integers: 5, Codebook: 2}


def held_out_errors(
    layer: LayerView, experts: Sequence[int], widths: Sequence[Width], *, dtype: torch.dtype
) -> torch.Tensor:
    """Return what some experts add to the layer's error in some widths, on tokens that they were not fitted on.

    Squared errors a token, float64 [n, widths]; zeros for experts that no token reached. Few widths are measured: what
    rounding gate and up adds, and what rounding the down projection then adds, go as the noise of their storages.

    Args:
        layer: the layer.
        experts: which.
        widths: which.
        dtype: of the scales.
    """
    parts = [_Parts.of(width.storages(layer.shape)) for width in widths]
    halves: dict[FewBits, list[FewBits]] = {part.gate_by: [] for part in parts}
    for part in parts:
        halves.setdefault(part.down_after, []).append(part.down_by)

    def work(numbers: Sequence[int]) -> torch.Tensor:
        found = torch.zeros(len(numbers), len(widths), dtype=torch.float64)
        matrices = {name: stack.float() for name, stack in layer.experts.matrices(numbers).items()}
        inputs = [inputs_of(layer, {expert: 1.0}, held_out_too=False) for expert in numbers]
        together, judges = Together.of(layer, matrices, inputs), [Judge.of(layer, expert) for expert in numbers]
        biases = matrices.get("down_bias", [None] * len(judges))
        alone: dict[FewBits, torch.Tensor] = {}
        more: dict[tuple[FewBits, FewBits], torch.Tensor] = {}
        for gate, downs in halves.items():
            half = together.half({name: gate for name in layer.experts.inputs}, dtype)
            states = [half.states(layer, number, judge.x) for number, judge in enumerate(judges)]
            alone[gate] = _errors(judges, states, half.down, biases)
            for down in dict.fromkeys(downs):
                codes = gptq(half.down, half.seen, down, dtype)
                rounded = down.numbers(codes, layer.shape.intermediate).float()
                more[gate, down] = (_errors(judges, states, rounded, biases) - alone[gate]).clamp_min(0)
        for at, part in enumerate(parts):
            gates = part.gate.noise / part.gate_by.noise * alone[part.gate_by]
            downs = part.down.noise / part.down_by.noise * more[part.down_after, part.down_by]
            found[:, at] = gates + downs
        return found

    return torch.cat(list(in_batches(experts, at_once(layer), work)))


def _errors(
    judges: Sequence[Judge],
    states: Sequence[torch.Tensor],
    down: torch.Tensor,
    biases: Sequence[torch.Tensor | None] | torch.Tensor,
) -> torch.Tensor:
    """Return what each expert adds to the layer's error with some down projections, [n, D, F], float64 [n]."""
    each = zip(judges, states, down, biases, strict=True)
    errors = [judge.error(F.linear(state, own, bias)) for judge, state, own, bias in each]
    return torch.tensor(errors, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """By which storages it is measured what a width adds.

    Attributes:
        gate: that of gate and up.
        gate_by: the one that is measured for it.
        down: that of the down projection.
        down_by: the one that is measured for it.
        down_after: that of gate and up in this measurement.
    """

    gate: FewBits
    gate_by: FewBits
    down: FewBits
    down_by: FewBits
    down_after: FewBits

    @classmethod
    def of(cls, storages: Mapping[str, FewBits]) -> _Parts:
        gate, down = storages["up"], storages["down"]
        gate_by, down_by = measured_by(gate), measured_by(down)
        after = gate_by if type(gate) is type(down) else down_by
        return cls(gate=gate, gate_by=gate_by, down=down, down_by=down_by, down_after=after)


def measured_by(storage: FewBits) -> FewBits:
    """Return the storage whose errors say what those of another one of its kind are."""
    return replace(storage, bits=min(storage.bits, WIDEST.get(type(storage), storage.bits)))


@dataclass(frozen=True, kw_only=True)
class Judge:
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
    def of(cls, layer: LayerView, expert: int) -> Judge:
        """Return it for one expert: its held-out tokens, or all where they are too few."""
        tokens, sums = tokens_of(layer, {expert: 1.0}, ROUNDED), layer.sums
        weight = tokens.weight[:, None].to(layer.experts.device)
        y = layer.outputs(expert, tokens.place).double()
        judged = held_out(tokens.place)
        if int(judged.sum()) < FEW:  # all judge, and all say what the constant is
            judged = torch.ones_like(judged)
        fitted = ~judged if not bool(judged.all()) else judged
        mean = (weight * y)[fitted].sum(0) / weight[fitted].sum().clamp_min(1e-300)
        x, weight, y = layer.inputs(tokens.place[judged]).float(), weight[judged], y[judged]
        part, whole = float((weight * (y - mean).square()).sum()), float(constant_errors(sums)[expert])
        energy, energies = float((weight * y.square()).sum()), float(sums.gate_sq_norm_sq[expert] / sums.tokens)
        if min(part * energies, whole * energy) <= ALIKE * energy * energies:
            part, whole = energy, energies
        return cls(x=x, weight=weight, y=y, part=part, whole=whole)

    def error(self, given: torch.Tensor) -> float:
        """Return the squared error of some outputs, for each token of the calibration."""
        return self.whole * float((self.weight * (self.y - given.double()).square()).sum()) / max(self.part, 1e-300)
