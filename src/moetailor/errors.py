"""What a user can get wrong, said so that it can be put right: what is wrong, with the numbers, then what to do."""

from __future__ import annotations

import difflib
import errno
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class MoetailorError(Exception):
    """A refused input. The command line prints it without a traceback and exits with 1."""


class CheckpointError(MoetailorError):
    """The folder is not a checkpoint that moetailor can read, or not one that it handles."""


class CalibrationError(MoetailorError):
    """The text or the calibration folder cannot be used, or the model gave numbers that are not finite."""


class PlanError(MoetailorError):
    """The plan cannot work: for this model, this budget or this calibration."""


class TooSmallError(PlanError):
    """A budget of bytes is smaller than anything that a method can do.

    Attributes:
        least: bytes of the smallest result that it can make.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


class UnwritableError(MoetailorError):
    """A file or folder cannot be written: the disk is full, or the place is not the user's to write to."""

    def __init__(self, place: str | Path, error: OSError) -> None:
        cure = "make room and run the same command again" if error.errno in FULL else "name a place that can be written"
        super().__init__(f"{place}: cannot be written ({error.strerror or error}); {cure}")
        self.errno = error.errno


class MoetailorWarning(UserWarning):
    """Something worked, but not as well as it could; the command line prints it and goes on."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'? Known: ...`` for an unknown name, to be appended to a message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Known: {', '.join(known)}"


def out_of_memory(error: BaseException) -> str | None:
    """Return what an error says of memory that ran out, on a device or here; None of any other error."""
    text = str(error)
    if match := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text):  # torch, of a CPU's
        return f"out of memory: no {int(match[1]):,} bytes are free"
    if isinstance(error, MemoryError):
        return f"out of memory: {text}".removesuffix(": ")
    return text.partition(". ")[0] if isinstance(error, RuntimeError) and "out of memory" in text else None


def reason_of(error: BaseException) -> str:
    """Return what an error of a library says, on one line, with its kind where the text alone would puzzle."""
    text = textwrap.shorten(str(error), 300)
    told = text and isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    return text if told else f"{type(error).__name__}: {text}".removesuffix(": ")
