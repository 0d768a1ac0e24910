"""The verb that starts an engine on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moetailor_cli import output
from moetailor_cli.options import RUNS, SERVES, WRITES, Engine


def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of a result, or of any checkpoint; or a GGUF file.")
    ],
    engine: Engine = "transformers",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a sequence, for engines that set that much memory aside.", rich_help_panel=SERVES
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=RUNS)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.", rich_help_panel=RUNS)] = 8000,
    binary: Annotated[
        Path | None,
        typer.Option(help="The engine's program, such as llama-server, where it is not on PATH.", rich_help_panel=RUNS),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command that would run, and stop.", rich_help_panel=WRITES)
    ] = False,
) -> None:
    """Serve a checkpoint as OpenAI's API has it, with the engine that loads it.

    [dim]moetailor serve OUT --engine vllm[/dim]
    """
    import shlex

    from moetailor.serving import Served, find_engine

    chosen = find_engine(engine)
    chosen.check(folder)
    served = Served(folder=folder, context=context, host=host, port=port, binary=binary)
    command = shlex.join(chosen.command(served))
    if dry_run:
        output.result(command)
        return
    if chosen.absent(served) is None:
        output.say(f"http://{host}:{port}/v1: {command}", copied=True)
    chosen.serve(served)
