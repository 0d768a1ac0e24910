"""The log beside what a run made: what it said, and which stages began when, under the command."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from pathlib import Path

# How a log begins.
OURS = re.compile(r"[-0-9]{10} [:0-9]{8}  \$ moetailor ")
# What this run said so far, each with its time; the command comes first.
_lines: list[tuple[float, str]] = []


def begin() -> None:
    """Forget what another run said in this process, and note the command."""
    _lines.clear()
    note(f"$ {shlex.join(['moetailor', *sys.argv[1:]])}")


def note(text: str) -> None:
    """Remember what was said or began just now."""
    _lines.append((time.time(), text))


def keep(artifact: Path) -> None:
    """Put what was noted so far behind what the log beside an artifact holds: `plan.json.log`, `OUT.log`.

    A file of that name that is no such log stays as it is: output is often sent there.

    Raises:
        UnwritableError: it cannot be written.
    """
    from importlib.metadata import version

    from moetailor.checkpoint.artifact import write_text
    from moetailor.checkpoint.folder import CONFIG

    file = Path(f"{os.path.abspath(artifact)}.log")  # of `OUT/` and `.`, too
    if (file.parent / CONFIG).exists():  # a model's folder, in which nothing else shall lie
        return
    before = file.read_text(encoding="utf-8", errors="replace") + "\n" if file.is_file() else ""
    if os.path.lexists(file) and not OURS.match(before):
        return
    command, *rest = _lines
    with_these = ", ".join(f"{name} {version(name)}" for name in ("moetailor", "torch", "transformers"))
    write_text(file, before + "".join(_shown(*line) for line in (command, (command[0], with_these), *rest)))


def _shown(moment: float, text: str) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    return f"{at}  " + text.replace("\n", "\n" + " " * 21) + "\n"
