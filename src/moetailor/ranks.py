"""Work shared out between the processes that torchrun started, on one machine or on several that share a disk.

Only where all of them are known to come by, which is in `shared`: else one would wait for others that never do. The
first process speaks for all and holds what is written to; the others are given what it found there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

from moetailor._version import __version__
from moetailor.errors import MoetailorError, reason_of
from moetailor.progress import Progress

Item = TypeVar("Item")
Found = TypeVar("Found")
# For all to be there; and for one that works on a layer for hours while the others wait for it.
MEETING, PATIENCE = timedelta(minutes=10), timedelta(days=30)
CURE = "start them with torchrun, or unset RANK and WORLD_SIZE"
# Letters of what they differ in that are shown.
SHOWN = 200

# Processes that share, and which of them this is.
_count, _number = 1, 0


@contextmanager
def shared(**about: object) -> Iterator[bool]:
    """Share work out while the context lasts, where torchrun started more than one process.

    Args:
        about: what must be the same in all of them, beside version and threads, or they would not work on the same.

    Yields:
        Whether this process is the one that speaks and writes for all.

    Raises:
        MoetailorError: the processes do not find each other, or differ.
    """
    global _count, _number
    if _told("WORLD_SIZE", 1) < 2:
        yield True
        return
    import torch
    import torch.distributed as processes
    from torch.distributed.rendezvous import rendezvous

    from moetailor.checkpoint.devices import take_own

    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        processes.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise MoetailorError(f"the environment speaks of several processes ({reason_of(error)}); {CURE}") from None
    _count, _number = processes.get_world_size(), processes.get_rank()
    try:
        take_own(_told("LOCAL_RANK", 0))
        same(**about, version=__version__, threads=torch.get_num_threads())
        yield first()
    finally:
        _count, _number = 1, 0
        processes.destroy_process_group()


def _told(name: str, default: int) -> int:
    """Return a number of the environment; one that is empty is not set."""
    value = os.environ.get(name, "").strip()
    if value and not value.isdecimal():
        raise MoetailorError(f"{name}={value}: is no number of processes; {CURE}")
    return int(value or default)


def count() -> int:
    """Return how many processes share; one where nothing is shared."""
    return _count


def number() -> int:
    """Return which of them this is, from 0."""
    return _number


def first() -> bool:
    """Say whether this process speaks and writes for all."""
    return _number == 0


def mine(item: int) -> bool:
    """Say whether an item is for this process, by its number among all items."""
    return item % _count == _number


def same(**about: object) -> None:
    """Refuse processes that differ.

    Args:
        about: what must be the same in all of them, by name.

    Raises:
        MoetailorError: the first that is not, with two of its values.
    """
    told = every({name: str(value) for name, value in about.items()})
    for name, value in told[0].items():
        if found := sorted({other[name] for other in told} - {value}):
            one, other = value[:SHOWN], found[0][:SHOWN]
            raise MoetailorError(f"processes differ in their {name}: {one} and {other}; start all alike")


def each(items: Sequence[Item], work: Callable[[Item], Found]) -> Iterator[Found]:
    """Yield what the work gives for each item, in their order: a process does a part of them, and gets all.

    Args:
        items: the items; the same for every process.
        work: called with an item; what it returns can be pickled.
    """
    if _count == 1:
        yield from map(work, items)
        return
    own = {at: work(items[at]) for at in range(_number, len(items), _count)}
    found = {at: one for part in every(own) for at, one in part.items()}
    yield from (found[at] for at in range(len(items)))


def of_all(progress: Progress | None) -> Progress | None:
    """Return a progress that is told what this process did of its part of the work, and tells as much of all of it."""
    return progress and (lambda done, total: progress(min(done * _count, total), total))


def once(do: Callable[[], Found]) -> Found:
    """Wait for all processes, let the first one do something, and return to all what it returned."""
    if _count == 1:
        return do()
    from torch.distributed import broadcast_object_list

    every(None)
    found = [do() if first() else None]
    with _all_alive():
        broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


@contextmanager
def held(place: AbstractContextManager[Found]) -> Iterator[Found]:
    """Hold a place for all processes until the last one leaves: the first takes it, all get what it gives."""
    with place if first() else nullcontext() as own:
        yield once(lambda: own)  # type: ignore[arg-type,return-value]
        once(lambda: None)


def every(own: Found) -> list[Found]:
    """Return what each process gives, in their order."""
    if _count == 1:
        return [own]
    from torch.distributed import all_gather_object

    found: list[Any] = [None] * _count
    with _all_alive():
        all_gather_object(found, own)
    return found


def brought(own: Found) -> list[Found]:
    """Return what each process gives, in their order, to the first one; nothing to the others."""
    if _count == 1:
        return [own]
    from torch.distributed import gather_object

    found: list[Any] | None = [None] * _count if first() else None
    with _all_alive():
        gather_object(own, found)
    return found or []


@contextmanager
def _all_alive() -> Iterator[None]:
    """Say what it means where the others are not reached any more."""
    try:
        yield
    except RuntimeError:
        cure = "mend what it complains of, and give the same command again"
        raise MoetailorError(f"another of the processes has ended; {cure}") from None
