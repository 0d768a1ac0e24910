"""What a tensor on disk is called in memory, and the other way: transformers' conversion rules, read without weights.

With loader.py and runtime/decode.py the only file that leans on internal modules of transformers. The rules say which
tensors on disk become which parameter (experts that lie one by one are stacked, names change), so no family needs a
rule of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import Checkpoint
from moetailor.errors import CheckpointError

_ONE = "delete the one that is not meant"


def memory_names(checkpoint: Checkpoint, skeleton: Any) -> dict[str, str]:
    """Map each tensor on disk to the parameter or buffer it becomes, leaving out what the model does not load.

    Raises:
        CheckpointError: two tensors would become one and the same parameter.
    """
    return placed(checkpoint, skeleton)[0]


def placed(checkpoint: Checkpoint, skeleton: Any) -> tuple[dict[str, str], list[Any]]:
    """Return `memory_names`, and those of transformers' rules that the names on disk make use of."""
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, names = skeleton.state_dict(), {}
    alone: dict[str, str] = {}
    for key in checkpoint.numbers:
        name, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, state)
        if name not in state:
            name, pattern = key, None
        if name in state:
            names[key] = name
            if pattern is None and alone.setdefault(name, key) != key:
                raise CheckpointError(f"{checkpoint.source}: {alone[name]!r} and {key!r} are the same tensor; {_ONE}")
    for key, name in names.items():
        if alone.get(name, key) != key:
            raise CheckpointError(f"{checkpoint.source}: {alone[name]!r} has what {key!r} is a part of; {_ONE}")
    return names, [rule for rule in rules if rule.was_used()]


def disk_tensors(skeleton: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in memory as they lie on disk: experts may lie one by one there, under other names.

    Args:
        skeleton: the model, which knows the rules of its family.
        tensors: name in memory -> tensor.
    """
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(skeleton, tensors).items()}


def expert_names(skeleton: Any, path: str) -> dict[str, str]:
    """Return what transformers calls each matrix and bias of a layer's first expert when it saves the model.

    Where all experts lie in one tensor, that tensor's name. Each is found by a number that it is filled with.

    Args:
        skeleton: the model, which knows the rules of its family.
        path: the experts module.
    """
    experts = Experts(skeleton.get_submodule(path))
    numbers = {name: number for number, name in enumerate(experts.shape.tensors)}
    filled = {
        name: torch.full((2, *(2 for _ in size)), float(numbers[name])) for name, size in experts.shape.tensors.items()
    }
    used, skeleton._weight_conversions = getattr(skeleton, "_weight_conversions", None), None
    try:  # by the rules for new checkpoints, whatever this one made use of
        made = disk_tensors(skeleton, {f"{path}.{name}": tensor for name, tensor in experts.packed(filled).items()})
    finally:
        skeleton._weight_conversions = used
    return {part: next(name for name, tensor in made.items() if number in tensor) for part, number in numbers.items()}
