"""Frequency pruning, hard and soft (the baselines of arXiv:2510.13999).

Published: keep the experts that most tokens are routed to, or those with the largest sum of gates.

Here: the same, on the routing that the model really did: indices and gates are taken where the experts are called, so
routers with biases, groups or sigmoids count as they choose.
"""

from moetailor.methods.choose import drop_lowest
from moetailor.methods.registry import method
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@method("frequency", paper="arXiv:2510.13999", needs={"count"})
def frequency(layer: LayerView, keep: int) -> LayerPlan:
    """Drop the experts that the fewest tokens are routed to."""
    # S_e = N_e
    return drop_lowest(layer, layer.sums.count, keep)


@method("soft_frequency", paper="arXiv:2510.13999", needs={"gate"})
def soft_frequency(layer: LayerView, keep: int) -> LayerPlan:
    """Drop the experts with the smallest sum of gates."""
    # S_e = sum over the tokens routed to e of g_e
    return drop_lowest(layer, layer.sums.gate, keep)
