"""Tensors of the format on one rank: what is stored, which part of it the rank keeps, and the numbers it stands for.

Shapes: n matrices, O outputs, I inputs, G groups of inputs that share a scale, W words of 32 bits, V weights of a code.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from moetailor_vllm.slots import Packed

# Numbers in float32 that decoding may hold at a time beside its result.
AT_ONCE = 2**24
# Weights of a code by bits of a weight, where codes are numbers of rows of a table.
CODE_WEIGHTS = {1: 8, 2: 4, 3: 2, 4: 2}
# Floats as codes: bits, and inputs that share a scale, all of a row where there are 0; blocks have as many outputs.
FLOATS: dict[str, tuple[int, int]] = {"fp8": (8, 0), "fp8b128": (8, 128), "mxfp4": (4, 32), "nvfp4": (4, 16)}
# What floats of 4 bits stand for, e2m1, those with a sign behind the others.
SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Bits of float32 behind its exponent.
MANTISSA = 23


@dataclass(frozen=True)
class Rank:
    """A place among the ranks that cut experts along their intermediate size."""

    number: int = 0
    count: int = 1

    def cut(self, tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
        """Return this rank's part of a tensor; all of it where there is no axis."""
        if axis is None or self.count == 1:
            return tensor
        if tensor.shape[axis] % self.count:
            size = list(tensor.shape)
            raise NotImplementedError(f"moetailor-vllm: {self.count} ranks cannot cut {size} along axis {axis}")
        return tensor.chunk(self.count, axis)[self.number]


ALONE = Rank()


