"""Running a model layer by layer: the same code for a model in memory and for one that streams from disk.

The layers' arguments (masks, rotary embeddings, sliding windows) are recorded from one call of the model's own forward
in which every decoder layer is a tap, so no family needs code here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moetailor.calibration.batch import Batch
from moetailor.checkpoint.artifact import save_tensors
from moetailor.checkpoint.tensors import read_tensors
from moetailor.errors import CalibrationError, CheckpointError


class PartlyLoaded(Protocol):
    """A model of which parts can be asked for; `StreamedModel` loads them, `ResidentModel` has them all."""

    model: Any  # a transformers model: its attributes are those of its family

    def loaded(self, *paths: str) -> Any:
        """Return a context in which the modules at `paths` have their weights."""


class ResidentModel:
    """A model that is in memory as a whole, on one device or spread by a device map."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[nn.Module]:
        """Give the model; everything is there already."""
        yield self.model


class _Done(Exception):
    """Ends a forward pass after its last tap."""


class _Tap(nn.Module):
    """Stands in for one decoder layer: keeps its arguments and passes the hidden states on."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self._layer = [layer]
        self._last = last
        self.hidden: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The model's forward reads attributes such as attention_type from its layers.
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not args, "decoder layers take their arguments by keyword"
        self.hidden, self.arguments = hidden_states, kwargs
        if self._last:
            raise _Done
        return hidden_states


class _Given(_Tap):
    """Stands in for one decoder layer and passes on what it was given."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.hidden is not None
        return self.hidden


class LayerRunner:
    """Runs batches through the decoder layers one at a time.

    Attributes:
        source: the model.
        count: number of decoder layers.
        device: where batches start.
    """

    def __init__(self, source: PartlyLoaded, batches: list[Batch]) -> None:
        self.source = source
        self.batches = batches
        base: Any = source.model.get_decoder()
        if not hasattr(base, "layers"):
            base = base.model
        self._base = base
        self._path = next(name for name, module in source.model.named_modules() if module is base)
        self._others = [f"{self._path}.{name}" for name, _ in base.named_children() if name != "layers"]
        self.count = len(base.layers)
        self._arguments: dict[Any, list[dict[str, Any]]] = {}

    def embed(self) -> Iterator[torch.Tensor]:
        """Yield each batch's input of the first decoder layer [B, L, D], and record the arguments of all layers."""
        layers = self._base.layers
        with self.source.loaded(*self._others), torch.no_grad():
            for number, batch in enumerate(self.batches):
                taps = [_Tap(layer, layer is layers[-1]) for layer in layers]
                self._base.layers = nn.ModuleList(taps)
                device = self._base.get_input_embeddings().weight.device
                mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
                try:
                    self._base(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
                except _Done:
                    pass
                finally:
                    self._base.layers = layers
                # Batches of one shape without padding share their arguments.
                self._arguments.setdefault(self._signature(number), [tap.arguments for tap in taps])
                assert taps[0].hidden is not None
                yield taps[0].hidden

    def path_of(self, index: int) -> str:
        """Return the path of a decoder layer in the model."""
        return f"{self._path}.layers.{index}"

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Give one decoder layer with its weights."""
        with self.source.loaded(self.path_of(index)), torch.no_grad():
            yield self._base.layers[index]

    def run(self, layer: nn.Module, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run batch `number` through decoder layer `index` and return its output [B, L, D]."""
        # What waited on the disk was read into the CPU's memory; an offloaded layer's hooks fetch for themselves.
        device = next((parameter.device for parameter in layer.parameters()), hidden.device)
        hidden = hidden if device.type == "meta" else hidden.to(device)
        out = layer(hidden, **self._arguments[self._signature(number)][index])
        if not isinstance(out, tuple):
            return out
        if any(part is not None for part in out[1:]):
            raise CheckpointError("decoder layers of this family pass on more than hidden states; not supported")
        return out[0]

    def through(self, layer: nn.Module, index: int, states: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the outputs of decoder layer `index` for the hidden states of all batches, in order."""
        for number, hidden in enumerate(states):
            yield self.run(layer, index, number, hidden)

    @contextmanager
    def head(self) -> Iterator[Callable[[int, torch.Tensor], torch.Tensor]]:
        """Give a function from batch `number` and its output of the last decoder layer to logits [B, L, V]."""
        model, layers = self.source.model, self._base.layers
        head, embeddings = model.get_output_embeddings(), self._base.get_input_embeddings()
        tied = model.config.get_text_config().tie_word_embeddings
        outside = [] if tied else [name for name, module in model.named_modules() if module is head]

        def logits(number: int, hidden: torch.Tensor) -> torch.Tensor:
            batch, device = self.batches[number], embeddings.weight.device
            for tap in taps:
                tap.hidden = hidden.to(device)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
            return model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits

        # The loss that balances routers wants those of layers that do not run here.
        balancing = getattr(model.config, "output_router_logits", None)
        with self.source.loaded(*self._others, *outside), torch.no_grad():
            own, taps = head.weight, [_Given(layer, False) for layer in layers]
            self._base.layers = nn.ModuleList(taps)
            try:
                head.weight = embeddings.weight if tied else own
                if balancing:
                    model.config.output_router_logits = False
                yield logits
            finally:
                if balancing:
                    model.config.output_router_logits = balancing
                head.weight, self._base.layers = own, layers

    def _signature(self, number: int) -> Any:
        batch = self.batches[number]
        return tuple(batch.input_ids.shape) if batch.attention_mask is None else number


class HiddenStates:
    """The hidden states between two layers, one tensor a batch: in memory, or in a folder that survives a kill.

    Args:
        folder: where to keep them; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: list[torch.Tensor] = []

    def at(self, layer: int) -> Path:
        """Return the folder of the inputs of a layer."""
        assert self.folder is not None
        return self.folder / f"layer-{layer:04d}"

    def has(self, layer: int) -> bool:
        """Say whether all inputs of a layer lie on disk."""
        return self.folder is not None and self.at(layer).is_dir()

    def read(self, layer: int, count: int) -> Iterator[torch.Tensor]:
        """Yield the inputs of a layer, batch by batch."""
        if self.folder is None:
            yield from self._memory
            return
        for number in range(count):
            file, cure = (
                self.at(layer) / f"{number:05d}.safetensors",
                f"delete {self.folder} and run the same command again",
            )
            yield read_tensors(file, names=["hidden"], error=CalibrationError, cure=cure)["hidden"].clone()

    def write(self, layer: int, states: Iterator[torch.Tensor]) -> None:
        """Keep the inputs of a layer; on disk they appear all at once, in memory those of the layer before go."""
        if self.folder is None:
            self._memory = list(states)
            return
        partial = self.at(layer).with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, hidden in enumerate(states):
            save_tensors({"hidden": hidden.contiguous().cpu()}, partial / f"{number:05d}.safetensors")
        # A run that was stopped between this and the layer's statistics left the same states here.
        shutil.rmtree(self.at(layer), ignore_errors=True)
        partial.rename(self.at(layer))

    def forget(self, layer: int) -> None:
        """Delete the inputs of a layer."""
        if self.folder is not None:
            shutil.rmtree(self.at(layer), ignore_errors=True)
