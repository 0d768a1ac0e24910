"""What a method sees of a layer: what was measured, and on demand the experts themselves. Never the model.

Shapes: T tokens, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from moefit.calibration.statistics import Sample, Sums


class Experts:
    """The experts of one layer, whatever their family's layout.

    Args:
        module: the experts module, with weights.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def matrices(self) -> dict[str, torch.Tensor]:
        """Return ``gate`` and ``up`` [E, F, D] and ``down`` [E, D, F]; families without gates have no ``gate``."""
        transposed = getattr(self.module, "is_transposed", False)

        def oriented(name: str) -> torch.Tensor:
            weight = getattr(self.module, name).detach()
            return weight.transpose(1, 2) if transposed else weight

        found = {"down": oriented("down_proj")}
        if not hasattr(self.module, "gate_up_proj"):
            return {"up": oriented("up_proj")} | found
        both = oriented("gate_up_proj")
        if getattr(self.module, "is_concatenated", True):
            gate, up = both.chunk(2, dim=1)
        else:
            gate, up = both[:, ::2], both[:, 1::2]
        return {"gate": gate, "up": up} | found

    @torch.no_grad()
    def outputs(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the raw output of one expert for each token, [T, D] in the weights' dtype."""
        weight = self.module.down_proj
        x_TD = x_TD.to(weight.device, weight.dtype)
        index = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        return self.module(x_TD, index, torch.ones_like(x_TD[:, :1]))


@dataclass(kw_only=True)
class LayerView:
    """One MoE layer for a method.

    Attributes:
        index: number of the decoder layer.
        num_experts: experts, which is also the number of slots.
        top_k: experts of a token.
        groups: groups that limit the router's choice, 1 where it chooses freely.
        protected: experts that must stay.
        read_sums: reads what calibration summed.
        read_sample: reads the sampled tokens.
        open_experts: opens the experts.
    """

    index: int
    num_experts: int
    top_k: int
    groups: int
    protected: frozenset[int] = frozenset()
    read_sums: Callable[[], Sums]
    read_sample: Callable[[], Sample]
    open_experts: Callable[[], AbstractContextManager[nn.Module]]
    _opened: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def sums(self) -> Sums:
        """What calibration summed over the layer's tokens."""
        return self.read_sums()

    @cached_property
    def sample(self) -> Sample:
        """The sampled tokens of the layer."""
        return self.read_sample()

    @cached_property
    def experts(self) -> Experts:
        """The experts, loaded when first asked for and kept until `close`."""
        return Experts(self._opened.enter_context(self.open_experts()))

    def close(self) -> None:
        """Let go of all that was read; it is read again when asked for."""
        self._opened.close()
        for name in ("sums", "sample", "experts"):
            self.__dict__.pop(name, None)

    def mean(self, name: str) -> torch.Tensor:
        """Return a sum divided by the routed tokens of each expert, 0 for experts that no token reached."""
        total, count = getattr(self.sums, name), self.sums.count.clamp_min(1)
        return total / (count[:, None] if total.dim() == 2 else count)
