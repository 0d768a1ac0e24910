"""Integers of few bits in groups, as compressed-tensors' ``pack-quantized`` has them.

A code q in -2^(b-1) .. 2^(b-1) - 1 stands for (q - z) s; the scale s and the zero point z (0 where codes are symmetric)
are those of a group of inputs of one output. Shapes: n matrices, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from moetailor.checkpoint.storage.few_bits import Codes, FewBits
from moetailor.checkpoint.storage.lookup import Lookup, longer, lookup
from moetailor.checkpoint.storage.storage import register_storages

BITS = range(2, 9)
# Shares of a group's range that its codes may cover; from 5 bits up nothing is won by cutting any off.
CLIPS = (torch.linspace(1.0, 0.6, 9), torch.ones(1))
# The highest bit of each byte of a word.
FLIP = -0x7F7F7F80
# Integers of some bytes.
OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Integers(FewBits):
    """Integers in groups, named ``int4g128`` (symmetric) or ``uint4g128`` (with zero points).

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: whether there are no zero points.
    """

    symmetric: bool

    @property
    def name(self) -> str:  # type: ignore[override]
        """As `TensorSpec` names it."""
        return f"{'' if self.symmetric else 'u'}int{self.bits}g{self.group}"

    @property
    def noise(self) -> float:
        """Each bit more halves the steps."""
        return 4.0**-self.bits

    @property
    def tries(self) -> int:  # type: ignore[override]
        """Shares of a group's range."""
        return len(CLIPS[self.bits > 4])

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return codes, scales and, unless symmetric, zero points; codes lie along the inputs, zero points along the
        outputs, in words of 32 bits.
        """
        count, outputs, inputs = shape
        groups = self.groups(inputs)
        found = {
            "_packed": ("I32", (count, outputs, -(-inputs * self.bits // 32))),
            "_scale": (dtype, (count, outputs, groups)),
        }
        zero = {"_zero_point": ("I32", (count, -(-outputs * self.bits // 32), groups))}
        return found | ({} if self.symmetric else zero)

    def listed(self, code: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the codes as numbers."""
        return code.float()

    def units(self, packed: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the codes as numbers."""
        if self.bits == 8:  # 128 is added to each
            octets = (packed ^ FLIP).flatten().view(torch.int8).view(*packed.shape[:-1], -1)
            return octets[..., :inputs].float()
        return super().units(packed, inputs)

    def look_up(self, device: torch.device) -> Lookup | None:
        """Return the codes as numbers; those of 8 bits are bytes."""
        if self.bits == 8:
            return None
        return lookup(f"int{self.bits}", device, partial(Lookup.of_integers, self.bits))

    def zeros(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor | None:
        """Return the zero points, unless codes are symmetric."""
        if self.symmetric:
            return None
        return unpacked(parts["_zero_point"].transpose(1, 2), self.bits, outputs).transpose(1, 2)

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        count, outputs, _ = codes.code.shape
        packed = pack_to_int32(codes.code.flatten(0, 1), self.bits).view(count, outputs, -1)
        found = {"_packed": packed, "_scale": codes.scale}
        if codes.zero is not None:
            lying = codes.zero.transpose(1, 2)
            words = pack_to_int32(lying.flatten(0, 1), self.bits).view(count, lying.shape[1], -1)
            found["_zero_point"] = words.transpose(1, 2)
        return found

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Return the nearest codes, int8 [n, O, I]."""
        at = self.parted(weight) / scale.float()[..., None]
        code = self.codes_at(at if zero is None else at + zero.float()[..., None]).to(torch.int8)
        return code.flatten(-2)[..., : weight.shape[-1]]

    def choose(
        self, weight: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest codes, whatever the metric is, and (q - z) s."""
        at = weight[0] / scale
        code = self.codes_at(at if zero is None else at + zero)
        return code, ((code if zero is None else code - zero) * scale)[None]

    def codes_at(self, at: torch.Tensor) -> torch.Tensor:
        """Return the codes next to some numbers, as numbers."""
        return at.round().clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales and zero points with the least weighted squared error of rounding, among some shares of
        each group's range.
        """
        parted, worth = self.parted(weight), self.parted(importance.float().expand(len(weight), -1))
        low, high = parted.amin(-1).clamp_max(0), parted.amax(-1).clamp_min(0)
        least, steps = -(2 ** (self.bits - 1)), 2**self.bits - 1
        best = torch.full_like(low, torch.inf)
        scale, zero = torch.ones_like(low, dtype=dtype), torch.zeros_like(low, dtype=torch.int8)
        for clip in CLIPS[self.bits > 4].tolist():
            # Symmetric codes reach one step further below zero than above it: the wider side decides.
            spanned = torch.maximum(-low, high) * 2 if self.symmetric else high - low
            tried = (spanned * clip / steps).clamp_min(torch.finfo(dtype).tiny).to(dtype)
            tried = torch.where(spanned > 0, tried, torch.ones_like(tried))
            at = torch.zeros_like(low) if self.symmetric else (least - low * clip / tried.float()).round()
            at = at.clamp(least, -least - 1)
            step = tried.float()[..., None]
            code = (parted / step + at[..., None]).round().clamp(least, -least - 1)
            error = (((code - at[..., None]) * step - parted).square() * worth[:, None]).sum(-1)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
            zero = torch.where(better, at.to(torch.int8), zero)
        return scale, None if self.symmetric else zero


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first codes of rows of words, int8 [..., count]: what compressed-tensors' `unpack_from_int32` gives.

    Eight codes lie in as many bytes as a code has bits. Put into eight bytes, their halves are moved apart, then
    quarters, then single codes, until each has a byte: whole words at a time, for any number of bits.

    Args:
        words: int32 [..., W].
        bits: of a code.
        count: codes of a row.
    """
    unit, eights = math.gcd(bits, 8), -(-count // 8)  # bytes that move as one
    # A copy whose strides are plain, also those of axes of length one: only such bytes can be viewed as others.
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    packed = longer(packed, eights * bits - packed.shape[-1]).flatten().view(OF_BYTES[unit])
    eight = longer(packed.view(-1, bits // unit), (8 - bits) // unit).flatten().view(torch.int64)
    for codes in (4, 2, 1) if bits < 8 else ():
        upper = sum((1 << codes * bits) - 1 << lane + codes * bits for lane in range(0, 64, 16 * codes))
        eight.add_(eight & upper, alpha=(1 << codes * (8 - bits)) - 1)  # as upper << codes (8 - bits) alone
    each = eight.view(torch.uint8).view(*words.shape[:-1], 8 * eights)[..., :count]
    return (each - 2 ** (bits - 1)).view(torch.int8)  # bytes wrap around


def _named(match: re.Match[str]) -> Integers | None:
    bits, group = int(match["bits"]), int(match["group"])
    return Integers(bits=bits, group=group, symmetric=not match["u"]) if bits in BITS and group else None


register_storages(r"(?P<u>u?)int(?P<bits>[0-9])g(?P<group>[0-9]{1,5})", _named)
