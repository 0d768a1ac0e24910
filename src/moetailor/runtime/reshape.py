"""A model reshaped to what a plan leaves: rows cut, slot maps put in front, room for what is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moetailor.answers import SlotMap
from moetailor.checkpoint.anatomy import Anatomy, MoELayer, tensors_of
from moetailor.runtime.experts import CompressedExperts


@cache
def compressed_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the compressed form of an experts class, of the same Python module: transformers looks names up there."""
    made = {"__module__": base.__module__, "__reduce_ex__": _reduced}
    return type(f"Compressed{base.__name__}", (CompressedExperts, base), made)


def _reduced(module: nn.Module, protocol: Any) -> tuple:
    """Say how a module is pickled: its class is made anew, since no Python module has it under its name."""
    _, base = type(module).__bases__
    _, _, *state = nn.Module.__reduce_ex__(module, protocol)
    return _empty, (base,), *state


def _empty(base: type[nn.Module]) -> nn.Module:
    made = compressed_class(base)
    return made.__new__(made)


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """What becomes of one layer's tensors.

    Attributes:
        experts: rows of the expert tensors that stay.
        slots: rows of the router's tensors that stay.
        slot_map: how slots find rows and other answers; None when each slot keeps the row of its own number.
    """

    experts: Sequence[int]
    slots: Sequence[int]
    slot_map: SlotMap | None = None


def reshape_model(model: nn.Module, anatomy: Anatomy, changes: Mapping[int, LayerChange]) -> None:
    """Cut layers to the rows that stay and put slot maps in front, in place; works on the meta device too.

    The tensors of answers are left empty for the caller to fill.

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
            lenders = {index: anatomy.layers[index].experts for index in change.slot_map.lenders}
            # A plain mapping: the lenders' weights stay their own layer's, and are saved there once.
            model.get_submodule(layer.experts).__dict__["lenders"] = {
                index: model.get_submodule(path) for index, path in lenders.items()
            }
    _count_slots(model, anatomy)


def _count_slots(model: Any, anatomy: Anatomy) -> None:
    """Let the loss that balances routers count the slots that are left: one number for all layers, the largest."""
    tensors = tensors_of(model)
    rows = [(layer, *next(iter(layer.slot_rows.items()))) for layer in anatomy.layers.values()]
    widths = {tensors[f"{layer.block}.{name}"].shape[axis] for layer, name, axis in rows}
    for path, attribute in anatomy.model_counts:
        setattr(model.get_submodule(path), attribute, max(widths))
    base = model.base_model
    if len(widths) > 1 and _of_one_width not in base._forward_hooks.values():
        base.register_forward_hook(_of_one_width)


def _of_one_width(base: nn.Module, args: Any, output: Any) -> None:
    """Fill the router logits of layers with fewer slots up, with slots that no token chooses."""
    given = getattr(output, "router_logits", None)
    if isinstance(given, tuple):
        widest = max(logits.shape[-1] for logits in given)
        short = [widest - logits.shape[-1] for logits in given]
        filled = (F.pad(logits, (0, more), value=-torch.inf) for logits, more in zip(given, short, strict=True))
        output.router_logits = tuple(filled)


def _cut(model: nn.Module, path: str, axis: int, rows: Sequence[int]) -> None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    tensor = getattr(module, name)
    if len(rows) == tensor.shape[axis] and list(rows) == list(range(len(rows))):
        return
    # A copy, never a view: a view would keep the whole original alive.
    cut = tensor.detach().index_select(axis, torch.tensor(rows, dtype=torch.long, device=tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, cut)


def _compress(model: nn.Module, layer: MoELayer, slot_map: SlotMap) -> None:
    module: Any = model.get_submodule(layer.experts)
    module.__class__ = compressed_class(type(module))
    module.slots = slot_map
    if not slot_map.plain_pool:
        # All its experts lie in few bits. No file has parameters without rows, but shapes and dtype are read off them.
        for name in layer.expert_rows:
            empty = getattr(module, name).detach()
            delattr(module, name)
            module.register_buffer(name, empty, persistent=False)
    module.add_tensors(slot_map.tensors(layer.expert_shape))
    module.fill_map()
