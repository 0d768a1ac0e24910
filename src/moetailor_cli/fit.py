"""The verb for whoever has a model and a machine: what fits, which of it is made, and how it is served."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetailor_cli import output, waiting
from moetailor_cli.options import (
    AMOUNT,
    DECIDES,
    READS,
    SERVES,
    WRITES,
    Device,
    Dtype,
    Engine,
    Model,
    Overwrite,
    TextColumn,
    Trust,
)

if TYPE_CHECKING:
    from moetailor.fit import Outlook
    from moetailor.serving import Engine as Engines
    from moetailor.serving import Served

ABOUT_KL = (
    "KL, in nats a token, is how far predictions are from the original's. By rule it is what moetailor's small "
    "reference model lost at as many bits"
)


def fit(
    model: Model,
    memory: Annotated[
        str,
        typer.Option(
            help="What the engine may take, for weights, cache and itself, such as 24GB (10^9) or 24GiB.",
            rich_help_panel=AMOUNT,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the result. Without it nothing is made.", rich_help_panel=WRITES),
    ] = None,
    engine: Engine = "transformers",
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the one sequence whose keys and values must fit. [dim]default: 8192, or what the model "
            "takes at most[/dim]",
            rich_help_panel=SERVES,
        ),
    ] = None,
    choice: Annotated[
        int | None,
        typer.Option(min=1, help="Which to make, by its number; the first when absent.", rich_help_panel=DECIDES),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Make the first that fits, and ask nothing.", rich_help_panel=DECIDES)
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Calibration text, as calibrate takes it; some comes along. Repeatable.", rich_help_panel=READS
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure the result on; some comes along. Repeatable.", rich_help_panel=READS),
    ] = None,
    text_column: TextColumn = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what fits and what it would take, and stop.", rich_help_panel=WRITES)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what fits as JSON, and stop.", rich_help_panel=WRITES)
    ] = False,
    converter: Annotated[
        Path | None,
        typer.Option(
            help="With --engine llama.cpp: its script convert_hf_to_gguf.py. [dim]default: the one on PATH[/dim]",
            rich_help_panel=WRITES,
        ),
    ] = None,
    quantizer: Annotated[
        Path | None,
        typer.Option(
            help="With --engine llama.cpp: its llama-quantize. [dim]default: the one on PATH[/dim]",
            rich_help_panel=WRITES,
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> bool:
    """Make a model fit some memory and an engine: look what fits, make it, measure it, say how to serve it.

    [dim]moetailor fit Qwen/Qwen3-30B-A3B --memory 24GB --engine vllm -o OUT[/dim]
    """
    from moetailor.checkpoint.original import Original, looked_at
    from moetailor.estimates.estimate import Host
    from moetailor.fit import Job, fit, foretold, look
    from moetailor.pipeline import calibration_folder
    from moetailor.planning.budget import parse_bytes
    from moetailor.serving import Served, find_engine

    given = {"data": data, "held_out": held_out, "text_column": text_column, "device": device, "dtype": dtype}
    with looked_at(model, trust_remote_code=trust_remote_code) as original:
        found = look(original, memory=parse_bytes(memory, "--memory"), engine=find_engine(engine), context=context)
        if json:
            print(json_module.dumps(found.to_json(), indent=2))
            return False
        _show(model, found)
        if found.fits_as_it_is and choice is None:
            served = Served(folder=Path(model), context=found.room.context)
            _served("It fits as it is", found.engine, served)
            return False
        chosen = found.chosen(choice)
        if out is not None or converter or quantizer:
            given["tools"] = found.engine.tools(original, converter, quantizer)
        job = Job(choice=chosen, room=found.room, **{name: value for name, value in given.items() if value})
        if out is None or dry_run:
            output.say(f"To make {chosen.name}:")
            host = Host.measured(output.BEGAN, original, device=device, dtype=dtype)
            output.estimate(foretold(host, original, job, out, overwrite=overwrite))
            return True
    if not yes and choice is None and not _agreed(chosen.name, out):
        return False
    opened = Original(model, trust_remote_code=trust_remote_code)
    if original.headers_only:  # nothing of it could be tried before
        found.engine.tools(opened, converter, quantizer)
    with waiting.stages() as progress:
        plan, scores = fit(opened, out, job, overwrite=overwrite, progress=progress)
    output.plan(plan, chosen.format)
    if scores is None:
        _written(out, found)
    else:
        output.scores(scores)
        output.expected(str(out), scores)
    output.took(out, calibration_folder(out))
    found.engine.check(out)
    _served("serve it", found.engine, Served(folder=out, context=found.room.context))
    return False


def _show(model: str, found: Outlook) -> None:
    """Print where the memory goes, and what the model can become."""
    from moetailor.words import nats, nbytes

    room = found.room
    output.text(
        f"{model}: {nbytes(found.nbytes)} of weights. {nbytes(room.memory)} for {found.engine.name}: "
        f"{nbytes(room.cache)} for the keys and values of {room.context:,} tokens, {nbytes(room.overhead)} for itself, "
        f"{nbytes(room.weights)} for weights."
    )
    rows, number = [], 0
    for offer in found.offers:
        number += offer.fits
        size = nbytes(offer.nbytes) if offer.nbytes else "-"
        cost = (nats(offer.expected or 0.0), offer.grade) if offer.fits else ("-", "does not fit")
        rows.append([f"{number if offer.fits else '-'}  {offer.choice.name}", size, *cost])
    output.result("")
    output.table(["what it can become", "weights", "KL, by rule", "which is"], rows)
    for offer in found.offers if number else ():  # where none fits, the refusal says why
        if not offer.fits:
            output.text(f"{offer.choice.name}: {offer.why}")
    output.result("")
    measured = "; what this model loses is measured once it is made." if found.engine.loads_originals else "."
    output.text(ABOUT_KL + measured)


def _written(out: Path, found: Outlook) -> None:
    """Say how large a result is that only its engine loads."""
    from moetailor.checkpoint.place import PROVENANCE_FILE
    from moetailor.words import nbytes

    written = json_module.loads((out / PROVENANCE_FILE).read_text())["bytes"]["compressed"]
    room = found.room.weights
    output.say(f"{out}: {nbytes(written)} written, weights may take {nbytes(room)}")
    if written > room:
        output.warn(f"{written - room:,} bytes more than fit; give less --memory, and --overwrite")
    output.say(f"not measured: {found.engine.name} alone loads it; its llama-perplexity --kl-divergence measures it")


def _served(what: str, engine: Engines, served: Served) -> None:
    """Say how the engine is started, and before that what it lacks here."""
    if (told := engine.absent(served)) is not None:
        output.warn(told)
    output.say(f"{what}: {shlex.join(engine.command(served))}", copied=True)


def _agreed(name: str, out: Path) -> bool:
    """Ask whether it shall be made."""
    from moetailor.errors import MoetailorError

    if not sys.stdin.isatty():
        raise MoetailorError("nobody can be asked here which to make: give --yes for the first, or --choice N")
    return typer.confirm(f"Make {name} in {out}?", default=True, err=True)
