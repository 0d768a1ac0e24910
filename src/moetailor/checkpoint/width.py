"""The entry of config.json that says how many neurons experts have, and nothing else: found by trying."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from moetailor.checkpoint.anatomy import Anatomy, look_at, tensors_of
from moetailor.checkpoint.experts import Experts
from moetailor.errors import CheckpointError


def width_entry(config: Any, model: nn.Module, anatomy: Anatomy, neurons: int) -> str:
    """Return the entry of a config that gives experts another width and changes nothing else.

    Nothing of this is declared: the model is built without weights for each entry that is the width, and compared.

    Args:
        config: the transformers config.
        model: the model of it without weights.
        anatomy: its MoE layers.
        neurons: the other width.

    Raises:
        CheckpointError: there is none.
    """
    layers = anatomy.layers.values()
    sizes = {layer.expert_shape.intermediate for layer in layers}
    of_experts = {f"{layer.experts}.{name}" for layer in layers for name in layer.expert_rows}
    shapes = {name: tensor.shape for name, tensor in tensors_of(model).items() if name not in of_experts}
    told = "none is that width"
    for name in sorted(name for name, value in config.to_dict().items() if type(value) is int and {value} == sizes):
        if (other := _built(config, name, neurons, model)) is None:
            continue
        found = [Experts(other.get_submodule(layer.experts)).shape for layer in layers]
        wanted = [replace(layer.expert_shape, intermediate=neurons) for layer in layers]
        changed = [key for key, tensor in tensors_of(other).items() if tensor.shape != shapes.get(key, tensor.shape)]
        if found == wanted and not changed:
            return name
        if any(shape.intermediate == neurons for shape in found):
            told = f"{name} is also the size of {min(changed)}" if changed else f"{name} is that of some layers"
    raise CheckpointError(f"config.json of {config.model_type!r} has no entry for the width of experts alone: {told}")


def one_width(config: Any, model: nn.Module, anatomy: Anatomy) -> str:
    """Return why there is none; empty where there is one. Arguments as of `width_entry`."""
    neurons = max(layer.expert_shape.intermediate for layer in anatomy.layers.values())
    try:
        width_entry(config, model, anatomy, neurons // 2)
    except CheckpointError as error:
        return str(error)
    return ""


def _built(config: Any, name: str, value: int, model: nn.Module) -> Any:
    """Return the model without weights with another value of an entry; None where none can be built."""
    other = copy.deepcopy(config)
    try:
        setattr(other, name, value)
        return look_at(other, type(model))
    except Exception:  # whatever the family's code makes of a number that was meant for something else
        return None
