"""Plain storage: a tensor is one stored tensor of its own dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moetailor.checkpoint.files import DTYPES
from moetailor.checkpoint.storage.storage import Storage, register_storage


class Plain(Storage):
    """The numbers as they are."""

    name = "plain"
    trains = True

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the tensor itself."""
        return {"": (dtype, shape)}

    def encode(self, tensor: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
        """Return the tensor in its dtype."""
        return {"": tensor.to(DTYPES[dtype])}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor."""
        return parts[""]


register_storage(Plain())
