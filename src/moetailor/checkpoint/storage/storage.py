"""What a way to store tensors declares, and the tensors that answers ask to be stored."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moetailor.checkpoint.files import tensor_nbytes
from moetailor.errors import CheckpointError, did_you_mean

STORAGES: dict[str, Storage] = {}
# Ways that differ in numbers: what their names look like, and what makes one of its name.
FAMILIES: dict[str, Callable[[re.Match[str]], Storage | None]] = {}


class Storage(ABC):
    """One way to store the numbers of a tensor: as one stored tensor or as several, such as codes and scales.

    A stored tensor is named after the tensor, with a suffix (``""`` for the tensor's own name).

    Attributes:
        name: as `TensorSpec` names it.
        trains: whether the stored tensors are numbers that an optimizer can move.
    """

    name: str
    trains: bool = False

    @abstractmethod
    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return safetensors dtype and shape of each stored tensor by its suffix.

        Args:
            shape: of the tensor.
            dtype: safetensors dtype of the numbers.
        """

    @abstractmethod
    def encode(self, tensor: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
        """Return the stored tensors by their suffixes, in the dtypes and shapes of `parts`.

        Args:
            tensor: the numbers.
            dtype: safetensors dtype of the numbers.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the numbers of stored tensors, differentiable where the storage trains.

        Args:
            parts: the stored tensors by their suffixes, whole or some rows of each.
            shape: of the tensor; its first axis may have more rows than there are here.
        """

    def ready(self, device: torch.device) -> None:  # noqa: B027 (most need nothing)
        """Make on a device what decoding needs there beside stored tensors, before any graph is traced."""

    def product(self, x_nPI: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Return x W^T for matrices and a few inputs of each, [n, P, outputs].

        Args:
            x_nPI: the inputs.
            parts: the stored tensors by their suffixes, of as many matrices.
            shape: of the tensor that these are a part of.
        """
        return x_nPI @ self.decode(parts, shape).to(x_nPI.dtype).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that is stored for an answer.

    Attributes:
        shape: its shape.
        dtype: safetensors dtype of its numbers; that of the layer's experts when None.
        storage: how it lies, by name.
        trainable: whether `recover --train standins` trains it.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    storage: str = "plain"
    trainable: bool = True

    def parts(self, name: str, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return safetensors dtype and shape of each stored tensor by its whole name.

        Args:
            name: of the tensor.
            dtype: safetensors dtype of the layer's experts.
        """
        parts = find_storage(self.storage).parts(self.shape, self.dtype or dtype)
        return {name + suffix: part for suffix, part in parts.items()}

    def nbytes(self, dtype: str) -> int:
        """Return the bytes of all that is stored.

        Args:
            dtype: safetensors dtype of the layer's experts.
        """
        return sum(tensor_nbytes(*part) for part in self.parts("", dtype).values())

    def encode(self, name: str, tensor: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
        """Return the stored tensors of some numbers by their whole names.

        Args:
            name: of the tensor.
            tensor: its numbers.
            dtype: safetensors dtype of the layer's experts.
        """
        stored = find_storage(self.storage).encode(tensor, self.dtype or dtype)
        return {name + suffix: part.contiguous() for suffix, part in stored.items()}


def register_storage(storage: Storage) -> None:
    """Make a way to store tensors known by its name."""
    assert storage.name not in STORAGES, f"storage {storage.name} is registered twice"
    STORAGES[storage.name] = storage


def register_storages(pattern: str, make: Callable[[re.Match[str]], Storage | None]) -> None:
    """Make ways to store tensors known by names that match a pattern; `make` gives None for one that is none."""
    assert pattern not in FAMILIES, f"storages {pattern} are registered twice"
    FAMILIES[pattern] = make


def find_storage(name: str) -> Storage:
    """Return a way to store tensors by name.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name in STORAGES:
        return STORAGES[name]
    for pattern, make in FAMILIES.items():
        if (match := re.fullmatch(pattern, name)) and (found := make(match)):
            return found
    raise CheckpointError(f"no storage {name!r}" + did_you_mean(name, [*STORAGES, *FAMILIES]))
