"""The verb that measures many methods; apart from the others because its text is of two kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moetailor_cli import dry, output, ranking, waiting
from moetailor_cli.completion import complete_methods
from moetailor_cli.options import (
    AMOUNT,
    DECIDES,
    READS,
    RUNS,
    WRITES,
    Batch,
    BatchMemory,
    Device,
    DryRun,
    Dtype,
    Length,
    MaskSpecial,
    Model,
    SampleSize,
    SampleTokens,
    Seed,
    Sequences,
    Stream,
    TextColumn,
    Trust,
)
from moetailor_cli.reading import read_nbytes, read_sample


def compare(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the comparison.", rich_help_panel=WRITES)],
    held_out: Annotated[
        list[str],
        typer.Option(
            help="Text to measure on, as --data; its documents may name a domain. Repeatable.", rich_help_panel=READS
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Calibration text, as calibrate takes it. Repeatable.", rich_help_panel=READS),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A finished calibration folder, instead of --data.", rich_help_panel=READS)
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Names with commas, with parameters as in mone:score=exact, and bits of what stays as in reap@4; all "
            "stands for those that are neither trained nor slow, with --sizes for bits, too. Repeatable. Default: all.",
            autocompletion=complete_methods,
            rich_help_panel=DECIDES,
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            help="Shares of each layer's experts to remove, with commas. "
            "[dim]default without --sizes: 10%,25%,50%[/dim]",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Instead of --remove: shares of the original's bytes, or bytes such as 12GB, with commas.",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    text_column: TextColumn = None,
    sequences: Sequences = 128,
    held_out_sequences: Annotated[
        int, typer.Option(min=1, help="Blocks of held-out text.", rich_help_panel=READS)
    ] = 64,
    length: Length = None,
    batch_size: Batch = 1,
    sample_tokens: SampleTokens = None,
    sample_size: SampleSize = "8GB",
    seed: Seed = None,
    mask_special: MaskSpecial = False,
    stream: Stream = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Folder for hidden states of held-out text and, with --stream, the result that is measured. "
            "[dim]default: in the folder of the comparison, where a stopped run finds the states again[/dim]",
            rich_help_panel=RUNS,
        ),
    ] = None,
    dry_run: DryRun = False,
    device: Device = None,
    batch_memory: BatchMemory = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure methods at several sizes or ratios from one calibration; leaves no checkpoint. A stopped run resumes.

    [dim]moetailor compare MODEL -o DIR --data calibration.jsonl --held-out heldout.jsonl --sizes 75%,50%,35%[/dim]
    """
    import moetailor
    from moetailor.errors import MoetailorError

    text = moetailor.TextOptions(
        data=tuple(data or ()),
        sequences=sequences,
        length=length,
        seed=seed,
        mask_special=mask_special,
        batch_size=batch_size,
        text_column=text_column,
    )
    held_out_text = moetailor.TextOptions(
        data=tuple(held_out),
        sequences=held_out_sequences,
        length=length,
        batch_size=batch_size,
        text_column=text_column,
    )
    wanted = {
        "held_out": held_out_text,
        "text": text if data else None,
        "calibration": calibration,
        "methods": _words(methods or ["all"]),
        "remove": None if remove is None else _words([remove]),
        "sizes": None if sizes is None else _words([sizes]),
        "sample": read_sample(sample_tokens, sample_size, seed),
        "stream": stream,
        "dtype": dtype,
    }
    if dry_run:
        dry.compare(model, out, wanted, device=device, trust_remote_code=trust_remote_code)
        return
    with waiting.stages() as progress:
        results = moetailor.compare(
            model,
            out,
            scratch=scratch,
            device=device,
            batch_memory=read_nbytes(batch_memory),
            trust_remote_code=trust_remote_code,
            progress=progress,
            **wanted,
        )
    ranking.show(results)
    output.say(f"results are in {out / 'results.json'}, to be looked at in {out / 'report.html'}")
    output.took(out)
    if all(cell["error"] is not None for cell in results["cells"]):
        raise MoetailorError("no row could be measured, why is said above; the same command tries them again")


def _words(entries: list[str]) -> list[str]:
    return [word.strip() for entry in entries for word in entry.split(",") if word.strip()]
