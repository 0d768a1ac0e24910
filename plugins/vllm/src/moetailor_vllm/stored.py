"""Tensors of the format on one rank: what is stored, which part of it the rank keeps, and the numbers it stands for.

Shapes: n matrices, O outputs, I inputs, G groups of inputs that share a scale, W words of 32 bits, V weights of a code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from moetailor_vllm.codes import Codes
from moetailor_vllm.compiled import numbers_of, product_of, runs_compiled
from moetailor_vllm.lookups import (
    CODE_WEIGHTS,
    FLOATS,
    PARTS,
    cut,
    looked_up,
    nbytes,
    rows_of,
    tables,
    unpacked,
    values_of,
)

# Numbers that decoding may hold at a time beside its result: on CPUs what their caches hold.
AT_ONCE = {"cpu": 2**20, "": 2**24}
# Inputs of a matrix up to which codes are multiplied as they are.
FEW = 4
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
        # Codes of so many bits, each for `step` weights.
        self.code = self.bits * self.step
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
        self.local, self.count = (count, outputs, inputs), -(-inputs // self.step)
        groups = -(-inputs // self.size)
        self.dtype = dtype or torch.get_default_dtype()
        # Scales of floats of 4 bits are bytes.
        scales = torch.uint8 if self.codes in FLOATS and self.bits == 4 else self.dtype
        octets = sum(nbytes(self.code, self.count))
        self.register_buffer("packed", torch.empty(count, outputs, octets, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(count, outputs, groups, dtype=scales))
        if self.codes == "nvfp4":
            self.register_buffer("whole", torch.empty(count, 1, dtype=torch.float32))
        if self.codes == "uint":
            self.register_buffer("zero", torch.empty(count, outputs, groups, dtype=torch.uint8))
        self._make_tables(scales)

    def _make_tables(self, scales: torch.dtype) -> None:
        with torch.device("cpu"):
            values = values_of(self.codes, self.bits)
            # Numbers times scales are rounded once where the model's type holds both; else float32 has them first.
            fits = scales == self.dtype and values.nan_to_num().equal(values.nan_to_num().to(self.dtype).float())
            self.work = self.dtype if fits else torch.float32
            # Codes of 6 bits for two weights are no sum of what their parts give: they are put together first.
            book = values.shape[1] > 1 and len(PARTS[self.code]) > 1
            found = tables(torch.arange(len(values))[:, None], torch.uint8) if book else tables(values, self.work)
            # Integers of 8 bits are what their bytes are, which is faster than a table.
            found = [] if self.bits == 8 and self.codes in ("uint", "int") else found
        self.tables = len(found)
        for number, table in enumerate(found):
            self.register_buffer(f"table{number}", table.to(self.scale.device), persistent=False)
        self.register_buffer("book", values.to(self.scale.device, self.work) if book else None, persistent=False)

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
            for number, words in enumerate(self.rank.cut(tensor, self.axis)):
                self.packed[number].copy_(cut(words, self.code, self.count))
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

    def numbers(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the numbers of some matrices, [rows, O, I] of this rank: exact in float32, then rounded once."""
        out = self.packed.new_empty(len(self.scale[rows]) * self.local[1], self.local[2], dtype=self.dtype)
        for some, numbers in self._decoded(rows):
            out[some] = numbers
        return out.view(-1, *self.local[1:])

    def product(self, x_PI: torch.Tensor, row: int) -> torch.Tensor:
        """Return W x of one matrix, [P, O]; its numbers are never there at once."""
        if len(x_PI) <= FEW and runs_compiled(x_PI):
            scale = self._scales(slice(row, row + 1))[0]
            return product_of(x_PI, self.packed[row], self._meant, scale, self._zero(row), self.size).to(x_PI)
        parts = [F.linear(x_PI, numbers.to(x_PI.dtype)) for _, numbers in self._decoded(slice(row, row + 1))]
        return torch.cat(parts, -1)

    def _decoded(self, rows: torch.Tensor | slice) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the numbers of some rows of all rows of some matrices, [R, I], and which they are."""
        packed, scale = self.packed[rows].flatten(0, 1), self._scales(rows).flatten(0, 1)
        zero = self._zero(rows).flatten(0, -2).to(self.work)
        own, loops = len(zero) > 1, runs_compiled(packed)
        found, inputs = [getattr(self, f"table{number}") for number in range(self.tables)], self.local[2]
        step = max(AT_ONCE.get(packed.device.type, AT_ONCE[""]) // inputs, 1)
        for start in range(0, len(packed), step):
            some = slice(start, start + step)
            less = zero[some] if own else zero
            if loops:
                meant = (self._meant, scale[some], less, self.size, inputs, self.dtype)
                yield some, numbers_of(packed[some], *meant)
                continue
            if found:
                units = looked_up(packed[some], found, self.code, self.count)
            else:
                units = packed[some].to(self.work)
            if self.book is not None:
                units = rows_of(self.book, units)
            if missing := scale.shape[-1] * self.size - units.shape[-1]:
                units = F.pad(units, (0, missing))
            units = units.unflatten(-1, (-1, self.size))
            units.sub_(less[..., None])
            yield some, units.mul_(scale[some, :, None]).flatten(-2)[..., :inputs].to(self.dtype)

    @property
    def _meant(self) -> Codes:
        return Codes.of(self.codes, self.bits, self.count)

    def _zero(self, rows: torch.Tensor | slice | int) -> torch.Tensor:
        """Return the zero points of some matrices, [rows, O, G]; one of all, [1, 1], where codes have none."""
        if self.codes == "uint":
            return self.zero[rows]
        # Bytes stand for themselves, and are stored with 128 added.
        return self.scale.new_full((1, 1), 2**7 if self.codes == "int" and self.bits == 8 else 0, dtype=self.work)

    def _scales(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return the scales of some matrices in the type of `work`, [rows, O, G]."""
        scale = self.scale[rows]
        if self.codes == "mxfp4":  # exponents, counted as float32 counts its own
            return (scale.int() << MANTISSA).view(torch.float32)
        if self.codes == "nvfp4":
            return scale.view(torch.float8_e4m3fn).float() / self.whole[rows][..., None]
        return scale.to(self.work)
