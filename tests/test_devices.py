"""Work in batches, on devices whose memory does not suffice for all of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moetailor.checkpoint.devices import in_batches
from moetailor.checkpoint.tensors import read_tensors
from moetailor.errors import CheckpointError, MoetailorError, out_of_memory
from support.reference import REFERENCE

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
# What torch raises where a CPU's memory is full, on a machine that gives no more than there is.
HERE = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "78643200 bytes. Error code 12 (Cannot allocate memory)"
)


def worker(room: int, seen: list[int], raised: Exception = FULL) -> Callable[[Sequence[int]], list[int]]:
    def work(some: Sequence[int]) -> list[int]:
        seen.append(len(some))
        if len(some) > room:
            raise raised
        return [2 * one for one in some]

    return work


def test_batches_are_of_the_size_asked_for() -> None:
    seen: list[int] = []
    assert list(in_batches(range(7), 3, worker(3, seen))) == [[0, 2, 4], [6, 8, 10], [12]]
    assert seen == [3, 3, 1]


@pytest.mark.parametrize("raised", [FULL, HERE, MemoryError()], ids=["device", "here", "Python"])
def test_where_memory_lacks_batches_are_halved_once(raised: Exception) -> None:
    seen: list[int] = []
    found = [one for some in in_batches(range(9), 8, worker(4, seen, raised)) for one in some]
    assert found == [2 * one for one in range(9)]
    assert seen == [8, 4, 4, 1]


@pytest.mark.parametrize(("at_once", "room", "tried"), [(8, 3, [8, 4]), (1, 0, [1])])
def test_where_it_lacks_again_the_flag_is_named(at_once: int, room: int, tried: list[int]) -> None:
    seen: list[int] = []
    with pytest.raises(MoetailorError, match=rf"^{tried[-1]} at once are too many .*2.00 GiB.*--batch-memory"):
        list(in_batches(range(9), at_once, worker(room, seen)))
    assert seen == tried


def test_another_error_is_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches(range(2), 2, worker(1, [], RuntimeError("shapes do not match"))))
    assert out_of_memory(ValueError("out of memory")) is None


SAID = {"CUDA out of memory": FULL, "out of memory: no 78,643,200 bytes are free": HERE, "out of memory": MemoryError()}


@pytest.mark.parametrize("told", SAID)
def test_a_model_that_memory_cannot_hold_is_no_damaged_one(
    told: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While transformers loads it, and while a tensor of ours is read."""

    def full(*given: object, **options: object) -> None:
        raise SAID[told]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    monkeypatch.setattr("moetailor.checkpoint.tensors.safe_open", full)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(type(SAID[told])):
        read_tensors(tmp_path / "x.safetensors", error=CheckpointError, cure="delete it")
    text = ["--data", REFERENCE / "calibration.jsonl", "--sequences", "2", "--length", "16"]
    code, _, err = run("calibrate", REFERENCE, "-o", tmp_path / "calib", *text)
    assert code == 1
    assert f"error: {told}; give less with --batch-size, --batch-memory or --stream" in " ".join(err.split())
