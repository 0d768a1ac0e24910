"""Frequency pruning, hard and soft (the baselines of arXiv:2510.13999).

Published: keep the experts that most tokens are routed to, or those with the largest sum of gates.

Here: the same, on the routing that the model really did: indices and gates are taken where the experts are called, so
routers with biases, groups or sigmoids count as they choose.
"""

from dataclasses import dataclass

from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Frequency(Method):
    """Drop the experts that the fewest tokens are routed to."""

    name = "frequency"
    paper = "arXiv:2510.13999"
    needs = frozenset({"count"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # S_e = N_e
        return drop_lowest(layer, layer.sums.count, keep)


@register
@dataclass(frozen=True, kw_only=True)
class SoftFrequency(Method):
    """Drop the experts with the smallest sum of gates."""

    name = "soft_frequency"
    paper = "arXiv:2510.13999"
    needs = frozenset({"gate"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # S_e = sum over the tokens routed to e of g_e
        return drop_lowest(layer, layer.sums.gate, keep)
