"""Matrices in few bits: codes, each of one weight or of several, and a scale for each group of inputs of an output.

Shapes: n matrices, O outputs, I inputs, G groups, C codes of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moetailor.checkpoint.devices import formed, multiplied, runs_compiled, runs_kernels
from moetailor.checkpoint.files import DTYPES
from moetailor.checkpoint.storage.lookup import Lookup, longer, octets_of
from moetailor.checkpoint.storage.storage import Storage

# Inputs of a matrix up to which its weights are not scaled, but sums over groups are; groups so small that scaling the
# weights takes less time.
FEW, SMALL = 4, 16


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Matrices as codes.

    Attributes:
        code: int8 [n, O, C].
        scale: [n, O, G].
        zero: int8 [n, O, G]; None where codes have no zero points.
        whole: float32 [n, 1, 1], what each matrix was multiplied with before its scales were found, as its `scale` no
            longer is; None where that is nothing.
    """

    code: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    whole: torch.Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Codes]) -> Codes:
        """Return several stacks of matrices as one."""
        zeros = [part.zero for part in parts if part.zero is not None]
        wholes = [part.whole for part in parts if part.whole is not None]
        code, scale = torch.cat([part.code for part in parts]), torch.cat([part.scale for part in parts])
        zero, whole = (torch.cat(each) if each else None for each in (zeros, wholes))
        return cls(code=code, scale=scale, zero=zero, whole=whole)

    def rows(self, start: int, stop: int) -> Codes:
        """Return the same matrices with some of their outputs."""
        some = slice(start, stop)
        zero = None if self.zero is None else self.zero[:, some]
        return Codes(code=self.code[:, some], scale=self.scale[:, some], zero=zero, whole=self.whole)


