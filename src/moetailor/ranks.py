"""Work shared out between the processes that torchrun started, on one machine or on several.

Only where all of them are known to come by, which is in `shared`: else one would wait for others that never do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from moetailor.errors import MoetailorError, reason_of

Item = TypeVar("Item")
Found = TypeVar("Found")
# One may work on a layer for hours while the others wait for it.
PATIENCE = timedelta(days=30)

# Processes that share.
_count = 1


@contextmanager
def shared(**about: object) -> Iterator[bool]:
    """Share work out while the context lasts, where torchrun started more than one process.

    Args:
        about: what must be the same in all of them, or they would not work on the same.

    Yields:
        Whether this process is the one that speaks and writes for all.

    Raises:
        MoetailorError: the processes do not find each other, or differ.
    """
    global _count
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    import torch.distributed as processes

    from moetailor.checkpoint.devices import take_own

    try:
        processes.init_process_group("gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        cure = "start them with torchrun, or unset RANK and WORLD_SIZE"
        raise MoetailorError(f"the environment speaks of several processes ({reason_of(error)}); {cure}") from None
    _count = processes.get_world_size()
    try:
        take_own(int(os.environ.get("LOCAL_RANK", "0")))
        every = _gathered({name: str(value) for name, value in about.items()})
        for name, value in every[0].items():
            if found := sorted({other[name] for other in every} - {value}):
                raise MoetailorError(f"processes differ in their {name}: {value} and {found[0]}; start all alike")
        yield processes.get_rank() == 0
    finally:
        _count = 1
        processes.destroy_process_group()


def each(items: Sequence[Item], work: Callable[[Item], Found]) -> Iterator[Found]:
    """Yield what the work gives for each item, in their order: a process does a part of them, and gets all.

    Args:
        items: the items; the same for every process.
        work: called with an item; what it returns can be pickled.
    """
    if _count == 1:
        yield from map(work, items)
        return
    from torch.distributed import get_rank

    own = {at: work(items[at]) for at in range(get_rank(), len(items), _count)}
    found = {at: one for part in _gathered(own) for at, one in part.items()}
    yield from (found[at] for at in range(len(items)))


def _gathered(own: Found) -> list[Found]:
    """Return what each process gives, in their order."""
    from torch.distributed import all_gather_object

    every: list[Any] = [None] * _count
    all_gather_object(every, own)
    return every
