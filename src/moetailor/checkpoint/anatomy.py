"""Where the MoE layers of a model are, and which of its tensors have one row for each expert.

Nothing of this is declared. The model is built twice without weights, once with twice the experts: every tensor and
every integer attribute that differs between the two belongs to the experts or to the router's slots. That holds for
correction biases, per-expert scales and router biases of any name, so a new family costs nothing.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from moetailor.checkpoint import family
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.errors import CheckpointError, reason_of


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One MoE layer of a model in memory; paths are those of ``model.named_modules()``.

    Attributes:
        index: number of the decoder layer.
        block: the module around router and experts (the decoder layer itself in families without one).
        experts: the module that holds the experts as stacked parameters.
        router: the module that returns logits, weights and indices.
        num_experts: experts, which is also the number of slots.
        expert_shape: what an expert is made of.
        expert_rows: parameters of the experts module with a row for each expert, and their axis.
        slot_rows: parameters and buffers elsewhere in the block with a row for each slot, and their axis.
        counts: (module path, attribute) of the integers that hold the number of experts in the block.
    """

    index: int
    block: str
    experts: str
    router: str
    num_experts: int
    expert_shape: ExpertShape
    expert_rows: dict[str, int]
    slot_rows: dict[str, int]
    counts: tuple[tuple[str, str], ...]

    @property
    def width(self) -> int:
        """Numbers of an expert's output, D."""
        return self.expert_shape.width

    @property
    def correction(self) -> str | None:
        """The one of `slot_rows` that corrects the router's choice, by path; a plain ``bias`` is part of its logits."""
        found = (name for name in self.slot_rows if name.endswith("_bias"))
        return next((f"{self.block}.{name}" for name in found), None)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The MoE layers of a model by decoder layer, and what they have in common."""

    model_type: str
    top_k: int
    groups: family.Groups
    probabilities: str
    layers: dict[int, MoELayer]
    model_counts: tuple[tuple[str, str], ...]

    @cached_property
    def by_experts_path(self) -> dict[str, MoELayer]:
        """The layers by the path of their experts module."""
        return {layer.experts: layer for layer in self.layers.values()}


def build_skeleton(
    config: Any, dtype: torch.dtype | None = None, *, of: type | None = None, trust_remote_code: bool = False
) -> Any:
    """Build the causal language model of a config on the meta device: all shapes, no memory.

    Args:
        config: its transformers config.
        dtype: dtype of its parameters; the config's when None.
        of: class of the model; the one that transformers, or the checkpoint's own code, has for the config when None.
        trust_remote_code: run code that comes with the checkpoint to get that class.

    Raises:
        CheckpointError: a family that is refused by name, or one without a causal language model.
    """
    from transformers import AutoModelForCausalLM

    family.check_family(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if of is not None:
            return of._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise CheckpointError(
                f"model type {config.model_type!r} is no causal language model here: {reason_of(error)}"
            ) from None


# Models that `look_at` has built, by class and config.
_LOOKED_AT: dict[tuple[type, str], Any] = {}
# As many are kept: some megabytes each of a model with a hundred layers.
_KEPT = 256


def look_at(config: Any, of: type) -> Any:
    """Return the model of a config on the meta device, to be read and never changed: it is built once, and a stage
    asks for it a dozen times.

    Args:
        config: its transformers config.
        of: class of the model.
    """
    asked = (of, config.to_json_string(use_diff=False))
    if asked not in _LOOKED_AT:
        if len(_LOOKED_AT) == _KEPT:
            _LOOKED_AT.clear()
        _LOOKED_AT[asked] = build_skeleton(config, torch.float32, of=of)
    return _LOOKED_AT[asked]


def discover(config: Any, skeleton: nn.Module | None = None) -> Anatomy:
    """Find the MoE layers of the model that a config describes.

    Args:
        config: transformers config of a causal language model.
        skeleton: the model built from it (on any device); one that transformers itself has is built when None.

    Raises:
        CheckpointError: no MoE layers, a router that cannot work, or a family that is refused by name.
    """
    family.check_family(config)
    family.check_unquantized(config)
    names = family.expert_count_spellings(config)
    if not names:
        raise CheckpointError(
            f"model type {config.model_type!r} has no MoE layers (its config names no expert count: "
            f"{', '.join(family.EXPERT_COUNTS)})"
        )
    doubled = copy.deepcopy(config)
    for name in names:
        setattr(doubled, name, 2 * getattr(config, name))
    small = skeleton if skeleton is not None else build_skeleton(config)
    # Of the same class: code that came with the checkpoint was run, or not, when the first was built.
    large = look_at(doubled, type(small))
    rows, counts = _row_axes(small, large), _count_attributes(small, large)
    paths = sorted({name.rpartition(".")[0] for name in rows if name.endswith(".down_proj")}, key=_layer_number)
    if not paths:
        raise CheckpointError(
            f"model type {config.model_type!r} has no MoE layers that transformers runs as stacked experts"
        )
    layers = [_layer(small, path, rows, counts) for path in paths]
    _refuse_unplaced(config.model_type, rows, layers)
    inside = {count for layer in layers for count in layer.counts}
    top_k, groups = family.top_k(config), family.group_limits(config)
    _check_choice(top_k, groups, layers)
    return Anatomy(
        model_type=config.model_type,
        top_k=top_k,
        groups=groups,
        probabilities=family.router_probabilities(config.model_type),
        layers={layer.index: layer for layer in layers},
        model_counts=tuple(count for count in counts if count not in inside),
    )


def _check_choice(top_k: int, groups: family.Groups, layers: list[MoELayer]) -> None:
    """Refuse a config whose router could not choose as many experts as it says."""
    for layer in layers:
        size, uneven = divmod(layer.num_experts, max(groups.count, 1))
        if uneven or not 1 <= groups.used <= groups.count:
            raise CheckpointError(
                f"config.json: {layer.num_experts} experts in {groups.count} groups, of which a token uses "
                f"{groups.used}; groups must be of one size, and some of them used"
            )
        if not 1 <= top_k <= size * groups.used:
            raise CheckpointError(
                f"config.json: a token goes to {top_k} experts, layer {layer.index} has {size * groups.used} to choose "
                "from"
            )


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _row_axes(small: nn.Module, large: nn.Module) -> dict[str, int]:
    other = tensors_of(large)
    axes = {}
    for name, tensor in tensors_of(small).items():
        if name not in other:  # tied there, and listed under one name only
            continue
        grown = [axis for axis, size in enumerate(tensor.shape) if other[name].shape[axis] != size]
        if grown:
            axes[name] = grown[0]
    return axes


def _count_attributes(small: nn.Module, large: nn.Module) -> list[tuple[str, str]]:
    other = dict(large.named_modules())
    return [
        (path, name)
        for path, module in small.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and vars(other[path]).get(name) == 2 * value != 0
    ]


def _layer(model: nn.Module, experts: str, rows: dict[str, int], counts: list[tuple[str, str]]) -> MoELayer:
    block = experts.rpartition(".")[0]
    inside = {name: axis for name, axis in rows.items() if name.startswith(block + ".")}
    expert_rows = {
        name.removeprefix(experts + "."): axis for name, axis in inside.items() if name.startswith(experts + ".")
    }
    slot_rows = {
        name.removeprefix(block + "."): axis for name, axis in inside.items() if not name.startswith(experts + ".")
    }
    tensors, module = tensors_of(model.get_submodule(block)), cast(Any, model.get_submodule(experts))
    # The router is the part of the block that holds the matrix [slots, hidden].
    routers = [name.split(".")[0] for name in slot_rows if tensors[name].dim() == 2 and name.endswith("weight")]
    if not routers:
        raise CheckpointError(f"{block}: found no router weight with a row for each expert")
    return MoELayer(
        index=_layer_number(experts),
        block=block,
        experts=experts,
        router=f"{block}.{routers[0]}",
        num_experts=module.down_proj.shape[0],
        expert_shape=Experts(module).shape,
        expert_rows=expert_rows,
        slot_rows=slot_rows,
        counts=tuple((path, name) for path, name in counts if path == block or path.startswith(block + ".")),
    )


def _layer_number(path: str) -> int:
    match = re.search(r"\blayers\.(\d+)\b", path)
    if not match:
        raise CheckpointError(f"{path}: experts outside the decoder layers are not supported")
    return int(match[1])


def _refuse_unplaced(model_type: str, rows: dict[str, int], layers: list[MoELayer]) -> None:
    blocks = tuple(layer.block + "." for layer in layers)
    lost = [name for name in rows if not name.startswith(blocks)]
    if lost:
        raise CheckpointError(
            f"model type {model_type!r}: {lost[0]} has a row for each expert outside the MoE blocks; not supported"
        )
