"""Codebooks: a code names several weights at once, of a table of 256 or fewer that fits normal weights.

At 2 bits this errs a fifth less than integers do, as its numbers need not lie on a grid, and GPTQ over it (GPTVQ,
arXiv:2402.15319) loses half as much. The tables are in ``codebooks.safetensors``, made by ``benchmarks/codebooks.py``:
one for each number of bits, [codes, weights of a code], for weights with a mean square of one. Shapes: n matrices, O
outputs, I inputs, G groups, V weights of a code, C codes of a row, K codes of a table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional as F

from moetailor.checkpoint.devices import passing_nbytes
from moetailor.checkpoint.storage.few_bits import Codes, FewBits
from moetailor.checkpoint.storage.lookup import Lookup, longer, lookup
from moetailor.checkpoint.storage.storage import register_storages

# Weights of a code by bits of a weight: the more, the better, as long as codes are of 8 bits or fewer.
WEIGHTS = {1: 8, 2: 4, 3: 2, 4: 2}
# Mean squared error of normal weights, as `benchmarks/codebooks.py` measured it.
NOISE = {1: 0.3217, 2: 0.0969, 3: 0.02985, 4: 0.00783}


@dataclass(frozen=True, kw_only=True)
class Codebook(FewBits):
    """Weights that a table has, times the scale of their group, named ``vq2g128``.

    Attributes:
        bits: of a weight, 1 to 4.
    """

    @property
    def name(self) -> str:  # type: ignore[override]
        """As `TensorSpec` names it."""
        return f"vq{self.bits}g{self.group}"

    @property
    def noise(self) -> float:
        """That of its table."""
        return NOISE[self.bits]

    @property
    def step(self) -> int:
        """Weights of a code."""
        return WEIGHTS[self.bits]

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.bits * self.step

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return codes, which lie along the inputs in words of 32 bits, and scales."""
        count, outputs, inputs = shape
        words = -(-self.codes(inputs) * self.code_bits // 32)
        scales = (count, outputs, self.groups(inputs))
        return {"_packed": ("I32", (count, outputs, words)), "_scale": (dtype, scales)}

    def listed(self, code: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the table's numbers."""
        return self._listed(code).flatten(-2)[..., :inputs]

    def look_up(self, device: torch.device) -> Lookup:
        """Return the table's numbers."""
        return lookup(f"vq{self.bits}", device, lambda device: Lookup.of(self._table(device), self.code_bits))

    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        packed = pack_to_int32(codes.code.flatten(0, 1), self.code_bits).view(*codes.code.shape[:2], -1)
        return {"_packed": packed, "_scale": codes.scale}

    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scales fitted to the codes that the root mean square of each group leads to."""
        # Where no input says anything all weigh alike.
        worth = self.parted(importance.float().clamp_min(1e-30).expand(len(weight), -1))[:, None]
        parted = self.parted(weight)
        square = (parted.square() * worth).sum(-1) / worth.sum(-1)
        scale = torch.where(square > 0, square, 1.0).sqrt()
        given = self._listed(self._nearest(parted / scale[..., None])).flatten(-2)
        # s = sum h w c / sum h c^2 over a group, h what an error weighs
        best = (given * parted * worth).sum(-1) / (given.square() * worth).sum(-1)
        scale = torch.where(best > 0, best, scale)
        # No table has zeros: where all weights are, the scale is.
        return torch.where(square > 0, scale, 0.0).to(dtype), None

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Return the nearest codes, int8 [n, O, C]."""
        code = self._nearest(self.parted(weight) / scale.float()[..., None])
        return code.flatten(-2)[..., : self.codes(weight.shape[-1])]

    def choose(
        self, weight: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes whose errors, by the metric, are least, and what they stand for."""
        table = self._table(weight.device)
        # [n, O, V] @ [n, V, V] and [K, V] @ [n, V, V]
        code = self._signed(nearest((weight / scale).permute(1, 2, 0) @ metric, table @ metric))
        return code.float(), self._listed(code).permute(2, 0, 1) * scale

    def _nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes of weights over their scales, int8 [..., codes].

        Args:
            weight: [..., inputs].
        """
        rows = longer(weight, -weight.shape[-1] % self.step).unflatten(-1, (-1, self.step))
        found = nearest(rows.reshape(1, -1, self.step), self._table(weight.device)[None])
        return self._signed(found).view(rows.shape[:-1])

    def _signed(self, index: torch.Tensor) -> torch.Tensor:
        return (index - 2 ** (self.code_bits - 1)).to(torch.int8)

    def _listed(self, code: torch.Tensor) -> torch.Tensor:
        """Return what codes stand for before scales, float32 [..., V]."""
        return F.embedding(code.int() + 2 ** (self.code_bits - 1), self._table(code.device))

    def _table(self, device: torch.device) -> torch.Tensor:
        return _table(self.bits, str(device))


def nearest(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the number of the nearest row of a table, int32 [n, R].

    Args:
        rows: float32 [n, R, V].
        table: float32 [n, K, V], with no more rows than 256.
    """
    # |x - c|^2 = (x, |x|^2, 1) . (-2 c, 1, |c|^2)
    length, square = (each.square().sum(-1, keepdim=True) for each in (table, rows))
    turned = torch.cat([-2 * table, torch.ones_like(length), length], -1).transpose(1, 2)
    rows = torch.cat([rows, square, torch.ones_like(square)], -1)
    at_once = passing_nbytes(table.device) // (4 * table[..., 0].numel())
    number, found = torch.arange(table.shape[1], dtype=torch.int32, device=table.device), []
    for some in rows.split(max(at_once, 1), 1):
        # Numbers from zero up are in the order of their bits: with its own number in the last 8 of these the least one
        # of a row tells where it is, several times sooner than argmin does.
        order = (some @ turned).view(torch.int32).bitwise_and_(~255).bitwise_or_(number)
        found.append(order.amin(-1).bitwise_and_(255))
    return torch.cat(found, 1)


@cache
def _table(bits: int, device: str) -> torch.Tensor:
    read = safetensors.torch.load_file(Path(__file__).with_name("codebooks.safetensors"))
    return read[f"vq{bits}"].float().to(device)


def _named(match: re.Match[str]) -> Codebook | None:
    bits, group = int(match["bits"]), int(match["group"])
    return Codebook(bits=bits, group=group) if bits in WEIGHTS and group else None


register_storages(r"vq(?P<bits>[0-9])g(?P<group>[0-9]{1,5})", _named)
