"""REAP: router-weighted expert activation pruning (arXiv:2510.13999).

Published: keep the experts with the largest mean of gate times output norm over the tokens routed to them.

Here: the same, with the gate that the model used. The released code recomputes routing as softmax and top-k, which is
not what sigmoid, biased or group-limited routers do.
"""

from dataclasses import dataclass

from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Reap(Method):
    """Drop the experts whose gated output is smallest on the tokens routed to them.

    An expert that no token reached scores 0.
    """

    name = "reap"
    paper = "arXiv:2510.13999"
    needs = frozenset({"count", "gated_norm"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # S_e = sum_t g_te |f_e(x_t)| / N_e
        return drop_lowest(layer, layer.mean("gated_norm"), keep)
