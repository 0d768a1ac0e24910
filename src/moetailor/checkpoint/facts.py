"""What planning must know of a model, read off a checkpoint's headers or off a model in memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from moetailor.checkpoint.anatomy import Anatomy, tensors_of
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.files import DTYPE_NAMES, DTYPES, Checkpoint
from moetailor.checkpoint.layout import DiskStack, Stack
from moetailor.errors import CheckpointError
from moetailor.schema import Count, Few


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What planning must know of a model, so that it needs no weights.

    Attributes:
        source: folder or hub name of the checkpoint; empty for a model that was given in memory.
        fingerprint: which weights they are, from `Checkpoint.fingerprint`.
        model_type: transformers' name of the family.
        width: numbers of an expert's output, D.
        top_k: experts of a token.
        groups: how groups limit the router's choice.
        nbytes: bytes of all tensors of the checkpoint.
        stacks: every MoE layer on disk, sizes only.
        dtypes: bytes of all tensors by their dtype.
        one_width: why its config cannot say another width of experts; empty where it can, None where nobody looked.
    """

    source: str
    fingerprint: dict
    model_type: str
    width: Count
    top_k: Few
    groups: Groups
    nbytes: Count
    stacks: tuple[Stack, ...]
    dtypes: Mapping[str, Count] = field(default_factory=dict)
    one_width: str | None = None

    def __post_init__(self) -> None:
        if unknown := {*self.dtypes, *(stack.dtype for stack in self.stacks)} - set(DTYPES):
            raise CheckpointError(f"unknown dtypes {sorted(unknown)}")
        for name in ("prefix", "index"):
            given = [value for stack in self.stacks if (value := getattr(stack, name)) is not None]
            if len(set(given)) < len(given):
                raise CheckpointError(f"two layers have one {name}")
        if few := [s.num_experts for s in self.stacks if s.index is not None and not 1 <= self.top_k <= s.num_experts]:
            raise CheckpointError(f"a layer has {few[0]} experts, the router picks {self.top_k}")
        in_layers = sum(stack.num_experts * (stack.expert_bytes + stack.slot_bytes) for stack in self.stacks)
        if in_layers > self.nbytes:
            raise CheckpointError(f"{in_layers:,} bytes in MoE layers, {self.nbytes:,} in all")
        if self.dtypes and sum(self.dtypes.values()) != self.nbytes:
            raise CheckpointError(f"{self.nbytes:,} bytes in all, {sum(self.dtypes.values()):,} by dtype")

    def shapes(self) -> dict:
        """Return what two models must share for a plan of one to fit the other, whatever their dtypes."""
        run = [stack for stack in self.stacks if stack.index is not None]
        experts = {stack.index: stack.num_experts for stack in run}
        widths = {stack.index: stack.shape and stack.shape.intermediate for stack in run}
        shared = {"model type": self.model_type, "width": self.width, "top-k": self.top_k}
        return shared | {"experts by layer": experts, "intermediate size by layer": widths}

    def to_json(self) -> dict:
        """Return the facts as JSON values."""
        found = asdict(self)
        return {name: value for name, value in found.items() if name != "one_width" or value is not None}


def facts_of_checkpoint(
    checkpoint: Checkpoint, anatomy: Anatomy, stacks: Mapping[str, DiskStack], *, one_width: str
) -> ModelFacts:
    """Return the facts of a checkpoint.

    Args:
        checkpoint: the opened checkpoint.
        anatomy: its MoE layers in memory.
        stacks: its MoE layers on disk.
        one_width: see `ModelFacts`.
    """
    found = _facts(
        anatomy,
        checkpoint.source,
        checkpoint.fingerprint(),
        _by_dtype((info.dtype, info.nbytes) for info in checkpoint.tensors.values()),
        [stack.sizes() for stack in stacks.values()],
    )
    return replace(found, one_width=one_width)


def facts_of_model(model: nn.Module, anatomy: Anatomy) -> ModelFacts:
    """Return the facts of a model in memory; its weights are told apart by a few values of each tensor."""
    tensors = tensors_of(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:  # offloaded
            continue
        values = tensor.detach().flatten()[:: max(tensor.numel() // 64, 1)].float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    stacks = []
    for layer in anatomy.layers.values():
        rows = [tensors[f"{layer.experts}.{name}"] for name in layer.expert_rows]
        slots = [tensors[f"{layer.block}.{name}"] for name in layer.slot_rows]
        stacks.append(
            Stack(
                prefix=layer.block.rpartition(".")[0] if layer.block.count(".") > 2 else layer.block,
                index=layer.index,
                num_experts=layer.num_experts,
                expert_bytes=sum(tensor.nbytes for tensor in rows) // layer.num_experts,
                slot_bytes=sum(tensor.nbytes for tensor in slots) // layer.num_experts,
                dtype=DTYPE_NAMES[rows[0].dtype],
                shape=layer.expert_shape,
            )
        )
    every = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied ones once
    dtypes = _by_dtype((DTYPE_NAMES[tensor.dtype], tensor.nbytes) for tensor in every.values())
    return _facts(anatomy, "", {"memory": digest.hexdigest()[:32]}, dtypes, stacks)


def _by_dtype(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    total = Counter()
    for dtype, nbytes in tensors:
        total[dtype] += nbytes
    return dict(sorted(total.items()))


def _facts(anatomy: Anatomy, source: str, fingerprint: dict, dtypes: dict[str, int], stacks: list[Stack]) -> ModelFacts:
    return ModelFacts(
        source=source,
        fingerprint=fingerprint,
        model_type=anatomy.model_type,
        width=max(layer.width for layer in anatomy.layers.values()),
        top_k=anatomy.top_k,
        groups=anatomy.groups,
        nbytes=sum(dtypes.values()),
        stacks=tuple(stacks),
        dtypes=dtypes,
    )