class Plain(nn.Module):
    """A tensor that is stored as numbers.

    Args:
        shape: of the whole tensor.
        rank: of this process.
        axis: along which ranks cut it; None where each has all of it.
        dtype: of its numbers.
        first: whether the first rank alone has its numbers, the others zeros: what is added once.
        places: rows that it is kept as, [..]; one more than there are stands for zeros. As it is stored when None.
    """

    value: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: Rank,
        axis: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        first: bool = False,
        places: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.rank, self.axis, self.absent = {"": shape}, rank, axis, first and rank.number > 0
        self.places = places
        kept = self._kept(torch.empty(shape, device="meta")).shape
        self.value = nn.Parameter(torch.empty(kept, dtype=dtype), requires_grad=False)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = self.rank.cut(tensor, self.axis)
        return tensor if self.places is None else F.pad(tensor, (0, 0, 0, 1))[self.places.to(tensor.device)]

    def load(self, suffix: str, tensor: torch.Tensor) -> None:
        """Take this rank's part of the stored tensor, whose shape was checked."""
        self.value.data.copy_(torch.zeros_like(self.value) if self.absent else self._kept(tensor))

    def numbers(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the numbers of all or some matrices."""
        return self.value[rows]


class FewBits(nn.Module):
    """A stack of matrices in few bits: a code for one or for several weights, a scale for each group of inputs.

    Args:
        shape: of the numbers, (n, O, I).
        storage: how they lie: ``uint4g128`` (with zero points), ``int4g128``, ``vq2g128`` (codebooks), or in `FLOATS`.
        rank: of this process.
        axis: along which ranks cut the numbers, 1 or 2; None where each has all of them.
        dtype: of the scales, and so of the numbers.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        storage: str,
        rank: Rank,
        axis: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.rank, self.axis = shape, rank, axis
        count, outputs, inputs = shape
        self.step, self.high = 1, 1
        if storage in FLOATS:
            self.codes, (self.bits, size) = storage, FLOATS[storage]
            self.size, packed = size or inputs, -(-inputs * self.bits // 8)
            groups = -(-inputs // self.size)
            self.high = self.size if storage == "fp8b128" else 1
        else:
            match = re.fullmatch(r"(uint|int|vq)(\d)g(\d+)", storage)
            assert match, storage
            self.codes, self.bits, group = match[1], int(match[2]), int(match[3])
            self.step = CODE_WEIGHTS[self.bits] if self.codes == "vq" else 1
            # A width is cut into the fewest groups of at most `group` inputs, as equal as they can be.
            codes = -(-inputs // self.step)
            groups = -(-codes // max(group // self.step, 1))
            self.size = -(-codes // groups) * self.step
            packed = -(-codes * self.bits * self.step // 32)
        self.parts = {
            "_packed": (count, outputs, packed),
            "_scale": (count, -(-outputs // self.high), groups),
        }
        if self.codes == "uint":
            self.parts["_zero_point"] = (count, -(-outputs * self.bits // 32), groups)
        if self.codes == "nvfp4":
            self.parts["_global_scale"] = (count, 1)
        self._make(dtype)

    def _make(self, dtype: torch.dtype | None) -> None:
        count, outputs, inputs = self.shape
        split = self.rank.count
        if self.axis == 1:
            outputs = self._share(outputs, 1)
        elif self.axis == 2 and split > 1:
            inputs = self._share(inputs, self.step)
            if self.bits < 8 or self.codes not in FLOATS:
                self._share(inputs * split * self.bits, 32)
            # Groups that reach over the edge of a rank become several with one scale.
            finer = math.gcd(self.size, inputs)
            self.repeats, self.size = self.size // finer, finer
        self.local = (count, outputs, inputs)
        groups, packed = -(-inputs // self.size), self.parts["_packed"][2] // (split if self.axis == 2 else 1)
        kind = torch.uint8 if self.codes in FLOATS else torch.int32
        self.dtype = dtype or torch.get_default_dtype()
        # Scales of floats of 4 bits are bytes.
        scales = torch.uint8 if self.codes in FLOATS and self.bits == 4 else self.dtype
        self.register_buffer("packed", torch.empty(count, outputs, packed, dtype=kind))
        self.register_buffer("scale", torch.empty(count, outputs, groups, dtype=scales))
        if self.codes == "nvfp4":
            self.register_buffer("whole", torch.empty(count, 1, dtype=torch.float32))
        if scales is torch.uint8:
            table = torch.tensor([sign * size for sign in (1, -1) for size in SIZES])
            self.register_buffer("table", table.to(self.scale.device), persistent=False)
        if self.codes == "uint":
            self.register_buffer("zero", torch.empty(count, outputs, groups, dtype=torch.uint8))
        if self.codes == "vq":
            tables = safetensors.torch.load_file(Path(__file__).with_name("codebooks.safetensors"))
            self.register_buffer("table", tables[f"vq{self.bits}"].float().to(self.scale.device), persistent=False)

    def _share(self, size: int, of: int) -> int:
        if size % (self.rank.count * of):
            raise NotImplementedError(
                f"moetailor-vllm: {self.codes}{self.bits} of {list(self.shape)}: {size} cannot be cut for "
                f"{self.rank.count} ranks in units of {of}; use fewer"
            )
        return size // self.rank.count

    def load(self, suffix: str, tensor: torch.Tensor) -> None:
        """Take this rank's part of a stored tensor, whose shape was checked."""
        if suffix == "_packed":
            self.packed.copy_(self.rank.cut(tensor, self.axis))
            return
        if suffix == "_global_scale":
            self.whole.copy_(tensor.contiguous().view(torch.float32))
            return
        if self.high > 1:
            tensor = tensor.repeat_interleave(self.high, 1)[:, : self.shape[1]]
        if suffix == "_zero_point":
            tensor = unpacked(tensor.transpose(1, 2), self.bits, self.shape[1]).transpose(1, 2)
        if self.axis == 2 and self.rank.count > 1:
            tensor = tensor.repeat_interleave(self.repeats, 2)[..., : self.shape[2] // self.size]
        (self.scale if suffix == "_scale" else self.zero).copy_(self.rank.cut(tensor, self.axis))

    def numbers(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers of some matrices, [rows, O, I] of this rank: exact in float32, then rounded once."""
        count = self.local[0] if rows is None else len(rows)
        out = self.scale.new_empty(count, *self.local[1:], dtype=self.dtype)
        step = max(AT_ONCE // math.prod(self.local[1:]), 1)
        for start in range(0, count, step):
            some = slice(start, start + step)
            out[some] = self._decoded(some if rows is None else rows[some])
        return out

    def _decoded(self, rows: torch.Tensor | slice) -> torch.Tensor:
        packed, inputs = self.packed[rows], self.local[2]
        if self.codes in FLOATS:
            floats = packed.view(torch.float8_e4m3fn) if self.bits == 8 else self.table[unpacked(packed, 4, inputs)]
            units = floats.float()
        elif self.codes == "vq":
            code = unpacked(packed, self.bits * self.step, -(-inputs // self.step))
            units = F.embedding(code, self.table).flatten(-2)[..., :inputs]
        else:
            units = unpacked(packed, self.bits, inputs).float()
        scale = self._scales(rows)
        parted = F.pad(units, (0, scale.shape[-1] * self.size - inputs)).unflatten(-1, (-1, self.size))
        # Codes and zero points are stored with 2^(b-1) added; without zero points this is what is left.
        if self.codes in ("uint", "int"):
            parted = parted - (self.zero[rows][..., None] if self.codes == "uint" else 2 ** (self.bits - 1))
        return (parted * scale[..., None]).to(self.dtype).flatten(-2)[..., :inputs]

    def _scales(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return the scales of some matrices, float32 [rows, O, G]."""
        scale = self.scale[rows]
        if self.codes == "mxfp4":  # exponents, counted as float32 counts its own
            return (scale.int() << MANTISSA).view(torch.float32)
        if self.codes == "nvfp4":
            return scale.view(torch.float8_e4m3fn).float() / self.whole[rows][..., None]
        return scale.float()


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first codes of rows of words as they are stored, int64 [..., count].

    Eight codes lie in as many bytes as a code has bits; put into eight bytes, these are one number.

    Args:
        words: int32 [..., W], codes from the lowest bit up.
        bits: of a code.
        count: codes of a row.
    """
    octets, eights = words.contiguous().view(torch.uint8), -(-count // 8)
    octets = F.pad(octets, (0, eights * bits - octets.shape[-1])).unflatten(-1, (eights, bits))
    eight = F.pad(octets, (0, 8 - bits)).view(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    return (eight >> shifts & 2**bits - 1).flatten(-2)[..., :count]


def storages(width: Packed) -> dict[str, str]:
    """Return how each matrix of an expert in few bits lies.

    Raises:
        NotImplementedError: as numbers beside the codes of a quantized original, or in a way that is not known here.
    """
    if width.bits > 8:
        raise NotImplementedError("moetailor-vllm does not serve experts beside the codes of a quantized original")
    if width.codes not in ("uint", "int", "vq", *FLOATS):
        raise NotImplementedError(
            f"moetailor-vllm does not serve experts in {width.codes}; a newer one may, or transformers"
        )
    down = width.down or width.bits

    def storage(bits: int) -> str:
        if width.codes in FLOATS:
            return width.codes
        codes = "uint" if width.codes == "vq" and bits not in CODE_WEIGHTS else width.codes
        return f"{codes}{bits}g{width.group}"

    return {"gate": storage(width.bits), "up": storage(width.bits), "down": storage(down)}


def stem(width: Packed) -> str:
    """Return the start of the names of the tensors of a width."""
    bits = f"{width.codes}{width.bits}_{width.down or width.bits}_g{width.group}"
    return f"packed_{width.codes if width.codes in FLOATS else bits}"
