"""The verb that lists the methods and their parameters."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from moetailor_cli import output
from moetailor_cli.completion import complete_method

if TYPE_CHECKING:
    from moetailor.methods.description import Description

HEAD = ("method", "a removed expert becomes", "reads", "paper")


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="METHOD", help="One method, with its parameters.", autocompletion=complete_method),
    ] = None,
) -> None:
    """List the methods, or say what one does and what its parameters are.

    [dim]moetailor methods linear[/dim]
    """
    from moetailor.methods import METHODS, find_method
    from moetailor.methods.description import describe

    if name is None:
        _list([describe(METHODS[known]) for known in sorted(METHODS)])
    else:
        _show(describe(find_method(name)))


def _list(found: list[Description]) -> None:
    """Print two lines for each method: what it is, and what it does."""
    rows: list[tuple[str, ...]] = [HEAD]
    for method in found:
        becomes = ", ".join(kind.kind.replace("_", " ") for kind in method.becomes)
        rows.append((method.name, becomes, _reads(method), method.paper or "-"))
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    for row, summary in zip(rows, ["", *(method.summary for method in found)], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        output.result("  ".join(cells).rstrip())
        _paragraph(summary, "  ")
    output.result("")
    _paragraph("moetailor methods METHOD shows the parameters of one, which -p name=value sets.")


def _show(method: Description) -> None:
    _paragraph(f"{method.name}: {method.summary}")
    for part in (method.text, *method.about.split("\n\n")):
        if part:
            output.result("")
        if part.startswith("    "):  # a formula
            output.result(part)
        else:
            _paragraph(_plain(part))
    output.result("")
    facts = {
        "paper": method.paper or "none",
        "a removed expert becomes": ", ".join(kind.label for kind in method.becomes),
        "reads": ", ".join([*method.statistics, *(["experts and sampled tokens"] if method.reads_weights else [])]),
        "calibrate with": ", ".join(method.options),
        "note": "; ".join(method.notes),
    }
    for what, said in facts.items():
        if said:
            _paragraph(f"{what}: {said}")
    if method.parameters:
        output.result("")
        output.result("parameters and their defaults:")
    for parameter in method.parameters:
        _paragraph(f"-p {parameter.name}={str(parameter.default).lower()}  {parameter.kind}")
        _paragraph(_plain(parameter.meaning), "   ")


def _reads(method: Description) -> str:
    parts = [*(["sums"] if method.statistics else []), *(["experts"] if method.reads_weights else [])]
    return ", ".join(parts) or "nothing"


def _plain(text: str) -> str:
    """Return a text of a docstring as people read it."""
    return text.replace("`", "")


def _paragraph(text: str, indent: str = "") -> None:
    width = max(output.width(), 20)
    for line in textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False):
        output.result(line)
