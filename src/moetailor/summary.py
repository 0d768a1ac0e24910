"""What a checkpoint is, read off its headers: layers, experts, top-k, parameters, bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moetailor.answers import SlotMap
from moetailor.checkpoint.anatomy import Anatomy, MoELayer, tensors_of
from moetailor.checkpoint.files import Checkpoint
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.original import Original, looked_at
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import CheckpointError
from moetailor.runtime.quantizer import MoetailorConfig
from moetailor.words import spans


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """Decoder layers of one make.

    Attributes:
        layers: which, such as ``0-15``.
        size: how many.
        slots: outputs of the router.
        experts: experts stored, shared bases included.
        stand_ins: slots behind which a constant, a linear map or a base with an own part stands.
        ranks: lowest and highest rank of the maps and own parts; empty when there are none.
        runs: slots of a token that run an expert: the router's top-k, fewer where some are auxiliary.
        expert_bytes: bytes of one expert.
    """

    layers: str
    size: int
    slots: int
    experts: int
    stand_ins: int
    ranks: tuple[int, ...]
    runs: int
    expert_bytes: int


@dataclass(frozen=True)
class MoeSummary:
    """One MoE layer that the model runs; see `LayerSummary`, and `borrowed`: slots that other layers answer."""

    layer: int
    slots: int
    experts: int
    stand_ins: int
    ranks: tuple[int, ...]
    runs: int
    borrowed: int
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
        active_parameters: those that one token uses when each slot that runs has an expert; of what stands in for
            experts or modulates them, the mean over slots.
        nbytes: bytes of all tensors.
        lies: how the experts lie, in words; ``plain`` as their numbers.
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
    lies: str = "plain"

    def groups(self) -> list[LayerSummary]:
        """Return the MoE layers, those of one make together."""
        kinds: dict[tuple, list[int]] = {}
        for moe in self.moe:
            ends = (min(moe.ranks), max(moe.ranks)) if moe.ranks else ()
            made = dict(slots=moe.slots, experts=moe.experts, stand_ins=moe.stand_ins, ranks=ends, runs=moe.runs)
            kinds.setdefault(tuple((made | {"expert_bytes": moe.expert_bytes}).items()), []).append(moe.layer)
        return [
            LayerSummary(layers=spans(layers, ","), size=len(layers), **dict(made)) for made, layers in kinds.items()
        ]

    def to_json(self) -> dict:
        """Return the summary as JSON values."""
        return asdict(self)


def summarise(source: str | Path, *, trust_remote_code: bool = False) -> Summary:
    """Look at a checkpoint, original or compressed, without reading its weights; nor are they downloaded.

    Args:
        source: folder or hub name.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CheckpointError: not a checkpoint of a supported MoE family.
    """
    with looked_at(source, takes="results", trust_remote_code=trust_remote_code) as original:
        return _summarised(str(source), original)


def _summarised(source: str, original: Original) -> Summary:
    checkpoint, skeleton, anatomy = original.checkpoint, original.skeleton, original.anatomy
    maps = _slot_maps(checkpoint)
    shared = _shared_parameters(skeleton, anatomy)
    # An expert has the same shape in original and compressed layers; its size is that of the skeleton's rows.
    tensors = tensors_of(skeleton.model)
    numbers = {
        index: sum(tensors[f"{layer.experts}.{name}"].numel() for name in layer.expert_rows) // layer.num_experts
        for index, layer in anatomy.layers.items()
    }
    sizes = _stored_sizes(checkpoint, skeleton, anatomy, maps)
    moe = tuple(
        _moe(checkpoint, anatomy.layers[index], anatomy.top_k, maps.get(index), sizes[index])
        for index in sorted(anatomy.layers)
    )
    # What lies as codes and scales counts as the numbers that it stands for.
    parameters = checkpoint.parameters + sum(
        math.prod(spec.shape) - sum(math.prod(shape) for _, shape in spec.parts("", "F32").values())
        for index, slot_map in maps.items()
        for spec in slot_map.tensors(anatomy.layers[index].expert_shape).values()
    )
    routed = {layer.layer: layer.experts * numbers[layer.layer] for layer in moe}
    for index, slot_map in maps.items():
        layer = anatomy.layers[index]
        stays = slot_map.whole_experts - slot_map.experts + len(slot_map.plain_pool)
        routed[index] = stays * numbers[index] + sum(math.prod(s.shape) for s in _beside(layer, slot_map).values())
    light = {index: _light_parameters(anatomy.layers[index], slot_map) for index, slot_map in maps.items()}
    active = parameters - sum(routed.values()) - sum(light.values())
    active += sum(layer.runs * routed[layer.layer] // layer.experts for layer in moe)
    # Where some slots are auxiliary, those that run have nothing of their own beside their experts.
    beside = {layer.layer: anatomy.top_k - layer.runs or anatomy.top_k for layer in moe}
    active += sum(beside[layer.layer] * light.get(layer.layer, 0) // layer.slots for layer in moe)
    return Summary(
        source=source,
        model_type=anatomy.model_type,
        decoder_layers=original.config.num_hidden_layers,
        top_k=anatomy.top_k,
        moe=moe,
        parameters=parameters,
        routed_parameters=sum(routed.values()),
        shared_parameters=shared,
        active_parameters=active,
        nbytes=checkpoint.nbytes,
        lies=_how_experts_lie(checkpoint, skeleton, anatomy),
    )


def _slot_maps(checkpoint: Checkpoint) -> dict[int, SlotMap]:
    entry = checkpoint.config.get("quantization_config") or {}
    return MoetailorConfig(**entry).slot_maps() if entry.get("quant_method") == "moetailor" else {}


def _moe(
    checkpoint: Checkpoint, layer: MoELayer, top_k: int, slot_map: SlotMap | None, expert_bytes: int
) -> MoeSummary:
    if slot_map is None:
        return MoeSummary(layer.index, layer.num_experts, layer.num_experts, 0, (), top_k, 0, expert_bytes)
    others = [answer for answer in slot_map.answers if answer is not None]
    light = [answer for answer, row in zip(slot_map.answers, slot_map.rows, strict=True) if answer and row < 0]
    if (plain := len(slot_map.plain_pool)) < slot_map.experts:
        own = tuple(f"{layer.experts}.{name}" for name in _beside(layer, slot_map))
        beside = sum(info.nbytes for name, info in checkpoint.tensors.items() if name.startswith(own))
        expert_bytes = (plain * expert_bytes + beside) // slot_map.experts
    return MoeSummary(
        layer=layer.index,
        slots=len(slot_map.rows),
        experts=slot_map.whole_experts,
        stand_ins=sum(answer.lender() is None for answer in light),
        ranks=tuple(rank for answer in light if (rank := getattr(answer, "rank", 0))),
        runs=min((answer.running(top_k) for answer in others), default=top_k),
        borrowed=sum(answer.lender() is not None for answer in light),
        expert_bytes=expert_bytes,
    )


def _light_parameters(layer: MoELayer, slots: SlotMap) -> int:
    """Return the numbers that answers store beside the pool, those of whole experts left out."""
    shape = layer.expert_shape
    beside = _beside(layer, slots)
    numbers = sum(math.prod(spec.shape) for name, spec in slots.tensors(shape).items() if name not in beside)
    return numbers - (slots.whole_experts - slots.experts) * sum(map(math.prod, shape.tensors.values()))


def _beside(layer: MoELayer, slots: SlotMap) -> dict[str, TensorSpec]:
    """Return the tensors of experts of the pool that are no rows of the family's parameters."""
    found = (kind.tensors(slots, layer.expert_shape) for kind in slots.kinds if kind.beside)
    return {name: spec for tensors in found for name, spec in tensors.items()}


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


