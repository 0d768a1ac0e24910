"""The verbs that measure: inspect, calibrate, evaluate."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moetailor_cli import dry, output, waiting
from moetailor_cli import redundancy as redundancy_module
from moetailor_cli.options import (
    MEASURES,
    READS,
    WRITES,
    Batch,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Length,
    MaskSpecial,
    Model,
    SampleSize,
    SampleTokens,
    Scratch,
    Seed,
    Sequences,
    States,
    Stream,
    TextColumn,
    Trust,
)
from moetailor_cli.reading import read_sample


def inspect(
    model: Model,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Its calibration folder: also say how redundant the experts are.", rich_help_panel=READS),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=WRITES)] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show layers, experts, top-k, parameters and bytes of a checkpoint, and what of it is redundant.

    [dim]moetailor inspect allenai/OLMoE-1B-7B-0125 --calibration calib[/dim]
    """
    from moetailor.summary import summarise

    summary = summarise(model, trust_remote_code=trust_remote_code)
    redundancy = None if calibration is None else _redundancy(model, calibration, trust_remote_code)
    if json:
        found = {} if redundancy is None else {"redundancy": redundancy.to_json()}
        print(json_module.dumps(summary.to_json() | found, indent=2))
        return
    output.summary(summary)
    if redundancy is not None:
        redundancy_module.show(redundancy)


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Calibration folder.", rich_help_panel=WRITES)],
    data: Data,
    text_column: TextColumn = None,
    sequences: Sequences = 128,
    length: Length = None,
    sample_tokens: SampleTokens = None,
    sample_size: SampleSize = "8GB",
    seed: Seed = None,
    batch_size: Batch = 4,
    mask_special: MaskSpecial = False,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual",
            help="Also measure how far the experts turn the residual stream: easy_ep.",
            rich_help_panel=MEASURES,
        ),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also measure how sensitive predictions are to errors of each layer: auto.",
            rich_help_panel=MEASURES,
        ),
    ] = False,
    stream: Stream = False,
    states: States = "auto",
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure on text what each expert does; every plan is made from that. A stopped run resumes.

    [dim]moetailor calibrate MODEL -o calib --data calibration.jsonl --sequences 128 --length 2048[/dim]
    """
    import moetailor
    from moetailor import ranks

    text = moetailor.TextOptions(
        data=tuple(data),
        sequences=sequences,
        length=length,
        seed=seed,
        mask_special=mask_special,
        batch_size=batch_size,
        text_column=text_column,
    )
    sample = read_sample(sample_tokens, sample_size, seed)
    run: dict[str, Any] = {"residual": residual, "sensitivity": sensitivity, "stream": stream, "states": states}
    run |= {"text": text, "sample": sample, "dtype": dtype}
    if dry_run:
        dry.calibrate(model, out, run, device=device, trust_remote_code=trust_remote_code)
        return
    with ranks.shared(folder=os.path.realpath(out)) as first, waiting.stages() as progress:
        calibration = moetailor.calibrate(
            model,
            out,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress if first else None,
            **run,
        )
    if first:  # under torchrun it speaks for all
        output.calibration(calibration)
        output.took(out)


def evaluate(
    compressed: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the compressed checkpoint.")],
    against: Annotated[str, typer.Option(help="The original: folder or hub name.", rich_help_panel=READS)],
    data: Data,
    text_column: TextColumn = None,
    sequences: Sequences = 64,
    length: Length = None,
    batch_size: Batch = 1,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-evaluation-harness to run on both. Repeatable.", rich_help_panel=MEASURES),
    ] = None,
    task_dir: Annotated[Path, typer.Option(help="Folder of the tasks' YAML files.", rich_help_panel=MEASURES)] = Path(
        "examples/tasks"
    ),
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of the files the tasks read.", rich_help_panel=MEASURES)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.", rich_help_panel=MEASURES)] = None,
    json: Annotated[Path | None, typer.Option(help="Write the scores to this file.", rich_help_panel=WRITES)] = None,
    stream: Stream = False,
    scratch: Scratch = None,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compare a compressed checkpoint with its original: perplexity, KL, agreement, speed, size, tasks.

    [dim]moetailor evaluate OUT --against MODEL --data heldout.jsonl --json scores.json[/dim]
    """
    import moetailor
    from moetailor.checkpoint.artifact import write_json
    from moetailor.checkpoint.place import check_file
    from moetailor.evaluation.evaluate import check_streamed

    if json is not None:
        check_file(json, "estimate" if dry_run else "scores")
    blocks = {"sequences": sequences, "length": length, "batch_size": batch_size}
    text = moetailor.TextOptions(data=tuple(data), text_column=text_column, **blocks)
    if dry_run:
        check_streamed(stream, device_map=device_map, tasks=tasks)
        run = {"text": text, "tasks": bool(tasks), "stream": stream, "dtype": dtype}
        found = dry.evaluate(compressed, against, run, device=device, trust_remote_code=trust_remote_code)
        if json is not None:
            write_json(json, found.to_json())
        return
    with waiting.stages() as progress:
        scores = moetailor.evaluate(
            compressed,
            against,
            text=text,
            tasks=moetailor.TaskOptions(tasks=tuple(tasks or ()), task_dir=task_dir, task_data=task_data, limit=limit),
            stream=stream,
            scratch=scratch,
            device=device,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    output.scores(scores)
    output.expected(compressed, scores)
    taken = output.took()
    if json is not None:
        write_json(json, scores.to_json() | {"took": taken})
        output.say(f"scores are in {json}")


def _redundancy(model: str, calibration: Path, trust_remote_code: bool) -> Any:
    """Measure the redundancy of the calibrated model."""
    import moetailor

    weights = moetailor.ExpertWeights(model, trust_remote_code=trust_remote_code)
    with waiting.progress("inspect") as progress:
        return moetailor.find_redundancy(moetailor.Calibration.open(calibration), weights=weights, progress=progress)
