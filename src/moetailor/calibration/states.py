"""Hidden states on their way through a model: what one decoder layer gets for each batch of a text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from moetailor.checkpoint.artifact import save_tensors
from moetailor.checkpoint.tensors import read_tensors
from moetailor.errors import CalibrationError


class HiddenStates:
    """The inputs of one decoder layer, [B, L, D] for each batch: in memory, or in a folder that survives a kill.

    In memory a batch takes the place of what it was one layer before, so there is one layer's worth of them. On disk
    the inputs of a layer appear all at once, and those of the layer before stay until they are forgotten.

    Args:
        folder: where to keep them; None keeps them in memory.
        once: does what several processes that keep their batches in one folder must do once, see `ranks.once`.

    Attributes:
        layer: the layer whose inputs they are.
    """

    def __init__(self, folder: Path | None, once: Callable[[Callable[[], Any]], Any] = lambda do: do()) -> None:
        self.layer = 0
        self._folder, self._once = folder, once
        self._memory: dict[int, torch.Tensor] = {}

    def __getitem__(self, number: int) -> torch.Tensor:
        """Return the states of a batch.

        Raises:
            CalibrationError: their file cannot be read.
        """
        if self._folder is None:
            return self._memory[number]
        cure = f"delete {self._folder.parent} and run the same command again"
        file = _file(self._at(self.layer), number)
        # Without the copy the states would be pages of the file, which count as resident as long as they live.
        return read_tensors(file, names=["hidden"], error=CalibrationError, cure=cure)["hidden"].clone()

    def has(self, layer: int) -> bool:
        """Say whether all inputs of a layer lie on disk."""
        return self._folder is not None and self._at(layer).is_dir()

    def write(self, layer: int, states: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Keep the inputs of a layer from now on.

        Args:
            layer: the layer.
            states: the number of each batch and its inputs; they may be made of the present ones while they are asked
                for.
        """
        if self._folder is None:
            for number, hidden in states:
                self._memory[number] = hidden
        else:
            partial = self._at(layer).with_suffix(".partial")
            self._once(lambda: _empty(partial))
            for number, hidden in states:
                save_tensors({"hidden": hidden.contiguous().cpu()}, _file(partial, number))
            self._once(lambda: _put(partial, self._at(layer)))
        self.layer = layer

    def forget(self, layer: int) -> None:
        """Delete the inputs of a layer that lie on disk."""
        if self._folder is not None:
            self._once(lambda: shutil.rmtree(self._at(layer), ignore_errors=True))

    def _at(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{layer:04d}"


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _put(folder: Path, place: Path) -> None:
    # A run that was stopped before it had used these left the same states there.
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
