"""AWQ checkpoints: 4-bit integers packed along the outputs, eight in a word in an order of their own."""

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

BITS = 4
# Where in a word each of eight outputs lies.
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, kw_only=True)
class Awq(Grouped):
    """Codes [I, O / 8], zero points [G, O / 8] and scales [G, O]."""

    code = "qweight"
    code_dtypes = ("I32",)
    scale = "scales"

    @property
    def label(self) -> str:
        """Groups."""
        return f"AWQ int4, {self.grouping}"

    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return [O, I]."""
        inputs, words = parts["qweight"].shape
        return words * len(PLACE), inputs

    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return codes, zero points and scales."""
        outputs, inputs = shape[-2:]
        groups, words = self.groups(inputs), outputs // len(PLACE)
        return {
            "qweight": (("I32",), [(inputs, words)]),
            "qzeros": (("I32",), [(groups, words)]),
            "scales": (FLOATS, [(groups, outputs)]),
        }

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return (code - zero point) x scale."""
        code, zero = _unpacked(parts["qweight"]), _unpacked(parts["qzeros"])
        return grouped(code.T, parts["scales"].T, zero.T, self.order(shape[1]), dtype)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """Return the integers of some words in order, along the last axis."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32  # here: seconds to import

    size = torch.Size((len(words), words.shape[1] * len(PLACE)))
    return unpack_from_int32(words, BITS, size).unflatten(1, (-1, len(PLACE)))[..., PLACE].flatten(1)


@register_reader("awq")
def read_awq(entry: Mapping[str, Any]) -> list[Quantized]:
    """Read groups."""
    number(entry, "bits", BITS, lambda bits: bits == BITS)
    word({"version": str(entry.get("version", "gemm")).lower()}, "version", ("gemm",))
    if entry.get("zero_point") is False:
        raise CheckpointError("zero_point = False is not handled; give the bf16 or fp32 original")
    return [Awq(group=number(entry, "group_size", 128, lambda size: size == -1 or size > 0))]
