"""EASY-EP: gated output norms, weighted by how far the experts turn the residual stream.

Published: an expert's importance is the sum over its tokens of gate times output norm times the token's own weight,
one minus the cosine between the residual stream before and after the routed experts are added: tokens that the experts
hardly turn count little. Few demonstrations of one domain are enough.

Here: the same, with the residual stream taken where it leaves the decoder layer, once as it is and once with the
routed experts silenced. So it holds for every family, whatever it norms, scales or adds on the way; what shared experts
give is in both. Calibration records it when asked: `moetailor calibrate --residual`, which `moetailor compress` does by
itself. For several domains at once the paper averages normalised scores; here their texts are mixed.
"""

from dataclasses import dataclass

from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class EasyEP(Method):
    """Drop the experts with the smallest gated outputs on tokens whose residual stream the experts turn."""

    name = "easy_ep"
    needs = frozenset({"gated_norm_shift"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        # I_e = sum_t g_e(t) |f_e(x_t)| max(0, 1 - cos(h_t, h~_t))
        assert layer.sums.gated_norm_shift is not None
        return drop_lowest(layer, layer.sums.gated_norm_shift, keep)
