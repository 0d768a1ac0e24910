"""What a shell is offered for the names of methods, without waiting for torch."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


def method_names() -> list[str]:
    """Return the names of the methods, read off their files and entry points: importing them would load torch."""
    package = find_spec("moetailor")
    folder = Path((package and package.origin) or "").parent / "methods"
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("*.py")]
    registered = [part for text in texts for part in re.split("^@register$", text, flags=re.MULTILINE)[1:]]
    own = re.findall(r'^    name = "(\w+)"$', "\n".join(registered), re.MULTILINE)
    return sorted({*own, *(entry.name for entry in entry_points(group="moetailor.methods"))})


def complete_method(incomplete: str) -> list[str]:
    """Return the methods that a word may go on to."""
    return [name for name in method_names() if name.startswith(incomplete)]


def complete_methods(incomplete: str) -> list[str]:
    """Return what a list with commas may go on to."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in sorted(["all", *method_names()]) if name.startswith(last)]
