"""The verbs that make and show plans: plan, allocate, show, diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moetailor_cli import dry, output, waiting
from moetailor_cli import show as show_module
from moetailor_cli.options import (
    DECIDES,
    READS,
    RUNS,
    WRITES,
    Allocation,
    BatchMemory,
    Bits,
    Device,
    DryRun,
    Dtype,
    Guard,
    Keep,
    Layers,
    LoadDtype,
    Memory,
    Method,
    Native,
    Parameter,
    Protect,
    Remove,
    Size,
    Trust,
    Uniform,
)
from moetailor_cli.reading import (
    read_bits,
    read_budget,
    read_menu,
    read_nbytes,
    read_numbers,
    read_pairs,
    read_parameters,
    read_plan,
)


def plan(
    calibration: Annotated[Path, typer.Argument(metavar="CALIB", help="Calibration folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the plan goes (JSON).", rich_help_panel=WRITES)],
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
    model: Annotated[
        str | None, typer.Option(help="Where the weights are, if the checkpoint was moved.", rich_help_panel=READS)
    ] = None,
    dry_run: DryRun = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; CUDA when there is one.", rich_help_panel=RUNS)
    ] = None,
    batch_memory: BatchMemory = None,
    trust_remote_code: Trust = False,
) -> None:
    """Decide what stands behind every slot. One of --remove, --keep, --size and --memory; `quantize` needs none.

    [dim]moetailor plan calib -o plan.json --method mone --remove 25% -p score=exact -p novice=optimal[/dim]
    """
    import moetailor
    from moetailor import ranks
    from moetailor.checkpoint.place import check_file
    from moetailor.methods.allocation import read_allocation
    from moetailor.methods.estimate import estimate_plan
    from moetailor.methods.registry import find_method
    from moetailor.pipeline import form_of
    from moetailor.planning.plan import calibration_hash
    from moetailor.transform.formats import resolve_format

    parameters = read_parameters(param, method.lower() if uniform_layers else None)
    method, parameters = read_menu(method, native, parameters)
    budget = read_budget(method, remove, keep, size, memory, load_dtype)
    selected, kept, allocated = read_numbers(layers), read_pairs(protect), read_allocation(allocation)
    (parameters, width), working = read_bits(bits, method, parameters), read_nbytes(batch_memory)
    measured = moetailor.Calibration.open(calibration)
    source = model or measured.model.source
    given = {"layers": selected, "protect": kept, "allocation": allocated, "width": width}
    if native:
        chosen = find_method(method).of(parameters)
        form_of(estimate_plan(measured.model, chosen, budget, **given), "native", allocated)
    if dry_run:
        check_file(out, "plan")
        dry.plan(measured, method, parameters, budget, given, source, device, trust_remote_code)
        return
    about = {"calibration": calibration_hash(measured.fingerprint), "method": method, "parameters": parameters}
    about |= {"budget": budget, "layers": selected, "protected experts": kept, "allocation": allocated, "width": width}
    about |= {"guard": guard_super_experts}
    with ranks.shared(**about) as first, waiting.progress("plan") as progress:
        if first:
            check_file(out, "plan")
        made = moetailor.make_plan(
            measured,
            method,
            budget,
            parameters=parameters,
            **given,
            guard_super_experts=guard_super_experts,
            weights=moetailor.ExpertWeights(
                source, trust_remote_code=trust_remote_code, device=device, batch_memory=working
            )
            if source
            else None,
            progress=progress if first else None,
        )
    if not first:
        return  # under torchrun the first process speaks for all
    if native:  # of which counts alone were known before
        resolve_format(made, "native")
    made.save(out)
    output.plan(made)
    output.took(out, calibration / "measured")


def allocate(
    calibration: Annotated[Path, typer.Argument(metavar="CALIB", help="Calibration folder.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the counts go (JSON), for --allocation.", rich_help_panel=WRITES)
    ],
    method: Method,
    remove: Remove = None,
    keep: Keep = None,
    size: Size = None,
    memory: Memory = None,
    load_dtype: LoadDtype = None,
    param: Parameter = None,
    layers: Layers = None,
    protect: Protect = None,
    population: Annotated[int, typer.Option(min=2, help="Candidates of a generation.", rich_help_panel=DECIDES)] = 32,
    generations: Annotated[int, typer.Option(min=1, help="Generations.", rich_help_panel=DECIDES)] = 50,
    survivors: Annotated[
        int, typer.Option(min=1, help="Candidates that the next generation comes from.", rich_help_panel=DECIDES)
    ] = 4,
    samples: Annotated[
        int, typer.Option(min=1, help="Sequences of the calibration's text to run.", rich_help_panel=DECIDES)
    ] = 64,
    seed: Annotated[int, typer.Option(help="Another seed searches elsewhere.", rich_help_panel=DECIDES)] = 0,
    model: Annotated[
        str | None, typer.Option(help="Where the weights are, if the checkpoint was moved.", rich_help_panel=READS)
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Search by evolution for how many experts each layer keeps; slow: it runs the model. A stopped search resumes.

    [dim]moetailor allocate calib -o alloc.json --method reap --remove 25%[/dim]
    """
    import moetailor

    budget, parameters = read_budget(method, remove, keep, size, memory, load_dtype), read_parameters(param)
    selected, kept = read_numbers(layers), read_pairs(protect)
    with waiting.progress("allocate") as progress:
        found = moetailor.allocate(
            moetailor.Calibration.open(calibration),
            method,
            budget,
            out,
            parameters=parameters,
            layers=selected,
            protect=kept,
            options=moetailor.SearchOptions(
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


def show(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    scores: Annotated[
        bool, typer.Option("--scores", help="Also print what the method ranked by.", rich_help_panel=WRITES)
    ] = False,
    ranking: Annotated[
        bool,
        typer.Option(
            "--ranking",
            help="Print only that, a line of JSON a layer, the first to go first: for engines that mask experts.",
            rich_help_panel=WRITES,
        ),
    ] = False,
) -> None:
    """Show what a plan does with each slot; neither weights nor calibration are needed.

    [dim]moetailor show plan.json[/dim]
    """
    if ranking:
        show_module.ranking(str(plan), read_plan(plan))
    else:
        show_module.show(str(plan), read_plan(plan), scores=scores)


def diff(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json")],
    other: Annotated[Path, typer.Argument(metavar="PLAN", help="Another plan of the same model.")],
) -> None:
    """Show which slots two plans of one model treat differently.

    [dim]moetailor diff plan.json other.json[/dim]
    """
    show_module.diff([str(plan), str(other)], [read_plan(plan), read_plan(other)])
