"""EAN pruning: expert activation norm (a baseline of arXiv:2510.13999).

Published: keep the experts with the largest sum of output norms over the tokens routed to them.

Here: the same, on the routing that the model really did.
"""

from dataclasses import dataclass

from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Ean(Method):
    """Drop the experts whose outputs have the smallest sum of norms."""

    name = "ean"
    paper = "arXiv:2510.13999"
    needs = frozenset({"norm"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # S_e = sum over the tokens routed to e of |f_e(x)|
        return drop_lowest(layer, layer.sums.norm, keep)
