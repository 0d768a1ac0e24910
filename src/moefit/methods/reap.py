"""REAP: router-weighted expert activation pruning (arXiv:2510.13999)."""

from moefit.methods.choose import drop_lowest
from moefit.methods.registry import method
from moefit.planning.slots import LayerPlan
from moefit.planning.view import LayerView


@method("reap", paper="arXiv:2510.13999", needs={"count", "gated_norm"})
def reap(layer: LayerView, keep: int) -> LayerPlan:
    """Drop the experts whose gated output is smallest on the tokens routed to them.

    An expert that no token reached scores 0.
    """
    # S_e = sum_t g_te |f_e(x_t)| / N_e
    return drop_lowest(layer, layer.mean("gated_norm"), keep)
