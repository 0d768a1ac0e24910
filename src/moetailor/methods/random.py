"""Random pruning: the floor that every method must stand above.

Published: a baseline of many papers; the experts of each layer that stay are drawn at random.

Here: the same, by seed and layer, so that a plan can be made again.
"""

import torch

from moetailor.methods.choose import drop_lowest
from moetailor.methods.registry import method
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@method("random")
def random(layer: LayerView, keep: int, *, seed: int = 0) -> LayerPlan:
    """Drop experts drawn at random.

    The draw depends on the seed and the layer only; report several seeds.

    Args:
        layer: the layer.
        keep: experts that stay.
        seed: another seed draws other experts.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + layer.index)
    return drop_lowest(layer, torch.rand(layer.num_experts, generator=generator), keep)
