"""What a checkpoint is, read off its headers: layers, experts, top-k, parameters, bytes."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moefit.checkpoint.anatomy import Anatomy, discover, tensors_of
from moefit.checkpoint.files import DTYPES, Checkpoint, open_checkpoint
from moefit.checkpoint.loader import StreamedModel, load_config
from moefit.errors import CheckpointError
from moefit.planning.slot_map import SlotMap


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """Decoder layers of one make.

    Attributes:
        layers: which, such as ``0-15``.
        size: how many.
        slots: outputs of the router.
        experts: experts stored.
        stand_ins: slots behind which a constant or a linear map stands.
        ranks: lowest and highest rank of the linear maps; empty when there are none.
        expert_bytes: bytes of one expert.
    """

    layers: str
    size: int
    slots: int
    experts: int
    stand_ins: int
    ranks: tuple[int, ...]
    expert_bytes: int


@dataclass(frozen=True)
class MoeSummary:
    """One MoE layer that the model runs; see `LayerSummary`, and `guests`: experts of other layers that answer here."""

    layer: int
    slots: int
    experts: int
    stand_ins: int
    ranks: tuple[int, ...]
    guests: int
    expert_bytes: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint at a glance.

    Attributes:
        source: as the user named it.
        model_type: transformers' name of the family.
        decoder_layers: all decoder layers, dense ones included.
        top_k: experts of a token.
        moe: each MoE layer that the model runs.
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
    moe: tuple[MoeSummary, ...]
    parameters: int
    routed_parameters: int
    shared_parameters: int
    active_parameters: int
    nbytes: int

    def groups(self) -> list[LayerSummary]:
        """Return the MoE layers, those of one make together."""
        kinds: dict[tuple, list[int]] = {}
        for moe in self.moe:
            ends = (min(moe.ranks), max(moe.ranks)) if moe.ranks else ()
            kinds.setdefault((moe.slots, moe.experts, moe.stand_ins, ends, moe.expert_bytes), []).append(moe.layer)
        return [
            LayerSummary(
                layers=_ranges(layers), size=len(layers), slots=s, experts=e, stand_ins=n, ranks=r, expert_bytes=b
            )
            for (s, e, n, r, b), layers in kinds.items()
        ]

    def to_json(self) -> dict:
        """Return the summary as JSON values."""
        return asdict(self)


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
    moe = tuple(_moe(index, slots[index], maps.get(index), numbers[index] * width) for index in sorted(anatomy.layers))
    parameters = sum(info.nbytes // DTYPES[info.dtype].itemsize for info in checkpoint.tensors.values())
    routed = sum(layer.experts * numbers[layer.layer] for layer in moe)
    active = parameters - routed + sum(anatomy.top_k * numbers[layer.layer] for layer in moe)
    return Summary(
        source=str(source),
        model_type=anatomy.model_type,
        decoder_layers=config.num_hidden_layers,
        top_k=anatomy.top_k,
        moe=moe,
        parameters=parameters,
        routed_parameters=routed,
        shared_parameters=shared,
        active_parameters=active,
        nbytes=checkpoint.nbytes,
    )


def _slot_maps(checkpoint: Checkpoint) -> dict[int, SlotMap]:
    entry = checkpoint.config.get("quantization_config") or {}
    layers = entry.get("layers", {}) if entry.get("quant_method") == "moefit" else {}
    return {int(layer): SlotMap.from_json(slots) for layer, slots in layers.items()}


def _moe(layer: int, experts: int, slot_map: SlotMap | None, expert_bytes: int) -> MoeSummary:
    if slot_map is None:
        return MoeSummary(layer, experts, experts, 0, (), 0, expert_bytes)
    ranks = tuple(rank for rank in slot_map.ranks or () if rank)
    stored = len(slot_map.slots), slot_map.experts, slot_map.constants
    return MoeSummary(layer, *stored, ranks, len(slot_map.guests), expert_bytes)


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
