"""How the weights of quantized checkpoints lie: what one way to store them declares. They are read, never written.

A weight is several stored tensors, its parts: codes, and what turns codes into numbers. Which way a checkpoint has says
the `quantization_config` of its config.json, read by one function for each `quant_method`.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moetailor.checkpoint.files import DTYPES, TensorInfo
from moetailor.errors import CheckpointError

FLOATS = ("F32", "BF16", "F16")
# A part's dtypes and shapes: those that it may have.
Allowed = tuple[Sequence[str], Sequence[tuple[int, ...]]]
Reader = Callable[[Mapping[str, Any]], "list[Quantized]"]
READERS: dict[str, Reader] = {}


@dataclass(frozen=True, kw_only=True)
class Quantized(ABC):
    """One way in which a weight lies as codes.

    Attributes:
        targets: modules whose weights lie so, names or regular expressions after ``re:``; all where it is empty.
        code: the part that has the codes; a tensor of this name and dtype says that a weight lies so.
        code_dtypes: its dtypes.
        code_axes: its axes.
        scale: the part that has the scales.
        optional: parts that may be missing.
        beside: parts that go with the weight but say nothing of its numbers, such as scales of activations.
        parameters: what the weights are called in their modules.
        leaf: of that, what the names of the parts have in its place.
    """

    targets: tuple[str, ...] = ()

    code: ClassVar[str]
    code_dtypes: ClassVar[tuple[str, ...]]
    code_axes: ClassVar[int] = 2
    scale: ClassVar[str]
    optional: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[tuple[str, ...]] = ("weight",)
    leaf: ClassVar[str] = "weight"

    @property
    @abstractmethod
    def label(self) -> str:
        """It in a few words."""

    @abstractmethod
    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return the shape of the weight.

        Args:
            parts: its parts, as they lie.
        """

    @abstractmethod
    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return what each part must be: `optional` ones where they are there.

        Args:
            shape: of the weight.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return the numbers.

        Args:
            parts: the stored tensors.
            shape: of the weight.
            dtype: safetensors dtype of the numbers.
        """

    def weight_of(self, info: TensorInfo) -> str | None:
        """Return the weight whose codes a stored tensor is, if it is that."""
        stem = info.name.removesuffix(self.code)
        if stem == info.name or info.dtype not in self.code_dtypes or not (stem.endswith(".") or not self.leaf):
            return None
        return stem + self.leaf if self._covers(stem.rstrip(".")) else None

    def _covers(self, module: str) -> bool:
        from compressed_tensors.utils.match import match_name

        # A target without a dot names a class of modules, of which only Linear has weights here.
        named = [target for target in self.targets if target.startswith("re:") or "." in target]
        return len(named) < len(self.targets) or not named or any(match_name(module, target) for target in named)

    def named(self, weight: str, part: str) -> str:
        """Return the name of a part of a weight."""
        return weight.removesuffix(self.leaf) + part

    def parts_of(self, weight: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the parts that a weight has among some stored tensors."""
        every = {part: self.named(weight, part) for part in self.names}
        return {part: tensors[name] for part, name in every.items() if name in tensors}

    @property
    def names(self) -> list[str]:
        """The names of all parts."""
        return [*self.expected((1,) * 3), *self.beside]

    def missing(self, parts: Collection[str]) -> list[str]:
        """Return the parts that a weight lacks which has some."""
        return [part for part in self.names if part not in (*parts, *self.optional, *self.beside)]

    def misfit(self, shape: tuple[int, ...], parts: Mapping[str, TensorInfo]) -> str | None:
        """Return a part of a dtype or shape that it may not have, if there is one.

        Args:
            shape: of the weight.
            parts: its parts.
        """
        for part, (dtypes, shapes) in self.expected(shape).items():
            info = parts.get(part)
            if info is not None and (info.dtype not in dtypes or info.shape not in shapes):
                return part
        return None

    def numbers_dtype(self, parts: Mapping[str, TensorInfo]) -> str:
        """Return the safetensors dtype of a weight's numbers: float16 where scales are that, else bfloat16."""
        return "F16" if parts[self.scale].dtype == "F16" else "BF16"


@dataclass(frozen=True, kw_only=True)
class Grouped(Quantized):
    """Integers whose scales and zero points are those of groups of inputs.

    Attributes:
        group: inputs that share a scale; -1 for all.
    """

    group: int

    @property
    def grouping(self) -> str:
        """The groups in words."""
        return f"groups of {self.group}" if self.group > 0 else "by row"

    def groups(self, inputs: int) -> int:
        """Return how many groups there are."""
        return -(-inputs // self.group) if self.group > 0 else 1

    def order(self, inputs: int) -> torch.Tensor:
        """Return the group of each input where they lie in order, [I]."""
        return torch.arange(inputs) // (self.group if self.group > 0 else inputs)


def grouped(
    code: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group_I: torch.Tensor, dtype: str
) -> torch.Tensor:
    """Return (q - z) s, [O, I].

    Args:
        code: q, [O, I].
        scale: s, [O, G].
        zero: z, [O, G]; None for zero.
        group_I: the group of each input.
        dtype: safetensors dtype of the numbers.
    """
    group_I = group_I.long()
    numbers = code.float() if zero is None else code.float() - zero.float()[:, group_I]
    return (numbers * scale.float()[:, group_I]).to(DTYPES[dtype])


def number(entry: Mapping[str, Any], name: str, default: int, allowed: Callable[[int], bool]) -> int:
    """Return a whole number of a quantization_config.

    Raises:
        CheckpointError: it is none, or one that is not handled.
    """
    value = entry.get(name, default)
    if type(value) is not int or not allowed(value):
        raise CheckpointError(f"{name} = {value!r} is not handled; give the bf16 or fp32 original")
    return value


def word(entry: Mapping[str, Any], name: str, allowed: Sequence[str]) -> str:
    """Return a word of a quantization_config, the first that is allowed where it says none.

    Raises:
        CheckpointError: it is none that is handled.
    """
    value = allowed[0] if entry.get(name) is None else entry[name]
    if value not in allowed:
        told = f"{name} = {value!r} is not handled, {' and '.join(allowed)} are"
        raise CheckpointError(f"{told}; give one of these, or the bf16 or fp32 original")
    return value


def register_reader(method: str) -> Callable[[Reader], Reader]:
    """Make a function known that reads the quantization_config of a quant_method."""
    assert method not in READERS, f"{method} is registered twice"
    return lambda reader: READERS.setdefault(method, reader)


def ways_of(entry: Mapping[str, Any]) -> list[Quantized]:
    """Return the ways in which weights may lie that a quantization_config tells of.

    Args:
        entry: the quantization_config, of a method that is known.

    Raises:
        CheckpointError: something in it is not handled.
    """
    method = entry["quant_method"]
    try:
        return READERS[method](entry)
    except CheckpointError as error:
        raise CheckpointError(f"weights are quantized ({method}): {error}") from None
