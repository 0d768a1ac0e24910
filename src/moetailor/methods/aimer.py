"""AIMER: pruning without data, by how evenly an expert's weights are spread (arXiv:2603.18492).

Published: an expert's score is the mean of |w| over the root mean square of w, over the weights of all its matrices
together: 1 where all are as large as each other, less the more a few stand out. Experts with the largest scores go.

Here: the same, from the README and code of ZongfangLiu/AIMER (commit fcf8e28); of the paper only the abstract was at
hand. Plans hold the reciprocal, so that as with all methods the highest stay. Biases do not count. An expert of zeros
goes first, where the released code keeps it. A calibration says which model it is about and where its weights
are; nothing that was measured is read.
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
class Aimer(Method):
    """Drop the experts whose weights are most alike in size; no data is read."""

    name = "aimer"
    paper = "arXiv:2603.18492"
    reads_weights = True

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer."""
        return drop_lowest(
            layer, torch.stack([_unevenness(layer, expert) for expert in range(layer.num_experts)]), keep
        )


def _unevenness(layer: LayerView, expert: int) -> torch.Tensor:
    """Return 1 / AIMER of an expert, at least 1, float64 []."""
    weights = [matrix for matrix in layer.experts.expert(expert).values() if matrix.dim() == 2]
    # S_e = sqrt(sum w^2 / n) / (sum |w| / n)
    size = sum(matrix.numel() for matrix in weights)
    absolute = torch.stack([matrix.abs().sum(dtype=torch.float64) for matrix in weights]).sum()
    squares = torch.stack([matrix.float().square().sum(dtype=torch.float64) for matrix in weights]).sum()
    return (squares * size).sqrt() / absolute if absolute > 0 else torch.ones_like(absolute)
