"""MXFP4 as gpt-oss has it: 4-bit floats in blocks of 32 inputs, each with a power of two; fused experts.

Shapes: E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from moetailor.checkpoint.files import DTYPES, TensorInfo
from moetailor.checkpoint.storage.quantized import Allowed, Quantized, register_reader

BLOCK = 32
# The exponent of a power of two is stored with this added.
BIAS = 127


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Quantized):
    """Codes [E, O, I / 32, 16], two in a byte with the first in its lower half, and powers of two [E, O, I / 32].

    The weights are [E, I, O]: they lie the other way round.
    """

    code = "_blocks"
    code_dtypes = ("U8",)
    code_axes = 4
    scale = "_scales"
    parameters = ("gate_up_proj", "down_proj")
    leaf = ""

    @property
    def label(self) -> str:
        """MXFP4."""
        return "MXFP4"

    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return [E, I, O]."""
        experts, outputs, blocks, _ = parts["_blocks"].shape
        return experts, blocks * BLOCK, outputs

    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return codes and powers of two."""
        experts, inputs, outputs = shape
        grid = (experts, outputs, inputs // BLOCK)
        return {"_blocks": (self.code_dtypes, [(*grid, BLOCK // 2)]), "_scales": (("U8", "F8_E8M0"), [grid])}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return code times power of two; one expert at a time, for memory."""
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        found = torch.empty(shape, dtype=DTYPES[dtype])
        # What the two codes of each byte stand for: looked up, that takes a fraction of the time.
        pairs = unpack_fp4_from_uint8(torch.arange(256, dtype=torch.uint8), 256, 2, torch.float32)
        for expert in range(shape[0]):
            power = parts["_scales"][expert].view(torch.uint8).to(torch.int32) - BIAS
            scale = torch.ldexp(torch.ones(power.shape), power)[..., None]
            numbers = F.embedding(parts["_blocks"][expert].int(), pairs).flatten(2) * scale
            found[expert] = numbers.flatten(1).T
        return found


@register_reader("mxfp4")
def read_mxfp4(entry: Mapping[str, Any]) -> list[Quantized]:
    """Read nothing: there is one form."""
    return [Mxfp4()]