def _rows(anatomy: Anatomy) -> dict[str, int]:
    """Return the layer of each parameter with a row for each expert."""
    return {f"{layer.experts}.{name}": index for index, layer in anatomy.layers.items() for name in layer.expert_rows}


def _how_experts_lie(checkpoint: Checkpoint, skeleton: StreamedModel, anatomy: Anatomy) -> str:
    rows = _rows(anatomy)
    found = {checkpoint.numbers[key].lies for key, name in skeleton.names.items() if name in rows} - {"plain"}
    return ", ".join(sorted(found)) or "plain"


def _stored_sizes(
    checkpoint: Checkpoint, skeleton: StreamedModel, anatomy: Anatomy, maps: Mapping[int, SlotMap]
) -> dict[int, int]:
    """Return by layer the bytes of an expert that lies as the original has it, 0 where none does."""
    rows, total = _rows(anatomy), Counter()
    for key, name in skeleton.names.items():
        if name in rows:
            total[rows[name]] += checkpoint.numbers[key].nbytes
    counts = {i: len(maps[i].plain_pool) if i in maps else layer.num_experts for i, layer in anatomy.layers.items()}
    if lost := [index for index, count in sorted(counts.items()) if count and not total[index]]:
        raise CheckpointError(
            f"{checkpoint.source}: has no experts for MoE layers {lost}; the checkpoint is incomplete"
        )
    return {index: total[index] // max(count, 1) for index, count in counts.items()}
