"""Linear stand-ins: a removed expert becomes an affine map of low rank of the layer's input.

Not from a paper; a twin that was found independently is published as arXiv:2610.41366, whose text was not at hand when
this was written. A novice (MoNE) is the map of rank 0. An expert e is replaced by S_e(x) = c_e + (x - m_e) A_e B_e with
A_e [D, r] and B_e [r, D], the best in the layer's own loss sum_t g_e(t)^2 |E_e(x_t) - S_e(x_t)|^2: weighted
reduced-rank regression on the sampled tokens that are routed to e. Stored are 2 r D + D numbers.

The experts that such a map replaces worst stay. With `ranks=chosen` each expert of a layer is kept or gets a rank of
its own, so that the error on held-out tokens is least at the bytes that the given rank would have taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from moetailor import answers
from moetailor.answers import Keep
from moetailor.errors import PlanError
from moetailor.fitting.linear_maps import build_maps, held_out_errors, map_error, map_of_rank
from moetailor.fitting.menu import Menu, cheapest
from moetailor.fitting.work import of_held_out_maps, of_map
from moetailor.methods.choose import refuse_protected, top
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@register
@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    """Replace the experts that low-rank linear maps of the layer's input answer for best by such maps.

    Attributes:
        rank: rank of the maps; 0 is the optimal novice.
        ranks: ``given`` uses that rank everywhere; ``chosen`` keeps an expert or chooses its rank by the error on
            held-out tokens, in no more bytes than the kept experts and maps of `rank` take.
        ridge: pull of the regression towards 0, as a share of the mean variance of the inputs.
        shrinkage: pulls each map towards the layer's mean output as if that many tokens had given it.
        shared: store one input factor for all maps of the layer.
    """

    rank: Annotated[int, AtLeast(0)] = 8
    ranks: Literal["given", "chosen"] = "given"
    ridge: Annotated[float, AtLeast(0)] = 0.01
    shrinkage: Annotated[float, AtLeast(0)] = 0.0
    shared: bool = False

    name = "linear"
    replaces_with = answers.Linear
    needs = frozenset({"tokens", "count", "gate_sq", "gate_sq_output", "gate_sq_norm_sq"})
    reads_weights = True
    builds = frozenset({"constant", "linear"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Keep the experts that maps of the rank replace worst."""
        nbytes = answers_nbytes([map_of_rank(self.rank)], layer.shape, layer.dtype)
        if nbytes >= layer.expert_bytes:
            raise PlanError(
                f"rank={self.rank}: such a map takes {nbytes:,} bytes, an expert of layer {layer.index} "
                f"{layer.expert_bytes:,}; ask for a lower rank"
            )
        if self.ranks == "chosen":
            return self._chosen(layer, keep)
        experts = range(layer.num_experts)
        scores = torch.tensor([map_error(layer, expert, self.rank, self.ridge) for expert in experts])
        answer = map_of_rank(self.rank, self.shared)
        return keep_only(layer.num_experts, top(layer, scores, keep), answer, scores.tolist())

    def _chosen(self, layer: LayerView, keep: int) -> LayerPlan:
        """Return the plan with the least held-out error in the bytes of `keep` experts and maps of the rank."""
        refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
        ranks = self._ranks(layer)
        nbytes = {rank: answers_nbytes([map_of_rank(rank)], layer.shape, layer.dtype) for rank in RANKS}
        # A row of one factor: the two of a rank, without the constant.
        row = (nbytes[1] - nbytes[0]) // 2
        spare = layer.nbytes - (self.rank * row if self.shared else 0)
        price = [nbytes[rank] - (rank * row if self.shared else 0) for rank in ranks]

        def measure(experts: Sequence[int]) -> torch.Tensor:
            return torch.stack([held_out_errors(layer, expert, ranks, self.ridge) for expert in experts])

        errors = layer.each_expert(self._what(ranks), measure)
        menu = Menu(errors=errors, price=price, expert_nbytes=layer.expert_bytes, must_keep=layer.protected)
        (entries,) = cheapest([menu], spare)
        slots = tuple(Keep() if at == len(ranks) else map_of_rank(ranks[at], self.shared) for at in entries)
        return LayerPlan(slots=slots, scores=tuple(errors[:, 0].tolist()))

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Fit the maps."""
        return build_maps(layer, plan, self.ridge, self.shrinkage)

    def kept_under(self, layer: LayerView) -> Mapping[str, Any] | None:
        """Return the ranks that are tried where they are chosen, and the ridge."""
        return self._what(self._ranks(layer)) if self.ranks == "chosen" else None

    def _what(self, ranks: Sequence[int]) -> dict[str, Any]:
        return {"ranks": ranks, "ridge": self.ridge}

    def _ranks(self, layer: LayerView) -> list[int]:
        """Return the ranks of maps that are smaller than an expert."""
        # A shared factor is paid for once, whatever is chosen: as wide as the given rank.
        tried = [rank for rank in RANKS if not self.shared or rank <= self.rank]
        nbytes = {rank: answers_nbytes([map_of_rank(rank)], layer.shape, layer.dtype) for rank in tried}
        return [rank for rank in tried if nbytes[rank] < layer.expert_bytes]

    def work(self, layer: LayerSize) -> Work:
        """Return the work of a map for each expert, or of all ranks for its folds."""
        if self.ranks == "given" and not self.rank:
            return Work()
        each = of_map(layer, self.rank) if self.ranks == "given" else of_held_out_maps(layer, RANKS[-1])
        return layer.experts * each

    def building(self, layer: LayerSize, plan: LayerPlan) -> Work | None:
        """Return the work of the maps; of a shared factor nobody has counted it."""
        maps = plan.of(answers.Linear)
        if any(answer.shared for answer in maps.values()):
            return None
        return sum((of_map(layer, answer.rank) for answer in maps.values()), Work())

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return kept experts and maps of the rank."""
        return keep_only(experts, range(keep), map_of_rank(self.rank, self.shared))
