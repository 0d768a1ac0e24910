"""The verb that hands a result over to lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moetailor_cli import output
from moetailor_cli.options import WRITES, Engine


def lm_eval(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a result, or of any checkpoint.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ...", help="All that its own command line takes beside the model, behind --."),
    ] = None,
    engine: Engine = "transformers",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command that would run, and stop.", rich_help_panel=WRITES)
    ] = False,
) -> None:
    """Run lm-evaluation-harness on a result, with any of its tasks and options.

    [dim]moetailor lm-eval OUT -- --tasks arc_easy --batch_size 8 --model_args dtype=bfloat16[/dim]
    """
    import shlex

    from moetailor.serving import find_engine
    from moetailor.serving.harness import harness_command, run_harness

    command = harness_command(folder, find_engine(engine), words or ())
    if dry_run:
        output.result(shlex.join(command))
        return
    run_harness(command)
