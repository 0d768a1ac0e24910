"""4-bit floats of compressed-tensors, whose library turns them into numbers: NVFP4, and MXFP4 matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetailor.checkpoint.files import DTYPES, TensorInfo
from moetailor.checkpoint.storage.quantized import Allowed, Quantized


@dataclass(frozen=True, kw_only=True)
class Fp4(Quantized):
    """Codes [O, I / 2], two in a byte, and scales [O, I / group].

    Attributes:
        group: inputs that share a scale.
        format: compressed-tensors' name of the form.
        scheme: its description of the weights.
        whole: whether there is also a scale for all of the matrix, as in NVFP4.
    """

    group: int
    format: str
    scheme: Any
    whole: bool

    code = "weight_packed"
    code_dtypes = ("U8",)
    scale = "weight_scale"
    beside = ("input_global_scale", "input_scale")

    @property
    def label(self) -> str:
        """NVFP4 or MXFP4."""
        return "NVFP4" if self.whole else "MXFP4"

    def shape(self, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Return [O, I]."""
        outputs, pairs = parts["weight_packed"].shape
        return outputs, 2 * pairs

    def expected(self, shape: tuple[int, ...]) -> dict[str, Allowed]:
        """Return codes and scales."""
        outputs, inputs = shape[-2:]
        scales = ("F8_E4M3",) if self.whole else ("U8",)
        found: dict[str, Allowed] = {
            "weight_packed": (("U8",), [(outputs, inputs // 2)]),
            "weight_scale": (scales, [(outputs, -(-inputs // self.group))]),
        }
        return found | ({"weight_global_scale": (("F32",), [(1,), ()])} if self.whole else {})

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return code times scale (over that of the matrix in NVFP4)."""
        from compressed_tensors.compressors import BaseCompressor

        library: Any = BaseCompressor.get_value_from_registry(self.format)
        return library.decompress(dict(parts), self.scheme)["weight"].to(DTYPES[dtype])
