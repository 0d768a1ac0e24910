"""MXFP4: floats of 4 bits in groups of 32 inputs, each with a power of two (the OCP Microscaling Formats)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moetailor.checkpoint.storage.few_bits import Codes
from moetailor.checkpoint.storage.float4 import MOST, Float4
from moetailor.checkpoint.storage.storage import register_storage

# Exponents that are tried, over that of the largest power of two which leaves no float of a group unused.
TRIED = (1, 0, -1)
# Of float32 and of the byte that stands for an exponent: bits behind it, exponents that stay normal numbers.
MANTISSA, EXPONENTS = 23, (-126, 127)


@dataclass(frozen=True, kw_only=True)
class MxFloat4(Float4):
    """Floats times a power of two, which is stored as its exponent and 127."""

    group: int = 32

    name = "mxfp4"
    tries = len(TRIED)

    @property
    def noise(self) -> float:
        """As measured."""
        return 0.0125

    def tried(self, peak: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield powers of two next to the one that takes the largest of a group to the largest float."""
        exponent = (peak / MOST).log2().floor()
        for more in TRIED:
            yield (exponent + more).clamp(*EXPONENTS).exp2()

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
        # A power of two has nothing but its exponent, which float32 and the byte count from the same number.
        power = codes.scale.contiguous().view(torch.int32) >> MANTISSA
        return super().pack(codes) | {"_scale": power.to(torch.uint8)}

    def scales(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor:
        """Return powers of two."""
        return (parts["_scale"].int() << MANTISSA).view(torch.float32)


register_storage(MxFloat4())
