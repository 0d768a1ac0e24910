"""The experts module of a compressed layer: slots in, pool rows and stand-ins out.

It is the family's own class with a slot map in front, so the family's activation, layout and every experts
implementation (eager, grouped, batched) keep working. Shapes: T tokens, K slots of a token, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moefit.checkpoint.anatomy import Anatomy, MoELayer
from moefit.planning.slots import SlotMap


class CompressedExperts(nn.Module):
    """What a compressed layer adds to its family's experts class; see `compressed_class`.

    Attributes:
        slots: the map, as config.json has it.
        slot_map: pool row of each slot, or -1 - n for constant n, int32 [slots].
        slot_scale: factor on each slot's gate, float32 [slots]; absent when all are 1.
        constant: constants, [n, D]; absent when there are none.
    """

    slots: SlotMap
    down_proj: nn.Parameter
    slot_map: torch.Tensor
    slot_scale: torch.Tensor | None
    constant: nn.Parameter | None

    def forward(self, hidden_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Return the layer's routed output, [T, D].

        Args:
            hidden_TD: input of the experts.
            slot_TK: slots that the router chose.
            gate_TK: their gates.
        """
        row_TK = self.slot_map[slot_TK].long()
        if self.slot_scale is not None:
            gate_TK = gate_TK * self.slot_scale[slot_TK].to(gate_TK.dtype)
        if self.slots.plain:
            return super().forward(hidden_TD, row_TK, gate_TK)
        summed_TK, run_TK = gate_TK, row_TK >= 0
        if self.slots.shared:
            # Slots of a token that share a row: the first of them runs it, with the sum of their gates.
            same_TKK = row_TK[:, :, None] == row_TK[:, None, :]
            summed_TK = (same_TKK * gate_TK[:, None, :]).sum(2)
            run_TK = run_TK & (same_TKK.int().argmax(2) == torch.arange(row_TK.shape[1], device=row_TK.device))
        # Sums are kept in float32 at least, as the grouped and batched implementations do.
        out_TD = torch.zeros_like(hidden_TD, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        token, place = run_TK.nonzero().unbind(1)
        if len(token):
            # Only live pairs reach a matrix product: each becomes a token of its own with one expert.
            pairs = super().forward(hidden_TD[token], row_TK[token, place, None], summed_TK[token, place, None])
            out_TD = out_TD.index_add(0, token, pairs.to(out_TD.dtype))
        if self.constant is not None:
            out_TD = out_TD + self._constants(row_TK, gate_TK).to(out_TD.dtype)
        return out_TD.to(hidden_TD.dtype)

    def fill_map(self) -> None:
        """Fill the buffers from the map, on the device of the weights."""
        device = self.down_proj.device
        self.slot_map = torch.tensor(self.slots.slots, dtype=torch.int32, device=device)
        if self.slots.scales is not None:
            self.slot_scale = torch.tensor(self.slots.scales, device=device)

    def _constants(self, row_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Return the gated sum of the constants a token chose, [T, D]: gathered and added, with no matrix product."""
        assert self.constant is not None
        weight_TK = gate_TK.masked_fill(row_TK >= 0, 0).to(self.constant.dtype)
        return F.embedding_bag((-1 - row_TK).clamp_min(0), self.constant, per_sample_weights=weight_TK, mode="sum")


@cache
def compressed_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the compressed form of an experts class, of the same Python module: transformers looks names up there."""
    return type(f"Compressed{base.__name__}", (CompressedExperts, base), {"__module__": base.__module__})


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of one layer's tensors.

    Attributes:
        experts: rows of the expert tensors that stay.
        slots: rows of the router's tensors that stay.
        slot_map: how slots find rows and stand-ins; None when each slot keeps the row of its own number.
    """

    experts: Sequence[int]
    slots: Sequence[int]
    slot_map: SlotMap | None = None


def reshape_model(model: nn.Module, anatomy: Anatomy, changes: Mapping[int, Change]) -> None:
    """Cut layers to the rows that stay and put slot maps in front, in place; works on the meta device too.

    Constants are left empty for the caller to fill.

    Args:
        model: the model.
        anatomy: its MoE layers.
        changes: what becomes of which decoder layer.
    """
    for index, change in changes.items():
        layer = anatomy.layers[index]
        for name, axis in layer.expert_rows.items():
            _cut(model, f"{layer.experts}.{name}", axis, change.experts)
        for name, axis in layer.slot_rows.items():
            _cut(model, f"{layer.block}.{name}", axis, change.slots)
        for path, attribute in layer.counts:
            setattr(
                model.get_submodule(path), attribute, len(change.experts if path == layer.experts else change.slots)
            )
        if change.slot_map is not None:
            _compress(model, layer, change.slot_map)


def _cut(model: nn.Module, path: str, axis: int, rows: Sequence[int]) -> None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    tensor = getattr(module, name)
    if len(rows) == tensor.shape[axis] and list(rows) == list(range(len(rows))):
        return
    # A copy, never a view: a view would keep the whole original alive.
    cut = tensor.detach().index_select(axis, torch.tensor(rows, device=tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, cut)


def _compress(model: nn.Module, layer: MoELayer, slot_map: SlotMap) -> None:
    module: Any = model.get_submodule(layer.experts)
    weight = module.down_proj
    module.__class__ = compressed_class(type(module))
    # The map lives in config.json: its buffers are neither expected among the weights nor saved with them.
    module.slots = slot_map
    module.register_buffer(
        "slot_map", torch.empty(len(slot_map.slots), dtype=torch.int32, device=weight.device), persistent=False
    )
    scale = None if slot_map.scales is None else torch.empty(len(slot_map.slots), device=weight.device)
    module.register_buffer("slot_scale", scale, persistent=False)
    if not weight.is_meta:
        module.fill_map()
    constant = None
    if slot_map.constants:
        empty = torch.empty(slot_map.constants, layer.width, dtype=weight.dtype, device=weight.device)
        constant = nn.Parameter(empty, requires_grad=weight.requires_grad)
    module.register_parameter("constant", constant)
