"""The verb that draws a comparison again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moetailor_cli import output


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a comparison, with its results.json.")],
) -> None:
    """Write DIR/report.html from DIR/results.json: one page that needs no network.

    [dim]moetailor report comparison[/dim]
    """
    from moetailor.comparison.stored import read_results
    from moetailor.report import write_report

    page = folder / "report.html"
    write_report(read_results(folder / "results.json"), page)
    output.say(f"the report is in {page}")
