"""MAN and MSAN pruning: gate-free mean activation norms (arXiv:2606.15716).

Published: keep the experts with the largest mean norm, or mean squared norm, of their outputs on the tokens routed to
them; gates do not enter.

Here: the same, from the abstract: the full text was not at hand.
"""

from dataclasses import dataclass

from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Man(Method):
    """Drop the experts whose outputs are smallest on the tokens routed to them.

    An expert that no token reached scores 0.
    """

    name = "man"
    paper = "arXiv:2606.15716"
    needs = frozenset({"count", "norm"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # S_e = sum |f_e(x)| / N_e
        return drop_lowest(layer, layer.mean("norm"), keep)


@register
@dataclass(frozen=True, kw_only=True)
class Msan(Method):
    """Drop the experts whose outputs have the smallest mean squared norm on the tokens routed to them."""

    name = "msan"
    paper = "arXiv:2606.15716"
    needs = frozenset({"count", "norm_sq"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # S_e = sum |f_e(x)|^2 / N_e
        return drop_lowest(layer, layer.mean("norm_sq"), keep)
