"""The experts module of a compressed layer: slots in, pool rows, guests and stand-ins out.

It is the family's own class with a slot map in front, so the family's activation, layout and every experts
implementation (eager, grouped, batched) keep working. Shapes: T tokens, K slots of a token, D model width, N stand-ins,
R rows of their linear maps.
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
from moefit.planning.slot_map import SlotMap

# Buffers that follow from the map: it lives in config.json, so they are neither expected among weights nor saved.
BUFFERS = ("slot_map", "slot_scale", "linear_rank", "linear_start", "linear_owner", "linear_input")


class CompressedExperts(nn.Module):
    """What a compressed layer adds to its family's experts class; see `compressed_class`.

    Attributes:
        slots: the map, as config.json has it.
        hosts: experts modules of the layers whose experts are guests here, by decoder layer; not submodules.
        slot_map: pool row of each slot, or the pool's size + n for guest n, or -1 - n for stand-in n, int32 [slots].
        slot_scale: factor on each slot's gate, float32 [slots]; absent when all are 1.
        constant: constants of the stand-ins, [N, D]; absent when there are none.
        linear_in: input factors of their linear maps, a row for each rank, [rows, D]; absent when there are none.
        linear_out: output factors, [R, D].
        linear_rank: rank of each stand-in, [N].
        linear_start: its first row in `linear_out`, [N].
        linear_owner: stand-in of each row, [R].
        linear_input: row of `linear_in` that belongs to each row, [R].
    """

    slots: SlotMap
    hosts: Mapping[int, Any]
    down_proj: nn.Parameter
    slot_map: torch.Tensor
    slot_scale: torch.Tensor | None
    constant: nn.Parameter | None
    linear_in: nn.Parameter | None
    linear_out: nn.Parameter | None
    linear_rank: torch.Tensor
    linear_start: torch.Tensor
    linear_owner: torch.Tensor
    linear_input: torch.Tensor

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
        # Only live pairs reach a matrix product: each becomes a token of its own with one expert.
        token, place = (run_TK & (row_TK < self.slots.experts)).nonzero().unbind(1)
        if len(token):
            pairs = super().forward(hidden_TD[token], row_TK[token, place, None], summed_TK[token, place, None])
            out_TD = out_TD.index_add(0, token, pairs.to(out_TD.dtype))
        for number, (layer, slot) in enumerate(self.slots.guests):
            token, place = (run_TK & (row_TK == self.slots.experts + number)).nonzero().unbind(1)
            if len(token):
                pairs = _visit(self.hosts[layer], hidden_TD[token], slot, summed_TK[token, place, None])
                out_TD = out_TD.index_add(0, token, pairs.to(out_TD))
        if self.constant is not None:
            number_TK = (-1 - row_TK).clamp_min(0)
            weight_TK = gate_TK.masked_fill(row_TK >= 0, 0).to(self.constant.dtype)
            # Constants are gathered and added: no matrix product.
            given_TD = F.embedding_bag(number_TK, self.constant, per_sample_weights=weight_TK, mode="sum")
            if self.slots.ranks is not None:
                given_TD = given_TD + self._linear(hidden_TD, number_TK, weight_TK)
            out_TD = out_TD + given_TD.to(out_TD.dtype)
        return out_TD.to(hidden_TD.dtype)

    def _linear(self, hidden_TD: torch.Tensor, number_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return the gated sum of the linear maps of the stand-ins of each token, [T, D]."""
        assert self.linear_in is not None
        assert self.linear_out is not None
        assert self.slots.ranks is not None
        if number_TK.numel() > len(self.slots.ranks):
            # y_t = sum_R g_(t, owner of R) <x_t, in_R> out_R: two thin products over all maps of the layer.
            gate_TN = weight_TK.new_zeros(len(hidden_TD), len(self.slots.ranks)).scatter_add(1, number_TK, weight_TK)
            inner_TR = F.linear(hidden_TD, self.linear_in)[:, self.linear_input]
            return (inner_TR * gate_TN[:, self.linear_owner]) @ self.linear_out
        # Few tokens, as in decoding: only the rows of the maps that they chose are read.
        step_r = torch.arange(max(self.slots.ranks), device=number_TK.device)
        live_TKr = step_r < self.linear_rank[number_TK][..., None]
        row_TKr = (self.linear_start[number_TK][..., None] + step_r).where(live_TKr, 0)
        inner_TKr = (self.linear_in[self.linear_input[row_TKr]] @ hidden_TD[:, None, :, None])[..., 0]
        weight_TKr = inner_TKr * live_TKr * weight_TK[..., None]
        return F.embedding_bag(
            row_TKr.flatten(1), self.linear_out, per_sample_weights=weight_TKr.flatten(1), mode="sum"
        )

    def fill_map(self) -> None:
        """Fill the buffers from the map, on the device of the weights."""
        device, ranks = self.down_proj.device, self.slots.ranks
        self.slot_map = torch.tensor(self.slots.slots, dtype=torch.int32, device=device)
        if self.slots.scales is not None:
            self.slot_scale = torch.tensor(self.slots.scales, device=device)
        if ranks is not None:
            rank_N = torch.tensor(ranks, device=device)
            self.linear_rank, self.linear_start = rank_N, rank_N.cumsum(0) - rank_N
            self.linear_owner = torch.arange(len(ranks), device=device).repeat_interleave(rank_N)
            # A shared input factor serves every map with its first rows.
            row_R = torch.arange(sum(ranks), device=device)
            shared = self.slots.shared_input
            self.linear_input = row_R - self.linear_start[self.linear_owner] if shared else row_R


def _visit(host: Any, hidden_PD: torch.Tensor, slot: int, gate_P1: torch.Tensor) -> torch.Tensor:
    """Run an expert of another layer: that layer's experts module is asked for one of its own slots."""
    device = next(host.parameters()).device  # adapters may be around it
    if device.type != "meta":  # weights that accelerate has put elsewhere: its hooks move the inputs
        hidden_PD, gate_P1 = hidden_PD.to(device), gate_P1.to(device)
    return host(hidden_PD, torch.full_like(gate_P1, slot, dtype=torch.long), gate_P1)


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

    Stand-ins are left empty for the caller to fill.

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
            hosts = {host: anatomy.layers[host].experts for host, _ in change.slot_map.guests}
            # A plain mapping: the guests' weights stay their own layer's, and are saved there once.
            model.get_submodule(layer.experts).__dict__["hosts"] = {
                host: model.get_submodule(path) for host, path in hosts.items()
            }


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
    module.slots = slot_map
    inputs, outputs = slot_map.linear_rows
    rows = {"constant": slot_map.constants, "linear_in": inputs, "linear_out": outputs}
    for name, count in rows.items():
        empty = torch.empty(count, layer.width, dtype=weight.dtype, device=weight.device)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=weight.requires_grad) if count else None)
    sizes = dict.fromkeys(BUFFERS[2:4], len(slot_map.ranks or ())) | dict.fromkeys(BUFFERS[4:], outputs)
    sizes |= {"slot_map": len(slot_map.slots), "slot_scale": len(slot_map.scales or ())}
    for name in BUFFERS:
        dtype = {"slot_map": torch.int32, "slot_scale": torch.float32}.get(name, torch.int64)
        empty = torch.empty(sizes[name], dtype=dtype, device=weight.device) if sizes[name] else None
        module.register_buffer(name, empty, persistent=False)
    if not weight.is_meta:
        module.fill_map()
