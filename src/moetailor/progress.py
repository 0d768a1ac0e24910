"""How far a run is: what callers give to be told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

# Called with (done, in all).
Progress = Callable[[int, int], None]
# Called with (what is running, done, in all).
Stages = Callable[[str, int, int], None]


def part(progress: Stages | None, name: str) -> Progress | None:
    """Return what one stage is given, to tell of itself by name."""
    return None if progress is None else partial(progress, name)


def resumed(done: int, total: int, what: str) -> None:
    """Note that a run goes on from what one before it has left, where that is something.

    Args:
        done: how many there are.
        total: how many there will be.
        what: of what.
    """
    if done:
        logging.getLogger("moetailor").info(f"resumes: {done:,} of {total:,} {what} are there")
