"""Which tensors on disk belong to which expert and to which slot, in every MoE layer, MTP layers included.

A `Stack` is one MoE layer as it lies on disk. Experts may lie one tensor each (``experts.7.up_proj.weight``) or fused
(``experts.gate_up_proj`` with a row for each expert); both are cut by rows without being decoded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from moetailor.checkpoint.anatomy import Anatomy, MoELayer
from moetailor.checkpoint.coded import Coded
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.family import UNQUANTIZED
from moetailor.checkpoint.files import DTYPES, Checkpoint, TensorInfo
from moetailor.checkpoint.folder import CONFIG
from moetailor.errors import CheckpointError
from moetailor.schema import Count, Few

_LAYER = re.compile(r"^(.*?\blayers\.\d+)\.(.*)$")
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")
_EXPERTS = re.compile(r"\bexperts\.")


@dataclass(kw_only=True)
class Stack:
    """One MoE layer on disk, as planning knows it: what is in it and what each part costs.

    Attributes:
        prefix: the decoder layer that its tensors lie in, such as ``model.layers.3``.
        index: number of the decoder layer; None for a layer that the model does not run (multi-token prediction).
        num_experts: experts, which is also the number of slots.
        expert_bytes: bytes of one expert.
        slot_bytes: bytes of one slot's rows in the router.
        dtype: safetensors dtype of the experts' numbers; the widest where their matrices differ.
        shape: what an expert is made of; None where the model does not run the layer.
        lies: how they lie, in words; ``plain`` as their numbers.
    """

    prefix: str
    index: Few | None
    num_experts: Few
    expert_bytes: Count = 0
    slot_bytes: Count = 0
    dtype: str = ""
    shape: ExpertShape | None = None
    lies: str = "plain"


@dataclass(kw_only=True)
class DiskStack(Stack):
    """A stack with the names of its tensors.

    Attributes:
        experts: tensors that are part of one expert: name -> expert. Names are those of `Checkpoint.numbers`.
        fused: tensors with a row for each expert: name -> axis.
        slots: tensors of the router with a row for each slot: name -> axis.
    """

    experts: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)

    def expert_number(self, name: str) -> int | None:
        """Return the expert that a tensor's name gives; None when experts are fused."""
        match = _EXPERT.search(name)
        return int(match[1]) if match else None

    def named(self, name: str) -> str:
        """Return the name of one of its tensors, under the prefix that the layer has in this checkpoint."""
        return f"{self.prefix}.{_split(name)[1]}"

    def renamed(self, name: str, expert: int) -> str:
        """Return the name of an expert's tensor after the expert got another number."""
        return _EXPERT.sub(f"experts.{expert}.", name, count=1)

    def sizes(self) -> Stack:
        """Return the stack without names."""
        return Stack(**{f.name: getattr(self, f.name) for f in fields(Stack)})


def find_stacks(checkpoint: Checkpoint, anatomy: Anatomy, names: dict[str, str]) -> dict[str, DiskStack]:
    """Find every MoE layer on disk, by prefix, in the order of the layers.

    Args:
        checkpoint: the opened checkpoint.
        anatomy: the MoE layers of the model in memory.
        names: disk name -> memory name, from `loader.memory_names`.

    Raises:
        CheckpointError: an expert is incomplete, or a tensor with expert rows has an unexpected shape.
    """
    rows: dict[str, tuple[MoELayer, int, bool]] = {}
    for layer in anatomy.layers.values():
        rows |= {f"{layer.experts}.{name}": (layer, axis, True) for name, axis in layer.expert_rows.items()}
        rows |= {f"{layer.block}.{name}": (layer, axis, False) for name, axis in layer.slot_rows.items()}
    stacks: dict[str, DiskStack] = {}
    # What the tensors of the layers that run are called there, each with its axis and whether it is one of experts.
    known: dict[str, tuple[int, bool]] = {}
    for key, name in names.items():
        if name in rows:
            layer, axis, of_experts = rows[name]
            prefix, rest = _split(key)
            empty = DiskStack(prefix=prefix, index=layer.index, num_experts=layer.num_experts, shape=layer.expert_shape)
            known[_EXPERT.sub("experts.*.", rest)] = axis, of_experts
            _place(stacks.setdefault(prefix, empty), checkpoint, key, axis, of_experts)
    lost = sorted(set(anatomy.layers) - {s.index for s in stacks.values() if s.experts or s.fused})
    if lost:
        unknown = next((key for key in sorted(checkpoint.numbers.keys() - names.keys()) if _EXPERTS.search(key)), None)
        told = f"; it has {unknown!r}, which the model does not load" if unknown else "; the checkpoint is incomplete"
        raise CheckpointError(f"{checkpoint.source}: has no experts for MoE layers {lost}{told}")
    _find_unloaded(stacks, known, checkpoint, names)
    for stack in stacks.values():
        _measure(stack, checkpoint)
    return dict(sorted(stacks.items(), key=lambda item: (item[1].index is None, item[1].index or 0, item[0])))


