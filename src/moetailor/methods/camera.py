"""CAMERA-P: narrow experts: of each, the neurons that give most (arXiv:2508.02322).

Published: what is removed is a micro-expert: a neuron j of an expert i, its rows of gate and up with its column w_ij of
down. It counts for the energy of what it gives, h_ij being what the down projection is applied to:

    E_ij = |w_ij|^2 ((1 - a) sum_t (g_ti h_tij)^2 + a max_t (g_ti h_tij)^2)

The least of all experts of a layer go together, so widths differ from expert to expert, and layers are taken in turn,
each on what the ones before it give. Formula and a = 0.9 are those of the released code (commit 4f3ddd6); the full text
was not at hand.

Here: the same energy, ranked within each expert: all of a layer keep as many neurons. So the result is an ordinary
checkpoint with a smaller width of experts (format narrow), where config.json has an entry for that width alone. Layers
are taken on the original's inputs; in turn with `moetailor apply --propagate compressed`. Where fewer than two sampled
tokens for each dimension reached an expert, others join with little weight. And with `refit`, which is not from the
paper, the down projection is fitted to what all neurons gave, in closed form; neurons are then chosen by what their
absence costs after such a fit, as Optimal Brain Surgeon has it, one at a time:

    |w_j|^2 / (C^-1)_jj, with C = sum_t g_t^2 h_t h_t^T and w_j as the fit to those that are left has it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.answers import Narrow
from moetailor.answers.narrow import cut
from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError
from moetailor.fitting.averages import stacked
from moetailor.fitting.neurons import energies, fitted_down, least_missed
from moetailor.fitting.tokens import tokens_of
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work


@register
@dataclass(frozen=True, kw_only=True)
class Camera(Method):
    """Keep every expert with the neurons that give most, as many in each: narrower experts, native.

    Attributes:
        peak: share of a neuron's largest output in its energy, beside that of the sum over tokens.
        refit: fit the down projection to what all neurons gave.
        multiple: neurons are a multiple of this; grouped kernels run no others in 16 bits than multiples of 8.
    """

    peak: Annotated[float, AtLeast(0)] = 0.9
    refit: bool = False
    multiple: Annotated[int, AtLeast(1)] = 8

    name = "camera"
    paper = "arXiv:2508.02322"
    replaces_with = Narrow
    reads_weights = True
    builds = frozenset({"narrow"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peak > 1:
            raise PlanError(f"peak={self.peak}: at 1 the largest output alone counts; give a number from 0 to 1")

    @property
    def decides_counts(self) -> bool:
        """Always: every expert stays."""
        return True

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Keep as many neurons of each expert as fit into the bytes."""
        every, width = layer.num_experts, layer.shape.intermediate
        if not layer.nbytes:
            return self._of(every, width, width * keep // every)
        one, two = (answers_nbytes([Narrow(neurons)] * every, layer.shape, layer.dtype) for neurons in (1, 2))
        return self._of(every, width, 1 + (layer.nbytes - one) // (two - one))

    def _of(self, experts: int, width: int, neurons: int) -> LayerPlan:
        """Return the plan with so many neurons, rounded down; where all stay, that which changes nothing."""
        if neurons >= width:
            return untouched(experts)
        return LayerPlan(slots=(Narrow(max(neurons // self.multiple, 1) * self.multiple),) * experts)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the narrow experts."""
        narrow = plan.of(Narrow)
        experts = (self._narrowed(layer, expert, answer.neurons) for expert, answer in narrow.items())
        return {f"narrow_{name}": stack for name, stack in stacked(experts, len(narrow)).items()}

    def _narrowed(self, layer: LayerView, expert: int, neurons: int) -> dict[str, torch.Tensor]:
        tokens, matrices = tokens_of(layer, {expert: 1.0}), layer.experts.expert(expert)
        inputs = layer.inputs(tokens.place)
        hidden = layer.experts.hidden(matrices, inputs).to(inputs)
        if self.refit:
            kept = least_missed(hidden, tokens.weight, matrices["down"], neurons)
        else:
            energy = energies(hidden, tokens.weight, matrices["down"], self.peak)
            kept = energy.argsort(descending=True, stable=True)[:neurons].sort().values
        found = cut(matrices, kept)
        if self.refit:
            found["down"] = fitted_down(layer, expert, tokens, matrices, hidden, kept)
        return found

    def work(self, layer: LayerSize) -> Work:
        """Nothing: neurons are chosen when the plan is applied."""
        return Work()

    def estimate_of(self, stack: Stack, keep: int, groups: int = 1) -> LayerPlan:
        """Return narrow experts in the bytes of those that are kept."""
        width = stack.shape.intermediate if stack.shape else 1
        return self._of(stack.num_experts, width, width * keep // stack.num_experts)
