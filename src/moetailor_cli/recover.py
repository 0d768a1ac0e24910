"""The verb that trains; apart from the others because most of its options are its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from moetailor_cli import output, waiting
from moetailor_cli.options import READS, RUNS, TRAINS, WRITES, Device, Dtype, Overwrite, TextColumn, Trust

FILES = "JSONL with `messages`, with `prompt` and `completion`, or with `text`; or plain text, .txt. Repeatable."


def recover(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The checkpoint to train: folder or hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.", rich_help_panel=WRITES)],
    data: Annotated[list[str], typer.Option(help=FILES, rich_help_panel=READS)],
    text_column: TextColumn = None,
    teacher: Annotated[
        str | None, typer.Option(help="The original: folder or hub name.", rich_help_panel=READS)
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="router, standins, experts, rest or all; a list with commas, or repeatable. Default: router.",
            rich_help_panel=TRAINS,
        ),
    ] = None,
    loss: Annotated[
        Literal["task", "kd", "both"],
        typer.Option(
            help="The words of the text, the predictions of the teacher, or the sum of both.", rich_help_panel=TRAINS
        ),
    ] = "kd",
    loss_on: Annotated[
        Literal["completion", "all"],
        typer.Option(help="What counts of instructions; plain text counts whole.", rich_help_panel=TRAINS),
    ] = "completion",
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Examples to measure the loss on, before and after. As --data.", rich_help_panel=READS),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a block. [dim]default: 1024, or what the model takes at most[/dim]",
            rich_help_panel=READS,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps. Default: as many as --epochs takes.", rich_help_panel=TRAINS),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the examples.", rich_help_panel=TRAINS)] = 1.0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Blocks that a process runs at once.", rich_help_panel=RUNS)
    ] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.", rich_help_panel=TRAINS)] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.", rich_help_panel=TRAINS)] = 1e-4,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises.", rich_help_panel=TRAINS)
    ] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.", rich_help_panel=TRAINS)] = 0.0,
    temperature: Annotated[
        float, typer.Option(help="Softens the predictions that kd compares.", rich_help_panel=TRAINS)
    ] = 1.0,
    layer_weight: Annotated[
        float,
        typer.Option(help="Weight of the distance between the outputs of the decoder layers.", rich_help_panel=TRAINS),
    ] = 0.0,
    anneal: Annotated[
        float,
        typer.Option(
            help="Share of the steps in which the originals of low-rank experts fade out (LightMoE).",
            rich_help_panel=TRAINS,
        ),
    ] = 0.0,
    anneal_gamma: Annotated[
        float, typer.Option(help="0 fades linearly, more faster at first.", rich_help_panel=TRAINS)
    ] = 0.0,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of the adapters of experts and the rest.", rich_help_panel=TRAINS)
    ] = 8,
    lora_alpha: Annotated[int, typer.Option(help="Their scale is this / rank.", rich_help_panel=TRAINS)] = 16,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute layers again in the backward pass: less memory.",
            rich_help_panel=RUNS,
        ),
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp",
            help="The processes of torchrun share one model, each GPU with a part of each layer.",
            rich_help_panel=RUNS,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Orders the blocks and starts the adapters.", rich_help_panel=TRAINS)] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=WRITES)] = 100,
    json: Annotated[
        Path | None, typer.Option(help="Write losses, tokens and seconds to this file.", rich_help_panel=WRITES)
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a part of a compressed checkpoint towards its original, or on a task. A stopped run resumes.

    [dim]moetailor recover OUT --teacher MODEL --data text.jsonl -o RECOVERED --train router --loss kd[/dim]
    """
    from accelerate import PartialState

    import moetailor
    from moetailor.checkpoint.artifact import write_json
    from moetailor.checkpoint.place import check_file

    if json is not None:
        check_file(json, "recovery")
    words = [word for entry in train or ["router"] for word in entry.split(",")]
    cut = {"length": length, "loss_on": loss_on, "text_column": text_column}
    with waiting.stages() as progress:
        result = moetailor.recover(
            model,
            out,
            examples=moetailor.ExampleOptions(data=tuple(data), **cut),
            teacher=teacher,
            train=words,
            loss=loss,
            options=moetailor.RecoveryOptions(
                steps=steps,
                epochs=epochs,
                batch_size=batch_size,
                accumulate=accumulate,
                lr=lr,
                warmup=warmup,
                weight_decay=weight_decay,
                seed=seed,
                save_every=save_every,
                temperature=temperature,
                layer_weight=layer_weight,
                anneal=anneal,
                anneal_gamma=anneal_gamma,
                lora_rank=lora_rank,
                lora_alpha=lora_alpha,
                gradient_checkpointing=gradient_checkpointing,
                fsdp=fsdp,
            ),
            held_out=moetailor.ExampleOptions(data=tuple(held_out), **cut) if held_out else None,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not PartialState().is_main_process:
        return  # under torchrun the first process speaks for all
    output.recovery(result)
    taken = output.took(out)
    if json is not None:
        about = {"format": "moetailor-recovery", "version": 1}
        write_json(json, {**about, **asdict(result), "out": str(out), "took": taken})
        output.say(f"losses are in {json}")