@dataclass(frozen=True, kw_only=True)
class FewBits(Storage):
    """A way to store matrices in few bits.

    Groups are as equal as they can be: a width is cut into the fewest that have at most `group` inputs, and one
    code at least.

    Attributes:
        bits: of a weight.
        group: inputs that share a scale, at most.
        high: outputs that share a scale; matrices that are rounded as one must not.
        tries: scales that are tried for a group.
    """

    bits: int
    group: int

    high = 1
    tries = 1

    @property
    @abstractmethod
    def noise(self) -> float:
        """Mean squared error of normal weights with a mean square of one, up to a factor for each kind of storage."""

    @property
    def step(self) -> int:
        """Inputs of a code."""
        return 1

    def groups(self, inputs: int) -> int:
        """Return how many groups a width has."""
        return -(-self.codes(inputs) // max(self.group // self.step, 1))

    def size(self, inputs: int) -> int:
        """Return the inputs of a group; the last one may have fewer."""
        return -(-self.codes(inputs) // self.groups(inputs)) * self.step

    def codes(self, inputs: int) -> int:
        """Return how many codes a row has."""
        return -(-inputs // self.step)

    def parted(self, each: torch.Tensor) -> torch.Tensor:
        """Return what each input has by groups, [..., G, inputs of a group], zeros where the last one has fewer.

        Args:
            each: [..., I].
        """
        inputs = each.shape[-1]
        return longer(each, self.groups(inputs) * self.size(inputs) - inputs).unflatten(-1, (-1, self.size(inputs)))

    def encode(self, tensor: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
        """Return the nearest codes, each group's scale searched."""
        return self.pack(self.nearest(tensor, DTYPES[dtype]))

    def nearest(self, weight: torch.Tensor, dtype: torch.dtype) -> Codes:
        """Return the nearest codes of some matrices, each group's scale searched; one matrix at a time, for memory.

        Args:
            weight: [n, O, I].
            dtype: of the scales.
        """
        found = []
        for matrix in weight.split(1):
            matrix = matrix.float()
            if (whole := self.whole(matrix)) is not None:
                matrix = matrix * whole
            scale, zero = self.fit(matrix, matrix.new_ones(matrix.shape[-1]), dtype)
            code = self.round(matrix, scale, zero)
            found.append(Codes(code=code, scale=scale if whole is None else scale / whole, zero=zero, whole=whole))
        return Codes.joined(found)

    def whole(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return what each matrix is multiplied with before its scales are found: a power of two, float32 [n, 1, 1].

        None where any scale can be stored.

        Args:
            weight: float32 [n, O, I].
        """
        return None

    @abstractmethod
    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales and zero points with the least weighted squared error of rounding, of those that are tried.

        Args:
            weight: float32 [n, O, I].
            importance: what errors of each input weigh, [I] or [n, I].
            dtype: of the scales, where the storage has none of its own.

        Returns:
            Scales and zero points (None where there are none), [n, O, G].
        """

    @abstractmethod
    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Return the nearest codes, int8 [n, O, C].

        Args:
            weight: float32 [n, O, I].
            scale: [n, O, G].
            zero: [n, O, G].
        """

    @abstractmethod
    def choose(
        self, weight: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes q of the inputs of one code with the least |(w - q) M|^2, as numbers [n, O], and what they
        stand for, [inputs, n, O].

        Args:
            weight: float32 [inputs, n, O].
            metric: M, [n, inputs, inputs].
            scale: float32 [n, O].
            zero: float32 [n, O].
        """

    @abstractmethod
    def listed(self, code: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return what codes stand for before zero points and scales, exact in float32 and its own memory, [n, O, I].

        Args:
            code: int8 [n, O, C].
            inputs: of a matrix.
        """

    @abstractmethod
    def look_up(self, device: torch.device) -> Lookup | None:
        """Return what stored codes stand for, on a device; None where they are bytes, and stand for these less 128."""

    def ready(self, device: torch.device) -> None:
        """Make the table of codes."""
        self.look_up(device)

    def units(self, packed: torch.Tensor, inputs: int) -> torch.Tensor:
        """Return the same of stored codes, ``_packed``.

        Args:
            packed: of some matrices, or of some of their rows.
            inputs: of a matrix.
        """
        found = self.look_up(packed.device)
        assert found is not None, "bytes have units of their own"
        return found.numbers(packed, inputs)

    def scales(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor:
        """Return the scales of stored tensors, [n, O, G], in the dtype of the numbers."""
        return parts["_scale"]

    def zeros(self, parts: Mapping[str, torch.Tensor], outputs: int) -> torch.Tensor | None:
        """Return the zero points of stored tensors, int8 [n, O, G]; None where codes have none."""
        return None

    def numbers(self, codes: Codes, inputs: int) -> torch.Tensor:
        """Return what some codes stand for, [n, O, I] in the dtype of the scales: exact in float32, then rounded once.

        Args:
            codes: the codes.
            inputs: of a matrix.
        """
        return self._scaled(self.listed(codes.code, inputs), codes.scale, codes.zero)

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the numbers of stored tensors in the dtype of the scales: exact in float32, then rounded once."""
        return self._decoded(parts, shape, torch.float32, (0, shape[1]))

    def _decoded(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, rows: tuple[int, int]
    ) -> torch.Tensor:
        """Return rows of the same, from one to that before another, in a dtype if that of scales is no narrower."""
        if runs_compiled(parts["_packed"]):
            from moetailor.checkpoint.storage import compiled  # numba takes half a second

            return compiled.numbers(self, parts, shape, dtype, rows)
        some, inputs, zero = slice(*rows), shape[2], self.zeros(parts, shape[1])
        packed, scale = parts["_packed"][:, some], self.scales(parts, shape[1])[:, some]
        dtype, zero = min(scale.dtype, dtype, key=lambda each: each.itemsize), None if zero is None else zero[:, some]
        if runs_kernels(packed):
            from moetailor.checkpoint.storage import kernels

            found = self.look_up(packed.device)
            return kernels.numbers(octets_of(packed), found, scale, zero, self.size(inputs), inputs, dtype)
        return self._scaled(self.units(packed, inputs), scale, zero).to(dtype)

    def _scaled(self, units: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        numbers = self.parted(units)
        numbers = (numbers if zero is None else numbers.sub_(zero[..., None])).mul_(scale.float()[..., None])
        return numbers.to(scale.dtype).flatten(-2)[..., : units.shape[-1]].contiguous()

    def product(self, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Return x W^T, some outputs after the other: what is small stays in caches, and in memory that is there."""
        few = x_nPI.shape[1] <= FEW
        if runs_compiled(x_nPI):
            from moetailor.checkpoint.storage import compiled

            if few or compiled.in_tiles(self, x_nPI):
                return (compiled.few if few else compiled.tiled)(self, x_nPI, parts, shape)
        given = self._summed if few and self.size(shape[2]) > SMALL else self._formed
        x_nPI, some = x_nPI.float() if few else x_nPI, max(formed(x_nPI.device) // (len(x_nPI) * shape[2]), 1)
        found = [given(x_nPI, parts, shape, (at, min(at + some, shape[1]))) for at in range(0, shape[1], some)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def picked(
        self, x_PI: torch.Tensor, number_P: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return x W^T of each input with the matrix of its number by kernels, float32 [P, O]; zeros where negative."""
        from moetailor.checkpoint.storage import kernels

        octets, found = octets_of(parts["_packed"]), self.look_up(x_PI.device)
        scale, zero = self.scales(parts, shape[1]), self.zeros(parts, shape[1])
        return kernels.picked(x_PI, number_P, octets, found, scale, zero, self.size(shape[2]))

    def _summed(
        self, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], rows: tuple[int, int]
    ) -> torch.Tensor:
        """Return sum_G s_G (x_G . q_G - z_G sum x_G) over groups in float32, for some outputs: no weight is scaled."""
        some, zero_nOG = slice(*rows), self.zeros(parts, shape[1])
        units_nOGi, x_nPGi = self.parted(self.units(parts["_packed"][:, some], shape[2])), self.parted(x_nPI)
        scale_nOG = self.scales(parts, shape[1])[:, some].float()
        sums_nGPO = x_nPGi.transpose(1, 2) @ units_nOGi.permute(0, 2, 3, 1)
        given_nPO = (sums_nGPO * scale_nOG.transpose(1, 2)[:, :, None]).sum(1)
        if zero_nOG is None:
            return given_nPO
        return given_nPO - x_nPGi.sum(-1) @ (scale_nOG * zero_nOG[:, some]).transpose(1, 2)

    def _formed(
        self, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], rows: tuple[int, int]
    ) -> torch.Tensor:
        """Return some outputs of x W^T with the numbers of W."""
        numbers = self._decoded(parts, shape, x_nPI.dtype, rows).to(x_nPI.dtype)
        found = [multiplied(x, weight) for x, weight in zip(x_nPI, numbers, strict=True)]
        return found[0][None] if len(found) == 1 else torch.stack(found)

    @abstractmethod
    def pack(self, codes: Codes) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some codes."""
