"""MAN and MSAN pruning: gate-free mean activation norms (arXiv:2606.15716).

Published: keep the experts with the largest mean norm, or mean squared norm, of their outputs on the tokens routed to
them; gates do not enter.

Here: the same, from the abstract: the full text was not at hand.
"""

from moetailor.methods.choose import drop_lowest
from moetailor.methods.registry import method
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@method("man", paper="arXiv:2606.15716", needs={"count", "norm"})
def man(layer: LayerView, keep: int) -> LayerPlan:
    """Drop the experts whose outputs are smallest on the tokens routed to them.

    An expert that no token reached scores 0.
    """
    # S_e = sum |f_e(x)| / N_e
    return drop_lowest(layer, layer.mean("norm"), keep)


@method("msan", paper="arXiv:2606.15716", needs={"count", "norm_sq"})
def msan(layer: LayerView, keep: int) -> LayerPlan:
    """Drop the experts whose outputs have the smallest mean squared norm on the tokens routed to them."""
    # S_e = sum |f_e(x)|^2 / N_e
    return drop_lowest(layer, layer.mean("norm_sq"), keep)
