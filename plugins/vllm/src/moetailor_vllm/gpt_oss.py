"""gpt-oss, whose model in vLLM finds tensors by the names of its parameters and passes over all others in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

from moetailor_vllm.answers import Arrivals
from moetailor_vllm.layers import SlotExperts


@PluggableLayer.register_oot(name="GptOssRoutedExperts")
class SlotGptOssExperts(SlotExperts, GptOssRoutedExperts):
    """The same for gpt-oss: its model finds a parameter without numbers under the name of each stored tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in self.answers.stored if self.answers else ():
            door = nn.Parameter(torch.empty(0), requires_grad=False)
            door.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            self.register_parameter(name, door)

    def _loader(self, name: str) -> Callable[[nn.Parameter, torch.Tensor], None]:
        return lambda door, tensor: self.answers and self.answers.load(name, tensor)

    def expect(self, arrivals: Arrivals, rows: int, width: int) -> None:
        """Fill the experts with NaN, padding with zeros: their weights come whole, past `weight_loader`."""
        super().expect(arrivals, 0, width)
        if not rows:
            return
        inner = self.moe_config.intermediate_size_per_partition_unpadded
        for name, weight in self.named_parameters(recurse=False):
            weight.data.zero_()
            outputs, inputs = (2 * inner, width) if name.startswith("w13") else (width, inner)
            weight.data[:, :outputs][..., : inputs if weight.dim() == 3 else None].fill_(torch.nan)
        arrivals.look = lambda: [name for name, each in self.named_parameters(recurse=False) if each.isnan().any()]
