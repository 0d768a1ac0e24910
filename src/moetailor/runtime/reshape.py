"""A model reshaped to what a plan leaves: rows cut, slot maps put in front, room for what is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from moetailor.checkpoint.anatomy import Anatomy, MoELayer
from moetailor.checkpoint.experts import Experts
from moetailor.planning.slot_map import SlotMap
from moetailor.runtime.experts import MATRICES, STAND_IN_TENSORS, CompressedExperts

# Buffers that follow from the map: it lives in config.json, so they are neither expected among weights nor saved.
BUFFERS = ("slot_map", "slot_scale", "linear_rank", "linear_start", "linear_owner", "linear_input")
BUFFERS += ("low_base", "low_row")


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
    shapes = _shapes(module, slot_map, layer.width)
    for name in STAND_IN_TENSORS:
        empty = torch.empty(shapes.get(name, (0,)), dtype=weight.dtype, device=weight.device)
        added = nn.Parameter(empty, requires_grad=weight.requires_grad) if empty.numel() else None
        module.register_parameter(name, added)
    for name, size in _buffer_sizes(slot_map).items():
        dtype = {"slot_map": torch.int32, "slot_scale": torch.float32}.get(name, torch.int64)
        empty = torch.empty(size, dtype=dtype, device=weight.device) if size else None
        module.register_buffer(name, empty, persistent=False)
    if not weight.is_meta:
        module.fill_map()


def _shapes(module: nn.Module, slot_map: SlotMap, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that moetailor adds to an experts module."""
    inputs, outputs = slot_map.linear_rows
    shapes: dict[str, tuple[int, ...]] = {
        "constant": (slot_map.constants, width),
        "linear_in": (inputs, width),
        "linear_out": (outputs, width),
    }
    spec, slots = slot_map.auxiliary, len(slot_map.slots)
    if spec is not None and spec.constants:
        shapes["vector_constant"] = (slots, width)
    for part, one in Experts(module).one(0).items():
        shapes[f"base_{part}"] = (slot_map.bases, *one.shape)
        if part in MATRICES:
            shapes[f"low_{part}_in"] = (slot_map.low_rows, one.shape[1])
            shapes[f"low_{part}_out"] = (slot_map.low_rows, one.shape[0])
            shapes[f"vector_{part}"] = (spec.rows(slots) if spec else 0, one.shape[1])
    return shapes


def _buffer_sizes(slot_map: SlotMap) -> dict[str, int]:
    """Return the sizes of the buffers before they are filled, 0 for those that a map does not need."""
    sizes = dict.fromkeys(BUFFERS[2:4], len(slot_map.ranks or ())) | dict.fromkeys(
        BUFFERS[4:6], slot_map.linear_rows[1]
    )
    sizes |= dict.fromkeys(BUFFERS[6:], len(slot_map.low))
    return sizes | {"slot_map": len(slot_map.slots), "slot_scale": len(slot_map.scales or ())}
