"""What stands behind the slots of one compressed layer, on one rank.

Shapes: T tokens, K slots of a token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moetailor_vllm.slots import Slots
from moetailor_vllm.stand_ins import Expert, stand_ins


class Arrivals(nn.Module):
    """What must arrive before a layer runs.

    Args:
        prefix: path of the experts, for messages.

    Attributes:
        wanted: what must arrive.
        arrived: what did.
        arrivals: how often something did.
        look: names what else is missing.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix, self.wanted, self.arrived, self.arrivals = prefix, set[str](), set[str](), 0
        self.look: Callable[[], list[str]] = list

    def note(self, name: str) -> None:
        """Note that something arrived."""
        self.arrived.add(name)
        self.arrivals += 1

    def check(self) -> None:
        """Refuse to go on when something is missing.

        Raises:
            ValueError: see the message.
        """
        if missing := sorted(self.wanted - self.arrived) + self.look():
            raise ValueError(
                f"moetailor-vllm: {self.prefix}: no file has {', '.join(missing[:8])} ({len(missing)} missing)"
            )


class Answers(Arrivals):
    """What stands behind the slots of a layer: its map, and stand-ins beside rows of the pool.

    Args:
        slots: the map.
        expert: what an expert is made of.
        prefix: path of the experts, for messages.

    Attributes:
        stored: the stand-ins' stored tensors: what holds each, as which part, and its whole shape.
    """

    row: torch.Tensor
    scale: torch.Tensor

    def __init__(self, slots: Slots, expert: Expert, prefix: str) -> None:
        super().__init__(prefix)
        self.rank, self.width = expert.rank, expert.width
        self.stand_ins = nn.ModuleList(stand_ins(slots, expert))
        self.stored = {
            name + suffix: (tensor, suffix, shape)
            for stand_in in self.stand_ins
            for name, tensor in stand_in.tensors.items()
            for suffix, shape in tensor.parts.items()
        }
        self.wanted |= self.stored.keys()
        self.register_buffer("row", torch.tensor(slots.pool_rows), persistent=False)
        scale = torch.tensor(slots.scales or [1.0] * len(slots.rows), dtype=torch.float32)
        self.register_buffer("scale", scale, persistent=False)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take a stored tensor.

        Raises:
            ValueError: its shape is not what the slot map says.
        """
        holder, suffix, shape = self.stored[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"moetailor-vllm: {self.prefix}.{name} is {list(tensor.shape)}, the slot map says {list(shape)}"
            )
        holder.load(suffix, tensor)
        self.note(name)

    def rows(self, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of the pool and their weights for vLLM's kernel, [T, K] each.

        Slots without a row have a weight of zero and the row of another slot of the token, so that no more weights are
        read for them.
        """
        row_TK = self.row[slot_TK]
        dead_TK = row_TK < 0
        row_TK = row_TK.where(~dead_TK, row_TK.amax(1, keepdim=True).clamp_min(0))
        return row_TK, weight_TK.masked_fill(dead_TK, 0)

    def given(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return what the stand-ins give on this rank: ranks add up; float32 [T, D]."""
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for stand_in in self.stand_ins:
            if self.rank.number == 0 or not stand_in.once:
                out_TD = out_TD + stand_in(x_TD, slot_TK, weight_TK)
        return out_TD
