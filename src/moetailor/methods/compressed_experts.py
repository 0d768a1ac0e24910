"""Compressed Experts: of a token's experts only the main ones run, the others modulate them (arXiv:2503.00634).

Published: of the top-k, the half with the larger gates run; each of the others has three vectors, and their
gate-weighted mean scales the inputs of the three matrices of the experts that do run. Vectors start at one and are
trained together with everything else. The released code stores rows as wide as the model, so that an expert must not be
wider, and keeps the gates of the main experts as they are.

Here: the same by default, with each vector as wide as what it scales, stored as the difference from one, so that the
start is the plain half and stays so after loading. Nothing is removed unless asked for: the result has fewer active
parameters, not fewer stored ones. Beyond it, by parameters: fewer main experts for tokens whose gates are uneven, main
gates that sum to all, and what auxiliary experts give themselves, which needs no training: a constant, or an affine map
of low rank. An expert j is fitted on the sampled tokens where it is auxiliary, aside_j, in closed form:

    min over c, A, B of sum_(t in aside_j) g_tj^2 |f_j(x_t) - c - x_t A B|^2

Experts that are removed become novices, or maps of the same rank, that are always auxiliary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.answers import Auxiliary, Constant, Linear
from moetailor.answers.auxiliary import Vectors
from moetailor.fitting.constants import constants
from moetailor.fitting.linear_maps import build_maps, map_of_rank, map_on
from moetailor.fitting.tokens import among_others
from moetailor.methods.choose import top
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class CompressedExperts(Method):
    """Run only the main experts of each token; the others modulate them, or give constants or maps of low rank.

    Attributes:
        main: experts of a token that run; 0 for half of the router's (paper).
        share: fewer run once their gates have this share of all the token's gates.
        renormalise: scale the gates of the main experts to the sum of all.
        vectors: one set for each ``expert`` (paper), one for the whole ``layer`` (a control) or ``none``.
        constants: an auxiliary expert gives the mean of what it gave where it was auxiliary.
        rank: an auxiliary expert gives an affine map of this rank, fitted where it was auxiliary; 0 for none.
        ridge: pull of that regression towards 0, as a share of the mean variance of the inputs.
    """

    main: Annotated[int, AtLeast(0)] = 0
    share: Annotated[float, AtLeast(0)] = 1.0
    renormalise: bool = False
    vectors: Vectors = "expert"
    constants: bool = False
    rank: Annotated[int, AtLeast(0)] = 0
    ridge: Annotated[float, AtLeast(0)] = 0.01

    name = "compressed_experts"
    paper = "arXiv:2503.00634"
    replaces_with = Constant
    needs = frozenset({"count", "gate_sq", "gate_sq_output"})
    reads_weights = True
    useful_whole = True
    trained = True
    scores = False
    builds = frozenset({"constant", "linear", "auxiliary"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Make those that are main least often novices, and the others auxiliary unless main."""
        main = self.main or max(1, layer.top_k // 2)
        # Of those that are never main, the ones that no token reached go first.
        worth = torch.maximum(_main_gates(layer, main), layer.sums.count * 1e-300)
        return self._slots(main, top(layer, worth, keep), layer.num_experts)

    def _slots(self, main: int, kept: Collection[int], experts: int) -> LayerPlan:
        constants = self.constants or self.rank > 0
        split = Auxiliary(main, self.share, self.renormalise, self.vectors, constants, self.rank)
        return LayerPlan(slots=tuple(split if slot in kept else map_of_rank(self.rank) for slot in range(experts)))

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the vectors at zero, what auxiliary experts give, and what stands in for removed ones."""
        declared = plan.slot_map().tensors(layer.shape)
        built = {name: torch.zeros(spec.shape) for name, spec in declared.items() if name.startswith("auxiliary_")}
        if split := next(iter(plan.of(Auxiliary).values()), None):
            aside_NK = _aside(layer, split, plan.pool)
            built |= {name: rows for name, rows in self._given(layer, plan, aside_NK).items() if name in declared}
        return built | (build_maps(layer, plan, self.ridge) if plan.of(Constant) or plan.of(Linear) else {})

    def _given(self, layer: LayerView, plan: LayerPlan, aside_NK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the constants of auxiliary experts and both factors of their maps, see `Auxiliary`.

        Args:
            layer: the layer.
            plan: of it.
            aside_NK: which choices of the sampled tokens are auxiliary.
        """
        found, inputs, outputs = constants(layer.sums), [], []
        for expert in plan.pool:
            mine_NK = layer.sample.index == expert
            # One that is never auxiliary gives there what it gives at all.
            token, place = (mine_NK & aside_NK if bool((mine_NK & aside_NK).any()) else mine_NK).nonzero().unbind(1)
            if not len(token):
                inputs.append(torch.zeros(self.rank, layer.shape.width))
                outputs.append(inputs[-1])
                continue
            tokens = among_others(layer, token, layer.sample.gate[token, place].double().square())
            found[expert], inner, outer = map_on(layer, expert, tokens, self.rank, self.ridge)
            inputs.append(inner)
            outputs.append(outer)
        built = {"auxiliary_constant": found[plan.kept_slots]}
        return built | {"auxiliary_in": torch.cat(inputs), "auxiliary_out": torch.cat(outputs)}

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return slots that are auxiliary unless main, and novices or maps."""
        return self._slots(self.main or 1, range(keep), experts)


def _main_gates(layer: LayerView, main: int) -> torch.Tensor:
    """Return the sum of gates of each expert over the sampled tokens where it is main, float64 [E]."""
    gate, order = layer.sample.gate.sort(dim=1, descending=True, stable=True)
    index = layer.sample.index.gather(1, order).long()
    total = torch.zeros(layer.num_experts, dtype=torch.float64)
    return total.index_add(0, index[:, :main].flatten(), gate[:, :main].flatten().double())


def _aside(layer: LayerView, split: Auxiliary, pool: Collection[int]) -> torch.Tensor:
    """Return which choices of the sampled tokens are auxiliary, bool [N, K].

    Args:
        layer: the layer.
        split: how its slots are split.
        pool: experts that are left.
    """
    gate_NK, order = layer.sample.gate.sort(dim=1, descending=True, stable=True)
    able_NK = torch.isin(layer.sample.index.gather(1, order).long(), torch.tensor(sorted(pool)))
    aside_NK = able_NK & ~split.mains(able_NK, gate_NK)
    return torch.zeros_like(aside_NK).scatter(1, order, aside_NK)
