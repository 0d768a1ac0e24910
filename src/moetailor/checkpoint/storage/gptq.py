"""GPTQ checkpoints: integers packed along the inputs, a group for each input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetailor.checkpoint.files import TensorInfo
from moetailor.checkpoint.storage.quantized import (
    FLOATS,
    Allowed,
    Grouped,
    Quantized,
    grouped,
    number,
    register_reader,
    word,
)
from moetailor.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Gptq(Grouped):
    """Codes [I bits / 32, O], zero points [G, O bits / 32], scales [G, O] and the group of each input.

    Attributes:
        bits: of a code.
        less: what is taken from zero points when they are stored: 1 in the first version of the format.
    """

    bits: int
    less: int

    code = "qweight"
    code_dtypes = ("I32",)
    scale = "scales"
    optional = ("g_idx",)

    @property
    def label(self) -> str:
        """Bits and groups."""
        return f"GPTQ int{self.bits}, {self.grouping}"

    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return [O, I]."""
        words, outputs = parts["qweight"].shape
        return outputs, words * 32 // self.bits

    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return codes, zero points, scales and groups."""
        outputs, inputs = shape[-2:]
        groups = self.groups(inputs)
        return {
            "qweight": (("I32",), [(-(-inputs * self.bits // 32), outputs)]),
            "qzeros": (("I32",), [(groups, -(-outputs * self.bits // 32))]),
            "scales": (FLOATS, [(groups, outputs)]),
            "g_idx": (("I32", "I64"), [(inputs,)]),
        }

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return (code - zero point) x scale."""
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32  # here: seconds to import

        (outputs, inputs), scale = shape, parts["scales"].T
        # Both come with 2^(bits - 1) taken off, which is gone in the difference.
        code = unpack_from_int32(parts["qweight"], self.bits, torch.Size((inputs, outputs)), packed_dim=0).T
        zero = unpack_from_int32(parts["qzeros"], self.bits, torch.Size((scale.shape[1], outputs))).T
        return grouped(code, scale, zero.float() + self.less, parts.get("g_idx", self.order(inputs)), dtype)


@register_reader("gptq")
def read_gptq(entry: Mapping[str, Any]) -> list[Quantized]:
    """Read bits, groups, and which version of the format."""
    bits = number(entry, "bits", 4, lambda bits: bits in (2, 3, 4, 8))
    group = number(entry, "group_size", 128, lambda size: size == -1 or size > 0)
    version = word(entry, "checkpoint_format", ("gptq", "gptq_v2"))
    dynamic = entry.get("dynamic")
    others = [rule for rule in dynamic if not rule.startswith("-")] if isinstance(dynamic, dict) else []
    if others:
        raise CheckpointError(f"dynamic has bits of their own for {others[0]!r}; give the bf16 or fp32 original")
    return [Gptq(bits=bits, group=group, less=int(version == "gptq"))]
