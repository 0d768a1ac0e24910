"""The one loop over decoder layers: all that measures, fits or checks a model layer by layer is done on a walk.

Streams of hidden states of one text go through the layers, and each layer is loaded once for all of them:

    walk = Walk(source, batches)
    stream = walk.begin()
    for index in walk.layers():
        walk.advance(stream)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from moetailor import ranks
from moetailor.calibration.batch import Batch
from moetailor.calibration.layers import Head, LayerRunner, PartlyLoaded
from moetailor.calibration.states import HiddenStates
from moetailor.progress import Progress


class Measured(Protocol):
    """What is measured batch by batch: parts that add in the order of the text, whichever process measured them."""

    def taken(self) -> Any:
        """Return what was measured of the batch that ran last."""

    def add(self, part: Any) -> None:
        """Add what was measured of the next batch of the text."""


class Walk:
    """One way through the decoder layers of a model, front to back, with one layer loaded at a time.

    Args:
        source: the model.
        batches: the text.
        folder: where hidden states wait between layers; None keeps them in memory.
        progress: called with (batches done, batches in all), a batch counted once a layer: those of the stream that
            `begin` gave.
        shared: the processes that share (`ranks`) each run a part of the batches. All must then do the same calls, and
            each knows of the streams what its own batches are; on disk they lie together.
    """

    def __init__(
        self,
        source: PartlyLoaded,
        batches: Sequence[Batch],
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
        shared: bool = False,
    ) -> None:
        self.batches = batches
        self._number, self._count = (ranks.number(), ranks.count()) if shared else (0, 1)
        self._once: Callable[[Callable[[], Any]], Any] = ranks.once if shared else lambda do: do()
        self._source, self._folder, self._progress = source, folder, progress
        self._runner = LayerRunner(source, batches)
        self._streams: list[HiddenStates] = []
        # The layer that the walk stands at, the layer that it ends before, and the layer whose inputs nobody reads.
        self._index, self._stop, self._unread = 0, self._runner.count, -1

    @property
    def model(self) -> Any:
        """The model; of its decoder layers the one that the walk stands at has weights."""
        return self._source.model

    @property
    def count(self) -> int:
        """How many decoder layers there are."""
        return self._runner.count

    def begin(self, latest: int = 0) -> HiddenStates:
        """Return the stream that comes out of the embeddings.

        Args:
            latest: where a walk that was stopped may go on: the last layer up to this one whose inputs lie on disk.
        """
        stream = self._new("original")
        stream.layer = self._once(lambda: self._first(stream, latest))
        given = self._runner.embed(self._own)
        if stream.layer == 0:
            stream.write(0, given)
        else:
            for _ in given:
                pass  # the layers' arguments are recorded on the way
        return stream

    def fork(self, stream: HiddenStates, name: str) -> HiddenStates:
        """Return a stream of its own that has the states of another one.

        Args:
            stream: the other one.
            name: what it is called on disk.
        """
        other = self._new(name)
        other.write(stream.layer, ((number, stream[number]) for number in self._own))
        return other

    def again(self, stream: HiddenStates, name: str) -> HiddenStates:
        """Return a stream that a stopped walk left where another one goes on.

        Args:
            stream: the other one.
            name: what it is called on disk.
        """
        other = self._new(name)
        other.layer = stream.layer
        return other

    def layers(self, stop: int | None = None, *, beside: Mapping[int, Collection[int]] = {}) -> Iterator[int]:
        """Yield the number of each decoder layer while it has its weights, from where the streams stand.

        Args:
            stop: the layer to end before; nothing is kept of what the one before it gives. None goes through all
                layers and keeps what the last one gives.
            beside: the layers that must be loaded beside a layer, because it borrows experts of theirs.
        """
        self._stop, self._unread = (self._runner.count, -1) if stop is None else (stop, stop)
        for index in range(self._streams[0].layer, self._stop):
            self._index = index
            with self._source.loaded(*map(self._runner.path_of, sorted({index, *beside.get(index, ())}))):
                if index + 1 < self._stop:
                    self._source.read_ahead(self._runner.path_of(index + 1))
                yield index
            for stream in self._streams:
                stream.forget(index)

    def run(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run a batch through the layer that the walk stands at.

        Args:
            number: number of the batch.
            hidden: its hidden states in front of the layer, [B, L, D].

        Returns:
            Those behind it, [B, L, D].
        """
        return self._runner.run(self._index, number, hidden)

    def advance(
        self,
        stream: HiddenStates,
        run: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        measured: Measured | None = None,
    ) -> None:
        """Run all batches of a stream through the layer that the walk stands at, to the front of the next one.

        Args:
            stream: the stream.
            run: called for every batch in place of `run`, with the same arguments; returns the same. It is called also
                where nothing is kept of what it returns.
            measured: what it measures; its parts are taken after each batch, and added in the first process.
        """
        assert stream.layer == self._index
        given = self._given(stream, run or self.run, measured)
        if self._index + 1 != self._unread:
            stream.write(self._index + 1, given)
        elif run is not None:
            for _ in given:
                pass

    def predict(self, use: Callable[[int, Batch, Head], None]) -> None:
        """Run streams that stand behind the last layer through the head, batch by batch.

        Args:
            use: called with the number of each batch, the batch, and the head.
        """
        with self._runner.head() as head:
            for number, batch in enumerate(self.batches):
                use(number, batch, head)

    def clear(self) -> None:
        """Delete all hidden states on disk, also what a stopped walk left."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self, name: str) -> HiddenStates:
        self._streams.append(HiddenStates(None if self._folder is None else self._folder / name, self._once))
        return self._streams[-1]

    def _first(self, stream: HiddenStates, latest: int) -> int:
        """Return the last layer up to one whose inputs lie on disk; where there is none 0, and nothing lies there."""
        first = next((layer for layer in range(latest, 0, -1) if stream.has(layer)), 0)
        if first == 0:
            self.clear()
        return first

    @property
    def _own(self) -> range:
        """The batches that this process runs."""
        return range(self._number, len(self.batches), self._count)

    def _given(
        self, stream: HiddenStates, run: Callable[[int, torch.Tensor], torch.Tensor], measured: Measured | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what each own batch of a stream becomes, and count all those of the first stream."""
        count = len(self.batches)
        for start in range(0, count, self._count):
            number, part, rest = start + self._number, None, min(self._count, count - start)
            if number < count:
                yield number, run(number, stream[number])
                part = measured and measured.taken()
            if measured:
                # At once: what lies between two batches is bounded, however long the text is.
                for one in (ranks.brought(part) if self._count > 1 else [part])[:rest]:
                    measured.add(one)
            if self._progress and stream is self._streams[0]:
                self._progress(self._index * count + start + rest, self._stop * count)
