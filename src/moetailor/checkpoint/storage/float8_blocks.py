"""Floats of 8 bits, e4m3, with a scale for each block of 128 x 128: what compressed-tensors calls FP8 by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moetailor.checkpoint.storage.few_bits import Codes
from moetailor.checkpoint.storage.float8 import MOST, Float8
from moetailor.checkpoint.storage.storage import register_storage

BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class BlockFloat8(Float8):
    """A float of 8 bits times the scale of its block, which takes the block's largest weight to the largest float.

    Blocks at the ends of outputs and inputs may have fewer.
    """

    group: int = BLOCK

    name = "fp8b128"
    high = BLOCK

    def size(self, inputs: int) -> int:
        """Return the inputs of a block."""
        return self.group

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return codes, as bytes, and scales."""
        count, outputs, inputs = shape
        return {"_packed": ("U8", shape), "_scale": (dtype, (count, -(-outputs // BLOCK), self.groups(inputs)))}

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
        return {"_packed": codes.code.view(torch.uint8), "_scale": codes.scale[:, ::BLOCK]}

    def scales(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor:
        """Return the scale of each output."""
        return parts["_scale"].repeat_interleave(BLOCK, 1)[:, :outputs]

    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the largest of each block over the largest float, for each output."""
        outputs = weight.shape[1]
        peak = F.pad(self.parted(weight).abs().amax(-1), (0, 0, 0, -outputs % BLOCK))
        scale = (peak.unflatten(1, (-1, BLOCK)).amax(2) / MOST).to(dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale.repeat_interleave(BLOCK, 1)[:, :outputs], None


register_storage(BlockFloat8())
