"""The verbs that write checkpoints: apply, and compress, which does all stages."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer

from moetailor_cli import dry, output, waiting
from moetailor_cli.options import (
    READS,
    WRITES,
    Allocation,
    Batch,
    BatchMemory,
    Bits,
    Converter,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Format,
    Guard,
    Keep,
    Layers,
    Length,
    LoadDtype,
    MaskSpecial,
    Memory,
    Method,
    Model,
    Native,
    Overwrite,
    Parameter,
    Propagate,
    Protect,
    Quantizer,
    Remove,
    SampleSize,
    SampleTokens,
    Seed,
    Sequences,
    Size,
    States,
    Stream,
    TextColumn,
    Trust,
    Uniform,
)
from moetailor_cli.reading import (
    read_bits,
    read_budget,
    read_format,
    read_menu,
    read_nbytes,
    read_numbers,
    read_pairs,
    read_parameters,
    read_sample,
)

VERIFIED = "opened again and run once: names, shapes and bytes are as planned, all values finite"


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.", rich_help_panel=WRITES)],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="The plan's calibration folder, for plans with stand-ins or merged experts.", rich_help_panel=READS
        ),
    ] = None,
    propagate: Propagate = "original",
    format: Format = "auto",
    overwrite: Overwrite = False,
    allow_other_weights: Annotated[
        bool,
        typer.Option(
            "--allow-other-weights", help="Apply the plan to another model of the same shapes.", rich_help_panel=READS
        ),
    ] = False,
    gguf_recipe: Annotated[
        Path | None,
        typer.Option(
            help="Folder for an importance matrix and tensor types, with which llama-quantize gives the plan's bits to "
            "the result, which is an ordinary checkpoint; --format gguf.",
            rich_help_panel=WRITES,
        ),
    ] = None,
    converter: Converter = None,
    quantizer: Quantizer = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Open the result again and run it once.", rich_help_panel=WRITES),
    ] = True,
    dry_run: DryRun = False,
    device: Device = None,
    batch_memory: BatchMemory = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the checkpoint that a plan describes.

    [dim]moetailor apply MODEL plan.json -o OUT --calibration calib[/dim]
    """
    import moetailor
    from moetailor import ranks
    from moetailor.checkpoint.place import check_inputs
    from moetailor.planning.plan import calibration_hash

    check_inputs(out, {"the plan": plan})
    if gguf_recipe is not None:
        check_inputs(gguf_recipe, {"the plan": plan})
    if dry_run:
        form = format if gguf_recipe is None else "gguf"
        run = {"propagate": propagate, "format": form, "overwrite": overwrite, "verify": verify}
        run |= {"allow_other_weights": allow_other_weights, "converter": converter}
        dry.apply(model, plan, out, calibration, run, device=device, trust_remote_code=trust_remote_code)
        return
    made, digest = moetailor.Plan.load(plan), sha256(plan.read_bytes()).hexdigest()
    given = None if calibration is None else moetailor.Calibration.open(calibration)
    about = {"folder": os.path.realpath(out), "plan": digest, "format": format, "propagate": propagate}
    about |= {"overwrite": overwrite, "calibration": given and calibration_hash(given.fingerprint)}
    with ranks.shared(**about) as first, waiting.stages() as progress:
        moetailor.apply(
            made,
            model,
            out,
            calibration=given,
            propagate=propagate,
            format=format,
            overwrite=overwrite,
            allow_other_weights=allow_other_weights,
            gguf_recipe=gguf_recipe,
            converter=converter,
            quantizer=quantizer,
            verify=verify,
            device=device,
            batch_memory=read_nbytes(batch_memory),
            trust_remote_code=trust_remote_code,
            progress=progress if first else None,
        )
    if not first:
        return  # under torchrun the first process speaks for all
    if verify:
        output.say(VERIFIED)
    _written(out)
    output.took(out)


