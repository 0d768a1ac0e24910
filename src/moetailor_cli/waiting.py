"""What is seen while a verb runs: bars in a terminal, and without one a line now and then, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from moetailor_cli import log, output

if TYPE_CHECKING:
    from moetailor.progress import Progress as Told
    from moetailor.progress import Stages

# Seconds between two lines.
EVERY = 30.0


@contextmanager
def progress(name: str) -> Iterator[Told]:
    """Give a function to call with (done, in all); the bar goes away when it is done."""
    log.note(name)
    if not output.messages().is_terminal:
        lines = Lines()
        yield lambda done, total: lines.tell(name, done, total)
        return
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stages() -> Iterator[Stages]:
    """Give a function to call with (what is running, done, in all): one bar for each stage."""
    if not output.messages().is_terminal:
        yield _noted(Lines().tell)
        return
    with _bar(TaskProgressColumn()) as bar:
        tasks: dict[str, object] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)  # type: ignore[arg-type]

        yield _noted(update)


def _noted(tell: Stages) -> Stages:
    """Return the same function; stages stand in the log when they begin."""
    begun: set[str] = set()

    def told(name: str, done: int, total: int) -> None:
        if name not in begun:
            begun.add(name)
            log.note(name)
        tell(name, done, total)

    return told


class Lines:
    """Progress as plain lines, for logs and pipes: the first after half a minute, so that what is quick says nothing.

    Args:
        clock: tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._name, self._began, self._first = "", 0.0, 0
        self._said = clock()

    def tell(self, name: str, done: int, total: int) -> None:
        """Print how far a stage is, where it is time to.

        Args:
            name: what is running.
            done: how much of it is done.
            total: how much it is in all.
        """
        now = self._clock()
        # What is counted from its beginning again, such as another layer of the same stage, is judged anew.
        if name != self._name or done < self._first:
            self._name, self._began, self._first = name, now, done
        if now - self._said < EVERY or not total:
            return
        from moetailor.estimates.estimate import duration

        self._said, gone = now, done - self._first
        left = f", {duration((now - self._began) / gone * (total - done))} left" if gone else ""
        output.say(f"{name}: {done:,} of {total:,}, {done / total:.0%}{left}")


def _bar(amount: object) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    return Progress(*columns, console=output.messages(), transient=True, disable=output.is_quiet())  # type: ignore[arg-type]
