"""The weights of a quantized checkpoint: each under the name that an unquantized one has, with the parts it lies in.

Here is the one place where codes become numbers: whatever reads a weight asks for it by this name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetailor.checkpoint.family import QUANT_METHOD
from moetailor.checkpoint.files import Checkpoint, TensorInfo
from moetailor.checkpoint.storage import READERS, Quantized, ways_of
from moetailor.errors import CheckpointError

CURE = "the checkpoint is damaged or incomplete: download it again"


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A weight that lies as codes, read as its numbers.

    Attributes:
        name: what an unquantized checkpoint calls it.
        dtype: safetensors dtype of its numbers.
        shape: its shape.
        way: how it lies.
        parts: what it lies in, by the names that `way` has for them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    way: Quantized
    parts: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(info.nbytes for info in self.parts.values())

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The parts."""
        return tuple(self.parts.values())

    @property
    def lies(self) -> str:
        """How it lies, in words."""
        return self.way.label

    def read(self) -> torch.Tensor:
        """Read the codes and return the numbers.

        Raises:
            CheckpointError: a file ends before the weight does.
        """
        parts = {part: info.read() for part, info in self.parts.items() if part not in self.way.beside}
        return self.way.decode(parts, self.shape, self.dtype)


def source_entry(config: Mapping[str, Any]) -> dict | None:
    """Return what config.json says of how weights are quantized, where that is handled; of a result of moetailor, what
    its original said.
    """
    entry = config.get("quantization_config")
    if isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD:
        entry = entry.get("source")
    known = isinstance(entry, dict) and isinstance(entry.get("quant_method"), str) and entry["quant_method"] in READERS
    return entry if known else None


def ways_in(config: Mapping[str, Any]) -> list[Quantized]:
    """Return the ways in which weights of a checkpoint may lie as codes.

    Args:
        config: its config.json.

    Raises:
        CheckpointError: something in it is not handled.
    """
    entry = source_entry(config)
    return [] if entry is None else ways_of(entry)


def with_codes(checkpoint: Checkpoint) -> Checkpoint:
    """Return an opened checkpoint that knows which of its weights lie as codes.

    Raises:
        CheckpointError: codes without scales, scales without codes, or parts that do not fit each other.
    """
    ways = ways_in(checkpoint.config)
    if not ways:
        return checkpoint
    found: dict[str, Coded] = {}
    for info in checkpoint.tensors.values():
        fitting = [(name, way) for way in ways if (name := way.weight_of(info)) is not None]
        if len(fitting) > 1:  # the same codes, whose other parts have other names
            whole = [(name, way) for name, way in fitting if not way.missing(way.parts_of(name, checkpoint.tensors))]
            fitting = whole or fitting
        for name, way in fitting[:1]:
            found[name] = _checked(checkpoint, name, way)
    if not found and "source" not in checkpoint.config["quantization_config"]:
        # Such as transformers and engines would load in a way of their own, or not at all.
        method = checkpoint.config["quantization_config"]["quant_method"]
        told = f"config.json says that weights are quantized ({method}), and none lies so; take that entry out, or"
        raise CheckpointError(f"{checkpoint.source}: {told} download the checkpoint again")
    if both := sorted(
        name for name in found if name in checkpoint.tensors and found[name].way.code != found[name].way.leaf
    ):
        raise CheckpointError(f"{checkpoint.source}: {both[0]!r} lies there and as codes too; delete what is not meant")
    taken = {info.name for coded in found.values() for info in coded.stored}
    endings = {f".{part}" if way.leaf else part: way for way in ways for part in way.names if part != way.leaf}
    for name in checkpoint.tensors:
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is not None and name not in taken:
            raise CheckpointError(
                f"{checkpoint.source}: {name!r} goes with quantized weights that are not there; {CURE}"
            )
    return replace(checkpoint, coded=found)


def _checked(checkpoint: Checkpoint, name: str, way: Quantized) -> Coded:
    """Return a weight whose parts are all there and fit each other."""
    where, parts = f"{checkpoint.source}: ", way.parts_of(name, checkpoint.tensors)
    code = parts[way.code]
    if lost := way.missing(parts):
        raise CheckpointError(
            f"{where}{code.name!r} is {way.label}, and {way.named(name, lost[0])!r} is missing; {CURE}"
        )
    if len(code.shape) != way.code_axes:
        told = f"{code.name!r} is {way.label} and has shape {list(code.shape)}, not {way.code_axes} axes"
        raise CheckpointError(f"{where}{told}; {CURE}")
    shape = way.shape(parts)
    if (odd := way.misfit(shape, parts)) is not None:
        info, (dtypes, shapes) = parts[odd], way.expected(shape)[odd]
        raise CheckpointError(
            f"{where}{info.name!r} is {info.dtype} {list(info.shape)}; a weight of {list(shape)} that is {way.label} "
            f"has {' or '.join(dtypes)} {list(shapes[0])} there; {CURE}"
        )
    return Coded(name=name, dtype=way.numbers_dtype(parts), shape=shape, way=way, parts=parts)


def described_ways(ways: Sequence[Quantized]) -> dict[str, list[str]]:
    """Return the names of all parts that a parameter may lie in, by the parameter's own name in its module."""
    found: dict[str, list[str]] = {}
    for way in ways:
        for parameter in way.parameters:
            names = found.setdefault(parameter, [])
            names += [name for part in way.names if (name := way.named(parameter, part)) not in names]
    return found
