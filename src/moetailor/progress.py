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


def resumed(done: int, total: int | None, what: str) -> None:
    """Note that a run goes on from what one before it has left, where that is something.

    Args:
        done: how many there are.
        total: how many there will be; None where that is not known.
        what: of what.
    """
    if done:
        of = "" if total is None else f"of {total:,} "
        logging.getLogger("moetailor").info(f"resumes: {done:,} {of}{what} are there")
