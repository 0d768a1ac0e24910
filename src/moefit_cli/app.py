"""One function for each verb: it parses, calls and prints."""

from __future__ import annotations

import json as json_module
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from moefit_cli import output
from moefit_cli import redundancy as redundancy_module
from moefit_cli import show as show_module
from moefit_cli.compare import compare
from moefit_cli.options import (
    Allocation,
    Batch,
    Data,
    Device,
    DeviceMap,
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
    Remove,
    SampleTokens,
    Seed,
    Sequences,
    Size,
    States,
    Stream,
    Trust,
    check_file,
)
from moefit_cli.recover import recover
from moefit_cli.report import report

app = typer.Typer(
    name="moefit",
    help="Make Mixture-of-Experts language models fit: one calibration, any method, any budget.",
    epilog="Start with: moefit compress MODEL -o OUT --data FILE --method mone --remove 25%",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def inspect(
    model: Model,
    calibration: Annotated[
        Path | None, typer.Option(help="Its calibration folder: also say how redundant the experts are.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show layers, experts, top-k, parameters and bytes of a checkpoint, and what of it is redundant.

    [dim]moefit inspect allenai/OLMoE-1B-7B-0125 --calibration calib[/dim]
    """
    from moefit.summary import summarise

    summary = summarise(model, trust_remote_code=trust_remote_code)
    redundancy = None if calibration is None else _redundancy(model, calibration, trust_remote_code)
    if json:
        found = {} if redundancy is None else {"redundancy": redundancy.to_json()}
        print(json_module.dumps(summary.to_json() | found, indent=2))
        return
    output.summary(summary)
    if redundancy is not None:
        redundancy_module.show(redundancy)


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Calibration folder.")],
    data: Data,
    sequences: Sequences = 128,
    length: Length = 2048,
    sample_tokens: SampleTokens = 16384,
    seed: Seed = None,
    batch_size: Batch = 4,
    mask_special: MaskSpecial = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Also measure how far the experts turn the residual stream: easy_ep.")
    ] = False,
    effect: Annotated[
        bool, typer.Option("--effect", help="Also measure what errors of each layer do to the predictions: auto.")
    ] = False,
    stream: Stream = False,
    states: States = "auto",
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure on text what each expert does; every plan is made from that. A stopped run resumes.

    [dim]moefit calibrate MODEL -o calib --data calibration.jsonl --sequences 128 --length 2048[/dim]
    """
    import moefit

    with output.progress("calibrate") as progress:
        calibration = moefit.calibrate(
            model,
            out,
            text=moefit.TextOptions(
                data=tuple(data),
                sequences=sequences,
                length=length,
                seed=seed,
                mask_special=mask_special,
                batch_size=batch_size,
            ),
            sample=moefit.SampleOptions(tokens=sample_tokens, seed=seed or 0),
            residual=residual,
            effect=effect,
            stream=stream,
            states=states,
            device=device,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    output.calibration(calibration, sequences * length)


@app.command()
def plan(
    calibration: Annotated[Path, typer.Argument(metavar="CALIB", help="Calibration folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the plan goes (JSON).")],
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
    model: Annotated[str | None, typer.Option(help="Where the weights are, if the checkpoint was moved.")] = None,
) -> None:
    """Decide what stands behind every slot. Exactly one of --remove, --keep and --size.

    [dim]moefit plan calib -o plan.json --method mone --remove 25% -p score=exact -p novice=optimal[/dim]
    """
    import moefit
    from moefit.methods.allocation import read_allocation

    method = _menu(method, native)
    budget, parameters = _budget(method, remove, keep, size, memory, load_dtype), _parameters(param)
    selected, kept, spread = _numbers(layers), _pairs(protect), read_allocation(allocation)
    check_file(out)
    with output.progress("plan") as progress:
        made = moefit.make_plan(
            moefit.Calibration.open(calibration),
            method,
            budget,
            parameters=parameters,
            layers=selected,
            protect=kept,
            guard_super_experts=guard_super_experts,
            allocation=spread,
            weights=None if model is None else moefit.ExpertWeights(model),
            progress=progress,
        )
    made.save(out)
    output.plan(made)
    output.say(f"the plan is in {out}")


@app.command()
def allocate(
    calibration: Annotated[Path, typer.Argument(metavar="CALIB", help="Calibration folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the counts go (JSON), for --allocation.")],
    method: Method,
    remove: Remove = None,
    keep: Keep = None,
    size: Size = None,
    memory: Memory = None,
    load_dtype: LoadDtype = None,
    param: Parameter = None,
    layers: Layers = None,
    protect: Protect = None,
    population: Annotated[int, typer.Option(min=2, help="Candidates of a generation.")] = 32,
    generations: Annotated[int, typer.Option(min=1, help="Generations.")] = 50,
    survivors: Annotated[int, typer.Option(min=1, help="Candidates that the next generation comes from.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of the calibration's text to run.")] = 64,
    seed: Annotated[int, typer.Option(help="Another seed searches elsewhere.")] = 0,
    model: Annotated[str | None, typer.Option(help="Where the weights are, if the checkpoint was moved.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Search by evolution for how many experts each layer keeps; slow: it runs the model. A stopped search resumes.

    [dim]moefit allocate calib -o alloc.json --method reap --remove 25%[/dim]
    """
    import moefit

    budget, parameters = _budget(method, remove, keep, size, memory, load_dtype), _parameters(param)
    selected, kept = _numbers(layers), _pairs(protect)
    check_file(out)
    with output.progress("allocate") as progress:
        found = moefit.allocate(
            moefit.Calibration.open(calibration),
            method,
            budget,
            out,
            parameters=parameters,
            layers=selected,
            protect=kept,
            options=moefit.SearchOptions(
                population=population, generations=generations, survivors=survivors, samples=samples, seed=seed
            ),
            model=model,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    counts = ", ".join(f"{layer}: {count}" for layer, count in found.counts.items())
    output.say(f"experts kept by layer: {counts}")
    output.say(f"overlap with the original's predictions: {found.overlap:.4f}, with uniform counts {found.uniform:.4f}")
    output.say(f"the counts are in {out}; use them with --allocation {out}")


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    scores: Annotated[bool, typer.Option("--scores", help="Also print what the method ranked by.")] = False,
) -> None:
    """Show what a plan does with each slot; neither weights nor calibration are needed.

    [dim]moefit show plan.json[/dim]
    """
    show_module.show(str(plan), _plan(plan), scores=scores)


@app.command()
def diff(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    other: Annotated[Path, typer.Argument(metavar="PLAN", help="Another plan of the same model.")],
) -> None:
    """Show which slots two plans of one model treat differently.

    [dim]moefit diff plan.json other.json[/dim]
    """
    show_module.diff([str(plan), str(other)], [_plan(plan), _plan(other)])


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")],
    calibration: Annotated[
        Path | None, typer.Option(help="The plan's calibration folder, for plans with stand-ins or merged experts.")
    ] = None,
    propagate: Propagate = "original",
    format: Format = "auto",
    overwrite: Overwrite = False,
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Apply the plan to another model of the same shapes.")
    ] = False,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the checkpoint that a plan describes.

    [dim]moefit apply MODEL plan.json -o OUT --calibration calib[/dim]
    """
    import moefit

    loaded = moefit.Plan.load(plan)
    with output.stages() as progress:
        moefit.apply(
            loaded,
            model,
            out,
            calibration=None if calibration is None else moefit.Calibration.open(calibration),
            propagate=propagate,
            format=format,
            overwrite=overwrite,
            allow_other_weights=allow_other_weights,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    output.say(f"{out}: {output.nbytes(loaded.nbytes)}, the original has {output.nbytes(loaded.model.nbytes)}")


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")],
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
    sequences: Sequences = 128,
    length: Length = 2048,
    sample_tokens: SampleTokens = 16384,
    seed: Seed = None,
    batch_size: Batch = 4,
    mask_special: MaskSpecial = False,
    stream: Stream = False,
    states: States = "auto",
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration folder to use or to make. [dim]default: OUT.calibration[/dim]")
    ] = None,
    propagate: Propagate = "original",
    format: Format = "auto",
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything that needs no data, and stop.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Calibrate, plan and apply in one go, then open the result and run it once.

    [dim]moefit compress MODEL -o OUT --data calibration.jsonl --method mone --remove 25%[/dim]
    """
    import moefit
    from moefit.methods.allocation import read_allocation

    method = _menu(method, native)
    budget, parameters = _budget(method, remove, keep, size, memory, load_dtype), _parameters(param)
    selected, kept, spread = _numbers(layers), _pairs(protect), read_allocation(allocation)
    checked = moefit.precheck(
        model,
        out,
        method=method,
        budget=budget,
        parameters=parameters,
        layers=selected,
        protect=kept,
        allocation=spread,
        calibration=calibration,
        format=format,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    output.say(checked)
    if dry_run:
        return
    with output.stages() as progress:
        measured, plan = moefit.compress(
            model,
            out,
            text=moefit.TextOptions(
                data=tuple(data),
                sequences=sequences,
                length=length,
                seed=seed,
                mask_special=mask_special,
                batch_size=batch_size,
            ),
            method=method,
            budget=budget,
            parameters=parameters,
            layers=selected,
            protect=kept,
            guard_super_experts=guard_super_experts,
            allocation=spread,
            calibration=calibration,
            sample=moefit.SampleOptions(tokens=sample_tokens, seed=seed or 0),
            stream=stream,
            states=states,
            propagate=propagate,
            format=format,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    output.calibration(measured, sequences * length)
    output.plan(plan)
    output.say(f"{out}: {output.nbytes(plan.nbytes)}, the original has {output.nbytes(plan.model.nbytes)}")
    output.say("opened again and run once: names, shapes and bytes are as planned, all values finite")


@app.command()
def evaluate(
    compressed: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the compressed checkpoint.")],
    against: Annotated[str, typer.Option(help="The original: folder or hub name.")],
    data: Data,
    sequences: Sequences = 64,
    length: Length = 2048,
    batch_size: Batch = 1,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-evaluation-harness to run on both. Repeatable.")
    ] = None,
    task_dir: Annotated[Path, typer.Option(help="Folder of the tasks' YAML files.")] = Path("examples/tasks"),
    task_data: Annotated[Path | None, typer.Option(help="Folder of the files the tasks read.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the scores to this file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compare a compressed checkpoint with its original: perplexity, KL, agreement, speed, size, tasks.

    [dim]moefit evaluate OUT --against MODEL --data heldout.jsonl --json scores.json[/dim]
    """
    import moefit

    check_file(json)
    text = moefit.TextOptions(data=tuple(data), sequences=sequences, length=length, batch_size=batch_size)
    with output.stages() as progress:
        scores = moefit.evaluate(
            compressed,
            against,
            text=text,
            tasks=moefit.TaskOptions(tasks=tuple(tasks or ()), task_dir=task_dir, task_data=task_data, limit=limit),
            device=device,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    output.scores(scores)
    output.expected(compressed, scores)
    if json is not None:
        json.write_text(json_module.dumps(scores.to_json(), indent=2) + "\n")
        output.say(f"scores are in {json}")


app.command()(compare)
app.command()(recover)
app.command()(report)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"moefit {installed('moefit')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a refused input is one message and exit code 1."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            output.complain("stopped; run the same command again to go on")
        raise
    except OSError as error:
        output.complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(1)
    except Exception as error:
        # Only an error that moefit raised on purpose is a user's; its module is loaded by then.
        errors = sys.modules.get("moefit.errors")
        if errors is None or not isinstance(error, errors.MoefitError):
            raise
        output.complain(str(error))
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Print what moefit says to its user, and nothing of what libraries say to theirs."""
    if category.__name__ == "MoefitWarning":
        output.warn(str(message))


def _menu(method: str, native: bool) -> str:
    """Return the method that is meant."""
    if native and method != "auto":
        raise typer.BadParameter(f"--native: narrows what auto may choose; leave it out for {method}")
    return "refit" if native else method


def _budget(
    method: str, remove: str | None, keep: int | None, size: str | None, memory: str | None, load_dtype: str | None
) -> Any:
    """Read the flags; a method that is of use without removing experts may go without."""
    import moefit

    if remove is keep is size is memory is None and method in moefit.METHODS and moefit.METHODS[method].whole:
        remove = "0%"
    return moefit.Budget.parse(remove=remove, keep=keep, size=size, memory=memory, load_dtype=load_dtype)


def _redundancy(model: str, calibration: Path, trust_remote_code: bool) -> Any:
    """Measure the redundancy of the calibrated model."""
    import moefit

    weights = moefit.ExpertWeights(model, trust_remote_code=trust_remote_code)
    with output.progress("inspect") as progress:
        return moefit.find_redundancy(moefit.Calibration.open(calibration), weights=weights, progress=progress)


def _plan(file: Path) -> Any:
    """Read a plan that works for the model that it is for."""
    import moefit
    from moefit.planning.checks import check_plan

    plan = moefit.Plan.load(file)
    check_plan(plan, plan.model)
    return plan


def _parameters(entries: list[str] | None) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in entries or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(f"--param {name}{equals}{value}: write name=value")
    return {name: value for name, _, value in pairs}


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            span = range(int(low), int(high if dash else low) + 1)
            if not 0 < len(span) < 10_000:
                raise ValueError
            numbers += span
        except ValueError:
            raise typer.BadParameter(f"--layers {text}: write numbers and ranges such as 0-7,12") from None
    return numbers


def _pairs(entries: list[str] | None) -> list[tuple[int, int]]:
    try:
        return [(int(layer), int(expert)) for layer, expert in (entry.split(":") for entry in entries or ())]
    except ValueError:
        raise typer.BadParameter(f"--protect {' '.join(entries or ())}: write layer:expert, such as 3:17") from None
