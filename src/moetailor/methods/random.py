"""Random pruning: the floor that every method must stand above.

Published: a baseline of many papers; the experts of each layer that stay are drawn at random.

Here: the same, by seed and layer, so that a plan can be made again.
"""

from dataclasses import dataclass

import torch

from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Drop experts drawn at random.

    The draw depends on the seed and the layer only; report several seeds.

    Attributes:
        seed: another seed draws other experts.
    """

    seed: int = 0

    name = "random"

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + layer.index)
        return drop_lowest(layer, torch.rand(layer.num_experts, generator=generator), keep)
