"""Compressed Experts: of a token's experts only the main ones run, the others modulate them (arXiv:2503.00634).

Published: of the top-k, the half with the larger gates run; each of the others has three vectors, and their
gate-weighted mean scales the inputs of the three matrices of the experts that do run. Vectors start at one and are
trained together with everything else. The released code stores rows as wide as the model, so that an expert must not be
wider, and keeps the gates of the main experts as they are.

Here: the same by default, with each vector as wide as what it scales, stored as the difference from one, so that the
start is the plain half and stays so after loading. Nothing is removed unless asked for: the result has fewer active
parameters, not fewer stored ones. Beyond it, by parameters: fewer main experts for tokens whose gates are uneven, main
gates that sum to all, and constants that auxiliary experts give, which needs no training. Experts that are removed
become novices that are always auxiliary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.answers import Auxiliary, Constant
from moetailor.answers.auxiliary import Vectors
from moetailor.fitting.constants import constants
from moetailor.methods.choose import top
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class CompressedExperts(Method):
    """Run only the main experts of each token, modulated by vectors of the others; made for recovery.

    Attributes:
        main: experts of a token that run; 0 for half of the router's (paper).
        share: fewer run once their gates have this share of all the token's gates.
        renormalise: scale the gates of the main experts to the sum of all.
        vectors: one set for each ``expert`` (paper), one for the whole ``layer`` (a control) or ``none``.
        constants: an auxiliary expert gives the mean of what it gave where it was auxiliary.
    """

    main: Annotated[int, AtLeast(0)] = 0
    share: Annotated[float, AtLeast(0)] = 1.0
    renormalise: bool = False
    vectors: Vectors = "expert"
    constants: bool = False

    name = "compressed_experts"
    paper = "arXiv:2503.00634"
    replaces_with = Constant
    needs = frozenset({"count", "gate_sq", "gate_sq_output"})
    reads_weights = True
    useful_whole = True
    trained = True
    builds = frozenset({"constant", "auxiliary"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Make those that are main least often novices, and the others auxiliary unless main."""
        main = self.main or max(1, layer.top_k // 2)
        # Of those that are never main, the ones that no token reached go first.
        worth = torch.maximum(_main_gates(layer, main), layer.sums.count * 1e-300)
        split, kept = self._split(main), top(layer, worth, keep)
        return LayerPlan(slots=tuple(split if slot in kept else Constant() for slot in range(layer.num_experts)))

    def _split(self, main: int) -> Auxiliary:
        return Auxiliary(main, self.share, self.renormalise, self.vectors, self.constants)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the vectors at zero, the constants of auxiliary experts, and the novices of removed ones."""
        declared = plan.slot_map().tensors(layer.shape)
        built = {name: torch.zeros(spec.shape) for name, spec in declared.items()}
        if "auxiliary_constant" in declared:
            built["auxiliary_constant"] = _aside(layer, next(iter(plan.of(Auxiliary).values())).main)[plan.kept_slots]
        if "constant" in declared:
            built["constant"] = constants(layer.sums)[list(plan.of(Constant))]
        return built

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return slots that are auxiliary unless main, and novices."""
        return LayerPlan(slots=(*(self._split(self.main or 1),) * keep, *(Constant(),) * (experts - keep)))


def _main_gates(layer: LayerView, main: int) -> torch.Tensor:
    """Return the sum of gates of each expert over the sampled tokens where it is main, float64 [E]."""
    gate, order = layer.sample.gate.sort(dim=1, descending=True, stable=True)
    index = layer.sample.index.gather(1, order).long()
    total = torch.zeros(layer.num_experts, dtype=torch.float64)
    return total.index_add(0, index[:, :main].flatten(), gate[:, :main].flatten().double())


def _aside(layer: LayerView, main: int) -> torch.Tensor:
    """Return N_j = sum g^2 y / sum g^2 over the sampled tokens where an expert is auxiliary, float64 [E, D]."""
    rank = layer.sample.gate.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    found = constants(layer.sums)
    for expert in range(layer.num_experts):
        token, place = ((layer.sample.index == expert) & (rank >= main)).nonzero().unbind(1)
        if len(token):
            weight = layer.sample.gate[token, place].double().square()[:, None]
            y = layer.outputs(expert, token).double().cpu()
            found[expert] = (weight * y).sum(0) / weight.sum().clamp_min(1e-300)
    return found
