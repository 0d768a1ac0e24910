"""What the shards of a result hold: pieces of the original's tensors, and tensors that were computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.files import Checkpoint, TensorInfo
from moetailor.checkpoint.layout import DiskStack
from moetailor.checkpoint.writer import Piece, rows, whole
from moetailor.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a result is put together from.

    Attributes:
        plan: what becomes of the slots.
        checkpoint: the original.
        anatomy: its MoE layers in memory.
        stacks: its MoE layers on disk, by prefix.
        skeleton: it without weights, which knows its family's names.
        rebuilt: experts whose weights were computed anew, by the names that they have in the result; where experts are
            fused, with a row for each of them.
        added: what the answers of each decoder layer store beside the pool, by name and in the order of declaration.
    """

    plan: Plan
    checkpoint: Checkpoint
    anatomy: Anatomy
    stacks: Mapping[str, DiskStack]
    skeleton: Any
    rebuilt: Mapping[str, TensorInfo]
    added: Mapping[int, Mapping[str, TensorInfo]]


def under_experts(parts: Parts, stack: DiskStack) -> list[Piece]:
    """Return what the answers of a layer store under the path of its experts module."""
    assert stack.index is not None
    path = parts.anatomy.layers[stack.index].experts
    return [whole(info, f"{path}.{name}") for name, info in parts.added[stack.index].items()]


def shards_of(parts: Parts, placed: Callable[[Parts, DiskStack], list[Piece]] = under_experts) -> list[list[Piece]]:
    """Return the tensors of each shard of the result, in the order of the original's shards and under its names.

    What answers store lies with the router of its layer.

    Args:
        parts: what the result is put together from.
        placed: gives what the answers of a layer store under its names in the result.
    """
    numbers, owner = parts.checkpoint.numbers, {}
    for stack in parts.stacks.values():
        for name in [*stack.experts, *stack.fused, *stack.slots]:
            owner |= {info.name: (stack, name) for info in numbers[name].stored}
    shards: dict[Path, list[Piece]] = defaultdict(list)
    for info in sorted(parts.checkpoint.tensors.values(), key=lambda info: (info.file, info.offset)):
        piece = _piece(parts, info, *owner.get(info.name, (None, info.name)))
        if piece is not None:
            shards[info.file].append(piece)
    for stack in parts.stacks.values():
        if stack.index is not None and stack.index in parts.added:
            home = parts.checkpoint.tensors[next(iter(stack.slots))].file
            shards[home] += placed(parts, stack)
    return [shards[file] for file in sorted(shards)]


def _piece(parts: Parts, info: TensorInfo, stack: DiskStack | None, name: str) -> Piece | None:
    """Return what stays of a tensor of the original; None where nothing does.

    Args:
        parts: what the result is put together from.
        info: the tensor.
        stack: the layer whose experts or slots it belongs to, if any.
        name: of the weight that it is, or is a part of.
    """
    layer = parts.plan.layers.get(stack.prefix) if stack else None
    if stack is None or layer is None:
        return whole(info)
    if name in stack.slots:
        return rows(info, stack.slots[name], layer.kept_slots)
    if name in stack.fused:
        anew = [expert for expert in layer.rebuilt if expert in layer.plain]
        other = {expert: (parts.rebuilt[info.name], row) for row, expert in enumerate(anew)}
        return rows(info, stack.fused[name], layer.plain, other) if layer.plain else None
    expert = stack.experts[name]
    if expert not in layer.plain:
        return None
    name = stack.renamed(info.name, layer.plain.index(expert))
    return whole(parts.rebuilt[name] if expert in layer.rebuilt else info, name)
