"""Runs in children that are killed, at chosen steps: each change of the disk is one."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CALLS = ("open", "mkdir", "rename", "replace", "link", "symlink", "rmdir", "unlink", "remove", "pwrite", "chmod")


def die_at(step: int) -> None:
    """Let this process be killed in front of its n-th call of the above."""
    left = itertools.count(step - 1, -1)

    def count() -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(count)


def count_steps(file: Path) -> None:
    """Let this process write into a file how many calls of the above it has made."""
    number, handle = itertools.count(1), os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write = os.write

    def count() -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        write(handle, str(next(number)).encode())

    _watch(count)


def _watch(count: Callable[[], None]) -> None:
    def counted(call: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> object:
            if call is not real_open or arguments[1] & os.O_CREAT:
                count()
            return call(*arguments, **options)

        return run

    real_open = os.open
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def killed(run: Callable[[], object], step: int) -> bool:
    """Run in a child that is killed at a step; returns False when it came to a good end before."""

    def go() -> None:
        die_at(step)
        run()

    _, status = os.waitpid(in_child(go), 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def kills(run: Callable[[], object]) -> Iterator[int]:
    """Run in a child that is killed at its first step, in another one at its second, and so on until one ends.

    Yields the step after each kill.
    """
    return itertools.takewhile(lambda step: killed(run, step), itertools.count(1))


def in_child(run: Callable[[], object]) -> int:
    """Start something in a child and return its process id; it exits as Python does, with 1 where it raises."""
    child = os.fork()
    if child == 0:
        code: object = 1
        try:
            run()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(int(code or 0))  # type: ignore[call-overload]
    return child
