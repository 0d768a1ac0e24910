"""Work in batches, on devices whose memory does not suffice for all of it."""

from collections.abc import Callable, Sequence

import pytest
import torch

from moetailor.checkpoint.devices import in_batches
from moetailor.errors import MoetailorError


def worker(room: int, seen: list[int]) -> Callable[[Sequence[int]], list[int]]:
    def work(some: Sequence[int]) -> list[int]:
        seen.append(len(some))
        if len(some) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [2 * one for one in some]

    return work


def test_batches_are_of_the_size_asked_for() -> None:
    seen: list[int] = []
    assert list(in_batches(range(7), 3, worker(3, seen))) == [[0, 2, 4], [6, 8, 10], [12]]
    assert seen == [3, 3, 1]


def test_where_memory_lacks_batches_are_halved_once() -> None:
    seen: list[int] = []
    found = [one for some in in_batches(range(9), 8, worker(4, seen)) for one in some]
    assert found == [2 * one for one in range(9)]
    assert seen == [8, 4, 4, 1]


@pytest.mark.parametrize(("at_once", "room", "tried"), [(8, 3, [8, 4]), (1, 0, [1])])
def test_where_it_lacks_again_the_flag_is_named(at_once: int, room: int, tried: list[int]) -> None:
    seen: list[int] = []
    with pytest.raises(MoetailorError, match=rf"^{tried[-1]} at once are too many .*2.00 GiB.*--batch-memory"):
        list(in_batches(range(9), at_once, worker(room, seen)))
    assert seen == tried
