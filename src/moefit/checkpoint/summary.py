"""What a checkpoint is, read off its headers: layers, experts, top-k, parameters, bytes."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moefit.checkpoint.anatomy import Anatomy, discover, tensors_of
from moefit.checkpoint.files import DTYPES, Checkpoint, open_checkpoint
from moefit.checkpoint.loader import StreamedModel, load_config
from moefit.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """Decoder layers of one make.

    Attributes:
        layers: which, such as ``0-15``.
        size: how many.
        slots: outputs of the router.
        experts: experts stored.
        constants: constant stand-ins.
        expert_bytes: bytes of one expert.
    """

    layers: str
    size: int
    slots: int
    experts: int
    constants: int
    expert_bytes: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint at a glance.

    Attributes:
        source: as the user named it.
        model_type: transformers' name of the family.
        decoder_layers: all decoder layers, dense ones included.
        top_k: experts of a token.
        moe: (decoder layer, slots, experts, constants, bytes of an expert) of each MoE layer that the model runs.
        parameters: all numbers in the checkpoint.
        routed_parameters: those of routed experts.
        shared_parameters: those of shared experts, which every token uses.
        active_parameters: those that one token uses, when each slot runs one expert.
        nbytes: bytes of all tensors.
    """

    source: str
    model_type: str
    decoder_layers: int
    top_k: int
    moe: tuple[tuple[int, int, int, int, int], ...]
    parameters: int
    routed_parameters: int
    shared_parameters: int
    active_parameters: int
    nbytes: int

    def groups(self) -> list[LayerSummary]:
        """Return the MoE layers, those of one make together."""
        kinds: dict[tuple[int, int, int, int], list[int]] = {}
        for layer, slots, experts, constants, nbytes in self.moe:
            kinds.setdefault((slots, experts, constants, nbytes), []).append(layer)
        return [
            LayerSummary(layers=_ranges(layers), size=len(layers), slots=s, experts=e, constants=c, expert_bytes=b)
            for (s, e, c, b), layers in kinds.items()
        ]

    def to_json(self) -> dict:
        """Return the summary as JSON values."""
        names = ("layer", "slots", "experts", "constants", "expert_bytes")
        return asdict(self) | {"moe": [dict(zip(names, layer, strict=True)) for layer in self.moe]}


def summarise(source: str | Path, *, trust_remote_code: bool = False) -> Summary:
    """Look at a checkpoint, original or compressed, without reading weights.

    Args:
        source: folder or hub name.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CheckpointError: not a checkpoint of a supported MoE family.
    """
    checkpoint = open_checkpoint(source)
    maps = _slot_maps(checkpoint)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    if maps:
        config = copy.copy(config)
        config.quantization_config = None
    skeleton = StreamedModel(checkpoint, config, dtype=torch.float32)
    anatomy = discover(config, skeleton.model, trust_remote_code=trust_remote_code)
    shared, slots = _shared_parameters(skeleton, anatomy), {i: layer.num_experts for i, layer in anatomy.layers.items()}
    # An expert has the same shape in original and compressed layers; its size is that of the skeleton's rows.
    tensors = tensors_of(skeleton.model)
    numbers = {
        index: sum(tensors[f"{layer.experts}.{name}"].numel() for name in layer.expert_rows) // layer.num_experts
        for index, layer in anatomy.layers.items()
    }
    width = _stored_width(checkpoint, skeleton, anatomy)
    moe = []
    for index in sorted(anatomy.layers):
        entry = maps.get(index)
        kind = (
            (len(entry["slots"]), entry["experts"], entry.get("constants", 0))
            if entry
            else (slots[index], slots[index], 0)
        )
        moe.append((index, *kind, numbers[index] * width))
    parameters = sum(info.nbytes // DTYPES[info.dtype].itemsize for info in checkpoint.tensors.values())
    routed = sum(experts * numbers[index] for index, _, experts, _, _ in moe)
    active = parameters - routed + sum(anatomy.top_k * numbers[index] for index, *_ in moe)
    return Summary(
        source=str(source),
        model_type=anatomy.model_type,
        decoder_layers=config.num_hidden_layers,
        top_k=anatomy.top_k,
        moe=tuple(moe),
        parameters=parameters,
        routed_parameters=routed,
        shared_parameters=shared,
        active_parameters=active,
        nbytes=checkpoint.nbytes,
    )


def _slot_maps(checkpoint: Checkpoint) -> dict[int, dict[str, Any]]:
    entry = checkpoint.config.get("quantization_config") or {}
    return (
        {int(layer): slots for layer, slots in entry.get("layers", {}).items()}
        if entry.get("quant_method") == "moefit"
        else {}
    )


def _shared_parameters(skeleton: StreamedModel, anatomy: Anatomy) -> int:
    total = 0
    for layer in anatomy.layers.values():
        # In families without a block around router and experts, the block is the decoder layer and has more in it.
        if any(
            child in ("self_attn", "linear_attn")
            for child, _ in skeleton.model.get_submodule(layer.block).named_children()
        ):
            continue
        routed = {f"{layer.experts}.{name}" for name in layer.expert_rows} | {
            f"{layer.block}.{name}" for name in layer.slot_rows
        }
        block = skeleton.model.get_submodule(layer.block)
        total += sum(p.numel() for name, p in block.named_parameters() if f"{layer.block}.{name}" not in routed)
    return total


def _stored_width(checkpoint: Checkpoint, skeleton: StreamedModel, anatomy: Anatomy) -> int:
    """Return the bytes of one stored number of the experts."""
    rows = {f"{layer.experts}.{name}" for layer in anatomy.layers.values() for name in layer.expert_rows}
    key = next((key for key, name in skeleton.names.items() if name in rows), None)
    if key is None:
        raise CheckpointError(
            f"{checkpoint.source}: has no experts for MoE layers {sorted(anatomy.layers)}; the checkpoint is incomplete"
        )
    return DTYPES[checkpoint.tensors[key].dtype].itemsize


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
