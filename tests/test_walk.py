"""The walk: streams of hidden states through layers that are loaded one at a time, against the model's own forward."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.calibration.layers import Head, PartlyLoaded, ResidentModel
from moetailor.calibration.states import HiddenStates
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.original import Original
from support.tiny import load, token_batches

Get = Callable[[str], Path]
BATCHES = token_batches(3)
FAMILY, LAYERS = "deepseek_v3", 3


@pytest.fixture(params=["in memory", "streamed"])
def source(request: pytest.FixtureRequest, checkpoint: Get) -> PartlyLoaded:
    if request.param == "in memory":
        return ResidentModel(load(checkpoint(FAMILY)))
    return Original(checkpoint(FAMILY)).streamed(dtype=torch.float32)


@pytest.fixture(params=["states in memory", "states on disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "states" if request.param == "states on disk" else None


@pytest.fixture
def expected(checkpoint: Get) -> list[list[torch.Tensor]]:
    """Return what each batch is in front of each layer, and in the end its logits."""
    model, seen = load(checkpoint(FAMILY)), []
    for batch in BATCHES:
        states: list[torch.Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda module, args, states=states: states.append(args[0]))
            for layer in model.get_decoder().layers
        ]
        with torch.no_grad():
            states.append(model(input_ids=batch.input_ids, use_cache=False).logits)
        for handle in handles:
            handle.remove()
        seen.append(states)
    return seen


def double(walk: Walk) -> Callable[[int, torch.Tensor], torch.Tensor]:
    return lambda number, hidden: 2 * walk.run(number, hidden)


def walk_and_stop(
    walk: Walk, last: int, beside: dict[int, set[int]] | None = None, look: Callable[[], None] = lambda: None
) -> None:
    """Walk to a layer and stop inside it."""
    stream = walk.begin()

    def stop(number: int, hidden: torch.Tensor) -> torch.Tensor:
        if number == 0:
            return walk.run(number, hidden)
        raise KeyboardInterrupt

    for index in walk.layers(beside=beside or {}):
        look()
        # Whoever walks may want gradients; the layers run without them.
        assert torch.is_grad_enabled()
        walk.advance(stream, stop if index == last else None)
        assert not stream[0].requires_grad


def test_streams_go_their_own_ways_and_are_forgotten(
    source: PartlyLoaded, folder: Path | None, expected: list[list[torch.Tensor]]
) -> None:
    walk = Walk(source, BATCHES, folder=folder)
    original = walk.begin()
    forks: dict[int, HiddenStates] = {}
    for index in walk.layers():
        for number in range(len(BATCHES)):
            torch.testing.assert_close(original[number], expected[number][index], rtol=1e-5, atol=1e-6)
        if folder is not None:
            names = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
            assert names == {f"{name}/layer-{index:04d}" for name in ["original", *(f"fork-{at}" for at in forks)]}
        for fork in forks.values():
            walk.advance(fork)
        forks[index] = walk.fork(original, f"fork-{index}")
        walk.advance(forks[index], double(walk))
        walk.advance(original)
        for number in range(len(BATCHES)):
            torch.testing.assert_close(forks[index][number], 2 * original[number])
    given: list[torch.Tensor] = []

    def compare(number: int, batch: moetailor.Batch, head: Head) -> None:
        given.append(head(original[number]))
        # The norm before the head takes the last layer's factor of two away.
        torch.testing.assert_close(head(forks[LAYERS - 1][number]), given[-1], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(head(forks[0][number]), given[-1], rtol=1e-3, atol=1e-3)

    walk.predict(compare)
    for logits, states in zip(given, expected, strict=True):
        torch.testing.assert_close(logits, states[-1], rtol=1e-5, atol=1e-5)
    walk.clear()
    assert folder is None or not folder.exists()


def test_behind_the_last_layer_nothing_is_kept_and_only_what_looks_runs(
    source: PartlyLoaded, folder: Path | None
) -> None:
    seen: list[int] = []

    def look(number: int, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(number)
        return walk.run(number, hidden)

    walk = Walk(source, BATCHES, folder=folder)
    original = walk.begin()
    plain = walk.fork(original, "plain")
    runs, run = [], walk.run
    walk.run = lambda number, hidden: runs.append(number) or run(number, hidden)  # type: ignore[method-assign]
    for _ in walk.layers(1):
        walk.advance(original, look)
        walk.advance(plain)
    assert seen == runs == [0, 1, 2]
    assert (original.layer, plain.layer) == (0, 0)
    assert folder is None or not list(folder.glob("*/*"))


def test_in_memory_there_is_one_layer_of_states(source: PartlyLoaded) -> None:
    walk = Walk(source, BATCHES)
    stream = walk.begin()
    before: list[weakref.ref] = []

    def look(number: int, hidden: torch.Tensor) -> torch.Tensor:
        before.append(weakref.ref(hidden))
        assert [ref() is not None for ref in before] == [False] * number + [True]
        return walk.run(number, hidden)

    for _ in walk.layers():
        before.clear()
        walk.advance(stream, look)


@pytest.mark.parametrize("latest", range(LAYERS + 1))
def test_a_stopped_walk_goes_on_where_it_may(
    latest: int, source: PartlyLoaded, tmp_path: Path, expected: list[list[torch.Tensor]]
) -> None:
    """The inputs of the last layer lie on disk, what it gives was half written."""
    folder = tmp_path / "states"
    with pytest.raises(KeyboardInterrupt):
        walk_and_stop(Walk(source, BATCHES, folder=folder), LAYERS - 1)
    (folder / "old").mkdir()
    walk = Walk(source, BATCHES, folder=folder)
    again = walk.begin(latest)
    assert again.layer == (LAYERS - 1 if latest >= LAYERS - 1 else 0)
    assert (folder / "old").exists() == (again.layer > 0)
    for _ in walk.layers():
        walk.advance(again)
    walk.predict(lambda number, batch, head: torch.testing.assert_close(head(again[number]), expected[number][-1]))


def test_layers_beside_are_loaded_and_all_go_back_whatever_happens(checkpoint: Get) -> None:
    source = Original(checkpoint(FAMILY)).streamed(dtype=torch.float32)

    def loaded() -> list[int]:
        layers = source.model.get_decoder().layers
        return [index for index, layer in enumerate(layers) if not next(layer.parameters()).is_meta]

    seen = []
    with pytest.raises(KeyboardInterrupt):
        walk_and_stop(Walk(source, BATCHES), 2, beside={1: {0, 2}}, look=lambda: seen.append(loaded()))
    assert seen == [[0], [0, 1, 2], [2]]
    assert loaded() == []


def test_progress_counts_the_batches_of_the_first_stream(source: PartlyLoaded) -> None:
    calls: list[tuple[int, int]] = []
    walk = Walk(source, BATCHES, progress=lambda *at: calls.append(at))
    original = walk.begin()
    other = walk.fork(original, "other")
    for _ in walk.layers():
        walk.advance(other)
        walk.advance(original)
    assert calls == [(done, 3 * LAYERS) for done in range(1, 3 * LAYERS + 1)]


def test_while_a_layer_runs_the_next_one_is_read_from_the_disk(
    checkpoint: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Original(checkpoint(FAMILY)).streamed(dtype=torch.float32)
    asked: set[tuple[int, int]] = set()
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, offset, nbytes, advice: asked.add((offset, nbytes)), raising=False
    )
    # The checkpoint is one file, so an offset says which tensor is meant.
    of_layer = [
        {(info.offset, info.nbytes) for name, info in source.checkpoint.tensors.items() if f".layers.{index}." in name}
        for index in range(LAYERS)
    ]
    walk = Walk(source, BATCHES)
    stream = walk.begin()
    for index in walk.layers():
        assert asked == (of_layer[index + 1] if index + 1 < LAYERS else set())
        asked.clear()
        walk.advance(stream)
