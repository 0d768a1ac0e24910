"""FP8: codes of e4m3, with a scale for each block of a matrix, for each row, or for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetailor.checkpoint.files import DTYPES, TensorInfo
from moetailor.checkpoint.storage.quantized import FLOATS, Allowed, Quantized, register_reader, word
from moetailor.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Fp8(Quantized):
    """Numbers are code times scale.

    Attributes:
        block: outputs and inputs that share a scale; 0 for all of them.
    """

    block: tuple[int, int]

    code = "weight"
    code_dtypes = ("F8_E4M3",)
    scale = "weight_scale_inv"
    beside = ("activation_scale", "input_scale")

    @property
    def label(self) -> str:
        """FP8, and what shares a scale."""
        outputs, inputs = self.block
        if outputs and inputs:
            return f"FP8 in blocks of {outputs} x {inputs}"
        return "FP8 by row" if outputs else "FP8"

    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return the shape of the codes."""
        return parts["weight"].shape

    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return a grid of scales beside the codes."""
        grid = self._grid(shape)
        # Grids of one column or one number may have lost that axis.
        shapes = {0: [grid], 1: [grid, grid[:1]], 2: [(), (1,), grid]}[self.block.count(0)]
        return {"weight": (self.code_dtypes, [shape]), self.scale: ((*FLOATS, "F8_E8M0"), shapes)}

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-size // each) if each else 1 for size, each in zip(shape[-2:], self.block, strict=True))

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return code times scale, multiplied in float32."""
        scale = parts[self.scale].float().reshape(self._grid(shape))
        for axis, each in enumerate(self.block):
            scale = scale.repeat_interleave(each or shape[axis], axis).narrow(axis, 0, shape[axis])
        return (parts["weight"].float() * scale).to(DTYPES[dtype])


class ScaledFp8(Fp8):
    """The same, with the scales under the name that compressed-tensors gives them."""

    scale = "weight_scale"


@register_reader("fp8")
def read_fp8(entry: Mapping[str, Any]) -> list[Quantized]:
    """Read ``weight_block_size``: blocks as DeepSeek-V3 and Qwen3 have them, or one scale for a matrix, perhaps under
    compressed-tensors' name.
    """
    word(entry, "activation_scheme", ("dynamic", "static"))
    word(entry, "fmt", ("e4m3", "float8_e4m3fn"))
    block = entry.get("weight_block_size")
    if block is None:
        return [Fp8(block=(0, 0)), ScaledFp8(block=(0, 0))]
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise CheckpointError(f"weight_block_size = {block!r}: not two sizes; put it right")
    return [Fp8(block=(block[0], block[1]))]
