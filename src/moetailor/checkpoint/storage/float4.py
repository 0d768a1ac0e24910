"""Floats of 4 bits, e2m1, in groups of inputs with scales of few bits: what MXFP4 and NVFP4 have in common.

A code has its sign in the highest of its four bits; the others stand for 0, .5, 1, 1.5, 2, 3, 4 and 6. Shapes: n
matrices, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from moetailor.checkpoint.storage.few_bits import Codes, FewBits
from moetailor.checkpoint.storage.lookup import Lookup, longer, lookup

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MOST, SIGN = SIZES[-1], len(SIZES)


@dataclass(frozen=True, kw_only=True)
class Float4(FewBits):
    """Floats of 4 bits times the scale of their group: of as many inputs as it has; the last one may have fewer.

    Numbers are float32, and no scale is one of the experts' dtype: what stands for it are bytes.
    """

    bits: int = 4

    def size(self, inputs: int) -> int:
        """Return the inputs of a group."""
        return self.group

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return codes, two in a byte with the first in its lower half, and scales, as bytes: what casts a model or
        sends it elsewhere leaves these alone.
        """
        count, outputs, inputs = shape
        scales = (count, outputs, self.groups(inputs))
        return {"_packed": ("U8", (count, outputs, -(-inputs // 2))), "_scale": ("U8", scales)}

    def listed(self, code: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the floats."""
        return F.embedding(code.int(), _table(str(code.device)))[..., 0]

    def look_up(self, device: torch.device) -> Lookup:
        """Return the floats."""
        return lookup("float4", device, lambda device: Lookup.of(_table(str(device)), self.bits))

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored codes; scales are up to each storage."""
        pairs = longer(codes.code, codes.code.shape[-1] % 2).view(torch.uint8).unflatten(-1, (-1, 2))
        return {"_packed": pairs[..., 0] | pairs[..., 1] << 4}

    @abstractmethod
    def scales(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor:
        """Return the scales of stored tensors, float32 [n, O, G]."""

    @abstractmethod
    def tried(self, peak: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield `tries` scales for each group that can be stored, float32 [n, O, G].

        Args:
            peak: the largest of each group, more than 0, [n, O, G].
        """

    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales with the least weighted squared error of rounding, among some that can be stored."""
        parted, worth = self.parted(weight), self.parted(importance.float().expand(len(weight), -1))[:, None]
        peak = parted.abs().amax(-1)
        best, scale = torch.full_like(peak, torch.inf), torch.ones_like(peak)
        for tried in self.tried(torch.where(peak > 0, peak, MOST)):
            step = tried[..., None]
            error = ((near(parted / step) * step - parted).square() * worth).sum(-1)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        return scale, None

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Return the nearest codes, int8 [n, O, I]."""
        code = codes_at(self.parted(weight) / scale[..., None])
        return code.to(torch.int8).flatten(-2)[..., : weight.shape[-1]]

    def choose(
        self, weight: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest floats, whatever the metric is."""
        at = weight[0] / scale
        return codes_at(at), (near(at) * scale)[None]


def near(at: torch.Tensor) -> torch.Tensor:
    """Return the floats next to some numbers: steps are a half up to 2, one up to 4, and two beyond."""
    size = at.abs().clamp_max_(MOST)
    step = (size >= 2).float().add_(size >= 4).sub_(1).exp2_()
    return size.div_(step).round_().mul_(step).copysign_(at)


def codes_at(at: torch.Tensor) -> torch.Tensor:
    """Return the codes of the floats next to some numbers, as numbers."""
    size = near(at).abs_()
    # Twice the size is the code up to 2; 3, 4 and 6 have the next ones.
    return torch.where(size <= 2, 2 * size, size + 2 - (size > 4).float()).add_(SIGN * (at < 0))


@cache
def _table(device: str) -> torch.Tensor:
    return torch.tensor([[sign * size] for sign in (1, -1) for size in SIZES], device=device)