def _find_unloaded(
    stacks: dict[str, DiskStack],
    known: Mapping[str, tuple[int, bool]],
    checkpoint: Checkpoint,
    names: Mapping[str, str],
) -> None:
    """Add the MoE layers that the model does not run, and refuse what lies unloaded with the experts of one that does.

    Args:
        stacks: the layers that run, by prefix; the others are added.
        known: what their tensors are called, with axis and whether of experts.
        checkpoint: the opened checkpoint.
        names: disk name -> memory name of what the model loads.
    """
    blocks = {rest.split(".")[0] for rest in known}
    size = next(iter(stacks.values())).num_experts
    for key in sorted(checkpoint.numbers.keys() - names.keys()):
        match, info = _LAYER.match(key), checkpoint.numbers[key]
        if not match:
            continue
        prefix, rest = match.groups()
        within = bool(_EXPERTS.search(rest))
        like = known.get(_EXPERT.sub("experts.*.", rest), (0, True) if within else None)
        if prefix in stacks and stacks[prefix].index is not None:
            if within or (rest.split(".")[0] in blocks and info.shape[:1] == (stacks[prefix].num_experts,)):
                raise CheckpointError(
                    f"{checkpoint.source}: tensor {key!r} belongs to experts, but transformers does not load it; if it "
                    f"scales quantized weights, these are {UNQUANTIZED}"
                )
        elif like is not None:
            stack = stacks.setdefault(prefix, DiskStack(prefix=prefix, index=None, num_experts=size))
            _place(stack, checkpoint, info.name, *like)


def rows_nbytes(info: TensorInfo | Coded, axis: int) -> int:
    """Return the bytes of one row of a tensor along an axis."""
    return info.nbytes // info.shape[axis]


def _split(key: str) -> tuple[str, str]:
    match = _LAYER.match(key)
    if not match:
        raise CheckpointError(f"tensor {key!r} has a row for each expert but lies in no decoder layer; not supported")
    return match[1], match[2]


def _place(stack: DiskStack, checkpoint: Checkpoint, key: str, axis: int, of_experts: bool) -> None:
    info = checkpoint.numbers[key]
    if of_experts and (match := _EXPERT.search(info.name)):
        stack.experts[info.name] = int(match[1])
        return
    # On disk a vector of biases may have lost its leading axis of 1.
    axis = min(axis, len(info.shape) - 1)
    if axis < 0 or info.shape[axis] != stack.num_experts:
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: layers have {stack.num_experts} experts, but {info.name!r} in "
            f"{info.stored[0].file.name} has shape {list(info.shape)} and one row for each of them on axis "
            f"{max(axis, 0)}; put right which of the two is wrong"
        )
    if isinstance(info, Coded) and (axis or any(part.shape[:1] != info.shape[:1] for part in info.stored)):
        told = f"{info.name!r} is {info.lies}, which has no row of its own for each"
        raise CheckpointError(f"{checkpoint.source}: {told}; give the bf16 or fp32 original")
    (stack.fused if of_experts else stack.slots)[info.name] = axis


def _measure(stack: DiskStack, checkpoint: Checkpoint) -> None:
    tensors = checkpoint.numbers
    fused = sum(rows_nbytes(tensors[name], axis) for name, axis in stack.fused.items())
    parts: list[list[str]] = [[] for _ in range(stack.num_experts)]
    for name, expert in stack.experts.items():
        if expert >= stack.num_experts:
            raise CheckpointError(
                f"{checkpoint.folder / CONFIG}: layers have {stack.num_experts} experts, but {name!r} is of number "
                f"{expert}; put right which of the two is wrong"
            )
        parts[expert].append(name)
    sizes = [fused + sum(tensors[name].nbytes for name in part) for part in parts]
    if min(sizes) != max(sizes) or not max(sizes):
        short = sizes.index(min(sizes))
        numbers = {sum(math.prod(tensors[name].shape) for name in part) for part in parts}
        cure = "the checkpoint is incomplete" if len(numbers) > 1 else "save them all in one dtype"
        raise CheckpointError(
            f"{checkpoint.source}: expert {short} of {stack.prefix} has {sizes[short]:,} bytes, others "
            f"{max(sizes):,}; {cure}"
        )
    stack.expert_bytes = sizes[0]
    stack.slot_bytes = sum(rows_nbytes(tensors[name], axis) for name, axis in stack.slots.items())
    mine = [tensors[name] for name in [*stack.experts, *stack.fused]]
    stack.dtype = max((tensor.dtype for tensor in mine), key=lambda dtype: DTYPES[dtype].itemsize)
    stack.lies = next((tensor.lies for tensor in mine if isinstance(tensor, Coded)), "plain")
