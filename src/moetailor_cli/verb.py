"""What all verbs have in common: how their help is shown."""

from __future__ import annotations

import re
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from moetailor_cli.options import EVERY, PANELS

# What stands beside a flag for its value; a flag that takes none has nothing there.
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH", "file": "PATH", "directory": "PATH", "bool": ""}


class Verb(TyperCommand):
    """A verb whose help is shown as it is written: brackets are brackets, but for our own [dim]."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for part in (self, *self.params):
            part.help = _escaped(getattr(part, "help", None))  # type: ignore[union-attr]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options, these group by group."""
        found = _narrow(super().get_params(ctx), ctx)
        for part in found:
            if part.param_type_name == "option" and part.rich_help_panel is None:
                part.rich_help_panel = EVERY  # --help
        return sorted(found, key=lambda part: PANELS.index(part.rich_help_panel) if part.rich_help_panel else -1)


class Root(TyperGroup):
    """The command of which the verbs are parts."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its options."""
        return _narrow(super().get_params(ctx), ctx)


def _narrow(parts: list[Any], ctx: Any) -> list[Any]:
    """Call the values of options in few letters: what a wide column takes, help lacks."""
    for part in parts:
        if part.param_type_name == "option" and part.metavar is None:
            kind = re.sub(r"^<(?:list\[)?(\w+)(?: range)?\]?>$", r"\1", part.display_type(ctx))
            part.metavar = METAVARS.get(kind)
    return parts


def _escaped(text: str | None) -> str | None:
    """Return help with every bracket escaped that is no [dim]."""
    parts = re.split(r"(\[/?dim\])", text or "")
    return text and "".join(part if number % 2 else escape(part) for number, part in enumerate(parts))
