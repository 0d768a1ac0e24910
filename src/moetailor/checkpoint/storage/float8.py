"""Floats of 8 bits, e4m3, with a scale for each row: what compressed-tensors calls FP8 by channel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moetailor.checkpoint.storage.few_bits import Codes, FewBits
from moetailor.checkpoint.storage.lookup import Lookup, lookup
from moetailor.checkpoint.storage.storage import register_storage

FLOAT8 = torch.float8_e4m3fn
MOST = torch.finfo(FLOAT8).max
# Sign, exponent and mantissa in a float16: the sign's copy behind it is none of the exponent.
KEPT = -0x4080


@dataclass(frozen=True, kw_only=True)
class Float8(FewBits):
    """A float of 8 bits times the scale of its row, which takes the row's largest weight to the largest float."""

    bits: int = 8
    group: int = 2**31

    name = "fp8"

    @property
    def noise(self) -> float:
        """Three bits behind the leading one: errors of up to a sixteenth, squared, a third of it over all."""
        return 2.0**-8 / 3

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return codes, as bytes: what casts a model or sends it elsewhere leaves these alone, and scales."""
        return {"_packed": ("U8", shape), "_scale": (dtype, (*shape[:2], 1))}

    def listed(self, code: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the floats."""
        return floats(code)

    def units(self, packed: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the floats."""
        return floats(packed.view(torch.int8))

    def look_up(self, device: torch.device) -> Lookup:
        """Return the floats."""
        return lookup("float8", device, lambda device: replace(Lookup.of(_table(device), self.bits), told="float8"))

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
        return {"_packed": codes.code.view(torch.uint8), "_scale": codes.scale}

    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the largest of each row over the largest float: smaller numbers have as many bits as larger ones."""
        scale = (weight.abs().amax(-1, keepdim=True) / MOST).to(dtype)
        return torch.where(scale > 0, scale, torch.ones_like(scale)), None

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Return the bits of the nearest floats, int8 [n, O, I]."""
        code = float8(self.parted(weight) / scale.float()[..., None]).view(torch.int8)
        return code.flatten(-2)[..., : weight.shape[-1]]

    def choose(
        self, weight: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest floats, whatever the metric is."""
        near = float8(weight / scale)
        return near[0].view(torch.int8).float(), near.float() * scale


def float8(at: torch.Tensor) -> torch.Tensor:
    """Return the nearest floats; of what is larger than the largest one, that: it would be none."""
    return at.clamp(-MOST, MOST).to(FLOAT8)


def floats(code: torch.Tensor) -> torch.Tensor:
    """Return what floats of 8 bits are in float32; none is NaN.

    Args:
        code: their bits, int8.
    """
    # Moved into the places of a float16, whose exponents count from another number, bits say 2^-8 times as much. That
    # is several times sooner than what torch does with floats of 8 bits.
    half = code.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(KEPT).view(torch.float16)
    return half.float().mul_(2.0**8)


def _table(device: torch.device) -> torch.Tensor:
    return floats(torch.arange(256, device=device).to(torch.uint8).view(torch.int8))[:, None]


register_storage(Float8())
