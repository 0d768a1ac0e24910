"""SEER-MoE: heavy hitters counting, the first of its two stages.

Published: experts are ranked by how often they are activated, hard (tokens routed to them) or soft (the sum of the
router's probabilities), in each layer or over the whole model. In a second stage the model is tuned with a penalty on
the entropy of the router, so that fewer experts a token are enough.

Here: the counting, from the abstract: the full text was not at hand. An expert that no token reached counts 0, whatever
its probabilities sum to: a router can find it likely for every token and choose others each time. Counts are shares of
their layer, so that layers compare. Over the whole model every layer keeps the top-k that its router needs, and the
result is native only if all layers happen to keep as many. The second stage is left to `moetailor recover`, without the
penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moetailor.errors import PlanError
from moetailor.methods.choose import drop_lowest, global_keeps
from moetailor.methods.method import JointMethod
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class SeerMoE(JointMethod):
    """Drop the experts that the router favours least.

    Attributes:
        count: ``soft`` sums the router's probabilities over all tokens, ``hard`` counts the tokens routed to an expert.
        ranking: ``layer`` keeps as many in each, ``global`` the best of all layers together, at least top-k in each.
    """

    count: Literal["soft", "hard"] = "soft"
    ranking: Literal["layer", "global"] = "layer"

    name = "seer_moe"
    paper = "arXiv:2404.05089"
    needs = frozenset({"count", "probability"})

    @property
    def decides_counts(self) -> bool:
        """Whether the ranking is one of all layers."""
        return self.ranking == "global"

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide for all layers, from their counts."""
        if self.ranking == "global" and (limited := [layer for layer in layers if layer.groups > 1]):
            raise PlanError(
                f"ranking=global: layer {limited[0].index} chooses among {limited[0].groups} groups, of which the same "
                "number must stay; use ranking=layer"
            )
        # S_e = N_e, or S_e = sum_t p_e(t), 0 where N_e = 0
        sums = [layer.sums for layer in layers]
        scores = [some.count if self.count == "hard" else some.probability * (some.count > 0) for some in sums]
        if self.ranking == "global":
            keeps = global_keeps(layers, scores, keeps)
        for layer, score, keep in zip(layers, scores, keeps, strict=True):
            yield drop_lowest(layer, score, keep)
            layer.close()
