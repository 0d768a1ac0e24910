"""Integers packed into words: compressed-tensors' ``pack-quantized``, one tensor for each part of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moetailor.checkpoint.files import TensorInfo
from moetailor.checkpoint.storage.quantized import FLOATS, Allowed, Grouped, grouped
from moetailor.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Packs(Grouped):
    """Codes along the inputs, zero points along the outputs, scales [O, G], and the shape of the matrix.

    Attributes:
        bits: of a code.
        symmetric: whether there are no zero points.
    """

    bits: int
    symmetric: bool

    code = "weight_packed"
    code_dtypes = ("I32",)
    scale = "weight_scale"
    optional = ("weight_g_idx",)

    @property
    def label(self) -> str:
        """Bits and groups."""
        return f"int{self.bits}, {self.grouping}"

    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return the shape that is stored with the codes, which may end inside a word."""
        told = parts["weight_shape"]
        if told.shape != (2,) or told.dtype not in ("I64", "I32"):
            raise CheckpointError(f"{told.name!r} is {told.dtype} {list(told.shape)}, not two whole numbers")
        outputs, inputs = told.read().tolist()
        if outputs == inputs == 0:  # of a model on the hub headers alone are there
            outputs, words = parts[self.code].shape
            inputs, scales = words * 32 // self.bits, parts[self.scale].shape
            if self.group > 0 and len(scales) == 2:  # a row of codes may end inside a word
                inputs = min(inputs, scales[1] * self.group)
        return max(outputs, 0), max(inputs, 0)

    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return codes, scales, zero points where there are some, and groups where inputs are not in order."""
        outputs, inputs = shape[-2:]
        groups = self.groups(inputs)
        words = (-(-outputs * self.bits // 32), groups)
        zeros: dict[str, Allowed] = {} if self.symmetric else {"weight_zero_point": (("I32",), [words])}
        found: dict[str, Allowed] = {
            "weight_packed": (("I32",), [(outputs, -(-inputs * self.bits // 32))]),
            "weight_scale": (FLOATS, [(outputs, groups)]),
            "weight_shape": (("I64", "I32"), [(2,)]),
            "weight_g_idx": (("I32", "I64"), [(inputs,)]),
        }
        return found | zeros

    def numbers_dtype(self, parts: Mapping[str, TensorInfo]) -> str:
        """Return the dtype of the scales, as compressed-tensors does."""
        return parts[self.scale].dtype

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return (code - zero point) x scale."""
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32  # here: seconds to import

        (outputs, inputs), scale = shape, parts["weight_scale"]
        code = unpack_from_int32(parts["weight_packed"], self.bits, torch.Size(shape))
        zero = None
        if not self.symmetric:
            size = torch.Size((outputs, scale.shape[1]))
            zero = unpack_from_int32(parts["weight_zero_point"], self.bits, size, packed_dim=0)
        return grouped(code, scale, zero, parts.get("weight_g_idx", self.order(inputs)), dtype)
