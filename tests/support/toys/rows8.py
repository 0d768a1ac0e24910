"""A storage: whole numbers of 8 bits with a scale for each row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moetailor.checkpoint.storage import Storage


class Rows8(Storage):
    """codes x scale."""

    name = "rows8"

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"_codes": ("I8", shape), "_scale": ("F32", (shape[0], 1))}

    def encode(self, tensor: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
        scale = tensor.float().abs().amax(1, keepdim=True).clamp_min(1e-20) / 127
        return {"_codes": (tensor.float() / scale).round().to(torch.int8), "_scale": scale}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        return parts["_codes"] * parts["_scale"]
