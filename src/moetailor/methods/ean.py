"""EAN pruning: expert activation norm (a baseline of arXiv:2510.13999).

Published: keep the experts with the largest sum of output norms over the tokens routed to them.

Here: the same, on the routing that the model really did.
"""

from moetailor.methods.choose import drop_lowest
from moetailor.methods.registry import method
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@method("ean", paper="arXiv:2510.13999", needs={"norm"})
def ean(layer: LayerView, keep: int) -> LayerPlan:
    """Drop the experts whose outputs have the smallest sum of norms."""
    # S_e = sum over the tokens routed to e of |f_e(x)|
    return drop_lowest(layer, layer.sums.norm, keep)
