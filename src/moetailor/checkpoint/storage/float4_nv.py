"""NVFP4: floats of 4 bits in groups of 16 inputs, each with a scale of 8 bits, e4m3, and one scale for the matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moetailor.checkpoint.storage.few_bits import Codes
from moetailor.checkpoint.storage.float4 import MOST, Float4
from moetailor.checkpoint.storage.float8 import MOST as MOST_SCALE
from moetailor.checkpoint.storage.float8 import float8, floats
from moetailor.checkpoint.storage.storage import register_storage

# Scales that are tried, as floats of 8 bits further on than the one that takes the largest weight of a group to 6: at
# half as much again it is a 4, and nothing falls into the wide gap between these.
TRIED = range(-3, 7)
# Codes of the smallest and the largest scale.
CODES = (1, 126)


@dataclass(frozen=True, kw_only=True)
class NvFloat4(Float4):
    """Floats times a scale of 8 bits over that of the matrix.

    The latter is any number elsewhere; here it is a power of two, with which nothing is lost, as scales of 8 bits have
    exponents of their own: all numbers are then exact in bfloat16, whatever the order of products is.
    """

    group: int = 16

    name = "nvfp4"
    tries = len(TRIED)

    @property
    def noise(self) -> float:
        """As measured."""
        return 0.0066

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return codes, scales, as bytes, and the matrix's, a float32 as its bits, for the same reason."""
        return super().parts(shape, dtype) | {"_global_scale": ("I32", (shape[0], 1))}

    def whole(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the power of two which takes the largest scale to between a quarter and a half of the largest float
        of 8 bits: scales may still grow when errors are made up for.
        """
        peak = weight.abs().amax((1, 2), keepdim=True)
        room = (MOST * MOST_SCALE / 2 / torch.where(peak > 0, peak, 1.0)).log2().floor()
        return room.clamp(-100, 100).exp2()

    def tried(self, peak: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield floats of 8 bits next to the one that takes the largest of a group to the largest float."""
        code = float8(peak / MOST).view(torch.int8)
        for further in TRIED:
            yield floats((code + further).clamp(*CODES))

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
        assert codes.whole is not None
        scale = float8(codes.scale * codes.whole).view(torch.uint8)
        return super().pack(codes) | {"_scale": scale, "_global_scale": codes.whole[..., 0].view(torch.int32)}

    def scales(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor:
        """Return the scales of the groups over that of the matrix."""
        return floats(parts["_scale"].view(torch.int8)) / parts["_global_scale"].view(torch.float32)[..., None]


register_storage(NvFloat4())