def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.", rich_help_panel=WRITES)],
    data: Data,
    method: Method,
    native: Native = False,
    remove: Remove = None,
    keep: Keep = None,
    size: Size = None,
    memory: Memory = None,
    load_dtype: LoadDtype = None,
    param: Parameter = None,
    layers: Layers = None,
    protect: Protect = None,
    guard_super_experts: Guard = False,
    allocation: Allocation = "uniform",
    bits: Bits = None,
    uniform_layers: Uniform = False,
    text_column: TextColumn = None,
    sequences: Sequences = 128,
    length: Length = None,
    sample_tokens: SampleTokens = None,
    sample_size: SampleSize = "8GB",
    seed: Seed = None,
    batch_size: Batch = 4,
    mask_special: MaskSpecial = False,
    stream: Stream = False,
    states: States = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration folder to use or to make. [dim]default: OUT.calibration[/dim]", rich_help_panel=READS
        ),
    ] = None,
    propagate: Propagate = "original",
    format: Format = "auto",
    overwrite: Overwrite = False,
    converter: Converter = None,
    quantizer: Quantizer = None,
    dry_run: DryRun = False,
    device: Device = None,
    batch_memory: BatchMemory = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Calibrate, plan and apply in one go, then open the result and run it once.

    [dim]moetailor compress MODEL -o OUT --data calibration.jsonl --method mone --remove 25%[/dim]
    """
    import moetailor
    from moetailor import ranks
    from moetailor.methods.allocation import read_allocation
    from moetailor.pipeline import calibration_folder

    parameters, format = read_parameters(param, method.lower() if uniform_layers else None), read_format(format, native)
    method, parameters = read_menu(method, native, parameters)
    budget = read_budget(method, remove, keep, size, memory, load_dtype)
    selected, kept, allocated = read_numbers(layers), read_pairs(protect), read_allocation(allocation)
    parameters, width = read_bits(bits, method, parameters)
    blocks = {"sequences": sequences, "length": length, "seed": seed, "batch_size": batch_size}
    text = moetailor.TextOptions(data=tuple(data), mask_special=mask_special, text_column=text_column, **blocks)
    sample = read_sample(sample_tokens, sample_size, seed)
    given: dict[str, Any] = {"method": method, "budget": budget, "parameters": parameters, "layers": selected}
    given |= {"protect": kept, "allocation": allocated, "width": width, "calibration": calibration, "text": text}
    given |= {"format": format, "overwrite": overwrite}
    if dry_run:
        dry.refuse_converter(converter)
        run = {"sample": sample, "stream": stream, "states": states, "dtype": dtype, "propagate": propagate}
        dry.compress(model, out, given, run, device=device, trust_remote_code=trust_remote_code)
        return
    given |= {"converter": converter, "quantizer": quantizer}
    checked = moetailor.precheck(model, out, trust_remote_code=trust_remote_code, **given)
    # Texts are held against each other when they are read.
    about = {name: value for name, value in given.items() if name not in ("calibration", "text")}
    about |= {"propagate": propagate, "guard": guard_super_experts}
    with ranks.shared(folder=os.path.realpath(out), **about) as first, waiting.stages() as progress:
        if first:
            output.say(checked)
        measured, plan = moetailor.compress(
            model,
            out,
            **given,
            guard_super_experts=guard_super_experts,
            sample=sample,
            stream=stream,
            states=states,
            propagate=propagate,
            device=device,
            batch_memory=read_nbytes(batch_memory),
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress if first else None,
        )
    if not first:
        return
    output.calibration(measured)
    output.plan(plan)
    output.say(VERIFIED)
    _written(out)
    output.took(out, *([] if calibration else [calibration_folder(out)]))


def _written(out: Path) -> None:
    """Say how large a result is, and what is left to be done with it."""
    import moetailor
    from moetailor.checkpoint.place import PLAN_FILE, PROVENANCE_FILE
    from moetailor.transform.formats.gguf import commands
    from moetailor.words import nbytes

    told = json.loads((out / PROVENANCE_FILE).read_text())
    original = moetailor.Plan.load(out / PLAN_FILE).model.nbytes
    output.say(f"{out}: {nbytes(told['bytes']['compressed'])}, the original has {nbytes(original)}")
    if told["format"] == "gguf" and (steps := commands(out)):
        output.say("\n".join(["now, with llama.cpp's own tools:", *steps]), copied=True)
