"""Running the parts of a model one by one: the same code for a model in memory and for one that streams from disk.

The layers' arguments (masks, rotary embeddings, sliding windows) are recorded from one call of the model's own forward
in which every decoder layer is a tap, so no family needs code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import nn

from moetailor.calibration.batch import Batch
from moetailor.checkpoint.devices import passing_nbytes
from moetailor.errors import CheckpointError


class PartlyLoaded(Protocol):
    """A model whose parts can be loaded one by one: `StreamedModel` reads them, `ResidentModel` has them all."""

    model: Any  # a transformers model: its attributes are those of its family

    def loaded(self, *paths: str) -> Any:
        """Return a context in which the modules at `paths` have their weights."""

    def read_ahead(self, path: str) -> None:
        """Begin to read the module at a path, which is loaded next."""


class ResidentModel:
    """A model that is in memory as a whole, on one device or spread by a device map."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[nn.Module]:
        """Give the model; everything is there already."""
        yield self.model

    def read_ahead(self, path: str) -> None:
        """Do nothing."""


# From what the last decoder layer gives for some tokens, [B, C, D], to logits, [B, C, V].
Head = Callable[[torch.Tensor], torch.Tensor]
# Numbers of the predictions that are best made at once: fewer take a product longer, more take memory for nothing.
PREDICTIONS = 2**26


def pieces(tokens: int, sequences: int, vocab_size: int) -> list[slice]:
    """Return the parts of a batch's sequences whose predictions are made at once.

    Args:
        tokens: of a sequence.
        sequences: of the batch.
        vocab_size: numbers of a prediction.
    """
    size = max(PREDICTIONS // (sequences * vocab_size), 1)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def by_rows(
    judge: Callable[..., dict[str, torch.Tensor]], logits_BCV: torch.Tensor, *others: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what is said of predictions, [B, C] by name, a few at a time: as many as caches hold, since each is gone
    over many times.

    Args:
        judge: called with some rows of all arguments, logits in float32 [R, V]; gives [R] by name.
        logits_BCV: logits.
        others: more logits [B, C, V], and what else there is of each, [B, C]; on the same device.
    """
    shape, vocab_size = logits_BCV.shape[:-1], logits_BCV.shape[-1]
    some = max(passing_nbytes(logits_BCV.device) // (4 * vocab_size), 1)
    rows = [each.flatten(0, 1).split(some) for each in (logits_BCV, *others)]
    parts = [judge(*(r.float() if r.is_floating_point() else r for r in each)) for each in zip(*rows, strict=True)]
    return {name: torch.cat([part[name] for part in parts]).view(shape) for name in parts[0]}


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
    """Runs batches through the embeddings, through single decoder layers and through the head of a model.

    Attributes:
        source: the model.
        batches: the batches.
        count: number of decoder layers.
    """

    def __init__(self, source: PartlyLoaded, batches: Sequence[Batch]) -> None:
        self.source = source
        self.batches = batches
        base: Any = source.model.get_decoder()
        if not hasattr(base, "layers"):
            base = base.model
        self._base = base
        self._path = next(name for name, module in source.model.named_modules() if module is base)
        self._others = [f"{self._path}.{name}" for name, _ in base.named_children() if name != "layers"]
        self._layers = base.layers
        self.count = len(base.layers)
        self._arguments: dict[Any, list[dict[str, Any]]] = {}

    def embed(self, numbers: Iterable[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the number of some batches and their input of the first decoder layer, [B, L, D]; record the arguments
        that all layers get with them.
        """
        with self.source.loaded(*self._others):
            for number in numbers:
                taps = self._tapped(self.batches[number])
                # Batches of one shape without padding share their arguments.
                self._arguments.setdefault(self._signature(number), [tap.arguments for tap in taps])
                assert taps[0].hidden is not None
                yield number, taps[0].hidden

    def path_of(self, index: int) -> str:
        """Return the path of a decoder layer in the model."""
        return f"{self._path}.layers.{index}"

    @torch.no_grad()
    def run(self, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run batch `number` through decoder layer `index`, which has its weights, and return its output [B, L, D]."""
        layer = self._layers[index]
        # What waited on the disk was read into the CPU's memory; an offloaded layer's hooks fetch for themselves.
        device = next((parameter.device for parameter in layer.parameters()), hidden.device)
        hidden = hidden if device.type == "meta" else hidden.to(device)
        out = layer(hidden, **self._arguments[self._signature(number)][index])
        if not isinstance(out, tuple):
            return out
        if any(part is not None for part in out[1:]):
            raise CheckpointError("decoder layers of this family pass on more than hidden states; not supported")
        return out[0]

    @torch.no_grad()
    def final(self, number: int) -> torch.Tensor:
        """Run batch `number` through a model that is all in memory, by its own forward; return what the last decoder
        layer gives, [B, L, D].
        """
        batch, found = self.batches[number], []
        device = self._base.get_input_embeddings().weight.device
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        with _with_layers(self._base, self._layers):
            handle = self._layers[-1].register_forward_hook(lambda module, args, out: found.append(out))
            try:
                self._base(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
            finally:
                handle.remove()
        return found[0][0] if isinstance(found[0], tuple) else found[0]

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Give the head of the model, with its weights."""
        model = self.source.model
        head, embeddings = model.get_output_embeddings(), self._base.get_input_embeddings()
        outside = [name for name, module in model.named_modules() if module is head]
        taps = nn.ModuleList([_Given(layer, False) for layer in self._layers])

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            device = embeddings.weight.device
            for tap in taps:
                tap.hidden = hidden.to(device)  # type: ignore[assignment]
            # Which words they are matters to no layer that runs here.
            return model(input_ids=torch.zeros(hidden.shape[:2]).long().to(device), use_cache=False).logits

        # The loss that balances routers wants those of layers that do not run here.
        balancing = getattr(model.config, "output_router_logits", None)
        with (
            self.source.loaded(*self._others, *outside),
            torch.no_grad(),
            _with_layers(self._base, nn.ModuleList(taps)),
        ):
            try:
                if balancing:
                    model.config.output_router_logits = False
                yield logits
            finally:
                if balancing:
                    model.config.output_router_logits = balancing

    @torch.no_grad()
    def _tapped(self, batch: Batch) -> list[_Tap]:
        """Run the model's own forward on a batch with a tap in place of every decoder layer, and return the taps."""
        taps = [_Tap(layer, layer is self._layers[-1]) for layer in self._layers]
        device = self._base.get_input_embeddings().weight.device
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        with _with_layers(self._base, nn.ModuleList(taps)), suppress(_Done):
            self._base(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
        return taps

    def _signature(self, number: int) -> Any:
        batch = self.batches[number]
        return tuple(batch.input_ids.shape) if batch.attention_mask is None else number


@contextmanager
def _with_layers(base: Any, layers: nn.ModuleList) -> Iterator[None]:
    """Let a decoder run with some layers while the context lasts."""
    before, base.layers = base.layers, layers
    try:
        yield
    finally:
        base.layers = before
