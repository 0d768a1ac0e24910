"""A compressed-tensors checkpoint as the numbers that its packed integers stand for, decoded as they are read.

compressed-tensors does it, by the schemes that config.json gives each module. transformers' own loading has one scheme
for the experts of all layers, leaves their zero points out and loses what else a family merges, so it cannot read all
such checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetailor.checkpoint.files import Checkpoint, TensorInfo
from moetailor.checkpoint.folder import CONFIG
from moetailor.checkpoint.original import Original
from moetailor.errors import CheckpointError, reason_of

METHOD, PACKED = "compressed-tensors", "pack-quantized"


@dataclass(frozen=True)
class DecodedTensor(TensorInfo):
    """A weight whose integers are decoded when it is read; its bytes are those of its parts.

    Attributes:
        parts: where its integers, scales, shape and zero points lie, by compressed-tensors' names.
        scheme: how they are read, compressed-tensors' ``QuantizationScheme``.
    """

    parts: Mapping[str, TensorInfo]
    scheme: Any

    def read(self) -> torch.Tensor:
        """Return the numbers, in the dtype of the scales.

        Raises:
            CheckpointError: the parts do not fit each other or the scheme.
        """
        from compressed_tensors.compressors import BaseCompressor  # here: it takes seconds to import

        compressor = BaseCompressor.get_value_from_registry(PACKED)
        stored: dict[str, torch.Tensor | None] = {name: info.read() for name, info in self.parts.items()}
        try:
            weight = compressor.decompress(stored, self.scheme)["weight"]
            assert weight is not None
        except Exception as error:  # whatever the library raises, it is about what lies there
            raise CheckpointError(f"{self.file}: cannot decode {self.name!r}: {reason_of(error)}") from error
        if tuple(weight.shape) != self.shape:
            raise CheckpointError(f"{self.file}: {self.name!r} decodes to {list(weight.shape)}, not {list(self.shape)}")
        return weight


class Decoded(Original):
    """A compressed-tensors checkpoint, opened once; its weights are the numbers that are stored for them.

    Args:
        folder: where it lies.
        trust_remote_code: run code that comes with it.

    Raises:
        CheckpointError: it cannot be read, or a packed weight has no scheme or several.
    """

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(folder, takes="anything", trust_remote_code=trust_remote_code)
        self.checkpoint = replace(self.checkpoint, tensors=_decoded(self.checkpoint))

    @cached_property
    def plain_config(self) -> Any:
        """Its config without how the weights are stored."""
        config = copy.copy(self.config)
        config.quantization_config = None
        return config

    def load(self, *, dtype: torch.dtype, device: str, device_map: str | None = None) -> nn.Module:
        """Return the model in memory, for inference; a device map is not followed."""
        source = self.streamed(dtype=dtype, device=device)
        for path, _ in source.model.named_children():
            source.load(path)
        return source.model


def open_any(source: str | Path, *, trust_remote_code: bool = False) -> Original:
    """Open a checkpoint that is only loaded: decoded, where it is one of compressed-tensors' packed integers.

    Args:
        source: folder or hub name.
        trust_remote_code: run code that comes with it.

    Raises:
        CheckpointError: it cannot be read.
    """
    opened = Original(source, takes="anything", trust_remote_code=trust_remote_code)
    entry = opened.checkpoint.config.get("quantization_config")
    if isinstance(entry, dict) and (entry.get("quant_method"), entry.get("format")) == (METHOD, PACKED):
        return Decoded(opened.folder, trust_remote_code=trust_remote_code)
    return opened


def _quantization(config: dict) -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(config["quantization_config"])
    except Exception as error:  # whatever the library raises, it is about what somebody wrote there
        raise CheckpointError(f"{CONFIG}: compressed-tensors cannot read it: {reason_of(error)}") from error


def _decoded(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with a weight in place of the parts of each packed one."""
    from compressed_tensors.utils.match import match_name

    told, found = _quantization(checkpoint.config), dict(checkpoint.tensors)
    for key in [key for key in checkpoint.tensors if key.endswith(".weight_packed")]:
        module = key.removesuffix(".weight_packed")
        schemes = [
            scheme
            for scheme in told.config_groups.values()
            if any(match_name(module, target) for target in scheme.targets)
            and not any(match_name(module, name) for name in told.ignore or [])
        ]
        names = {name: f"{module}.{name}" for name in ("weight_packed", "weight_scale", "weight_shape")}
        if len(schemes) == 1 and not schemes[0].weights.symmetric:
            names["weight_zero_point"] = f"{module}.weight_zero_point"
        lost = [name for name in names.values() if name not in checkpoint.tensors]
        if len(schemes) != 1 or lost:
            told_so = f"{lost[0]!r} is missing" if lost else f"{module!r} has {len(schemes)} schemes in {CONFIG}, not 1"
            raise CheckpointError(f"{checkpoint.source}: {told_so}; the checkpoint is damaged")
        parts = {name: found.pop(place) for name, place in names.items()}
        shape, scale = tuple(parts["weight_shape"].read().tolist()), parts["weight_scale"]
        found[f"{module}.weight"] = DecodedTensor(
            name=f"{module}.weight",
            dtype=scale.dtype,
            shape=shape,
            file=scale.file,
            offset=scale.offset,
            nbytes=sum(info.nbytes for info in parts.values()),
            parts=parts,
            scheme=schemes[0],
        )
    return found
