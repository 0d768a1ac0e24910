"""What verbs of several stages will take: compress and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moetailor.calibration.folder import Calibration
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.statistics import ON_REQUEST
from moetailor.calibration.text import TextOptions, length_of
from moetailor.checkpoint.models import longest_sequence, resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.comparison.cells import Cell, estimated
from moetailor.comparison.streamed import STATES
from moetailor.errors import PlanError
from moetailor.estimates.compiling import kinds_of, of_loops
from moetailor.estimates.deciding import Sampled, building, of_apply, of_plan
from moetailor.estimates.estimate import Estimate, Host, in_turn, nothing
from moetailor.estimates.running import Run, judging, of_calibration, run_of
from moetailor.methods.estimate import estimate_plan
from moetailor.methods.method import Method
from moetailor.methods.run import check_recorded, to_record
from moetailor.pipeline import form_of
from moetailor.planning.plan import Plan
from moetailor.planning.work import Work
from moetailor.transform.formats import resolve_format


def of_compression(
    host: Host,
    original: Original,
    method: Method,
    given: Mapping[str, Any],
    *,
    calibration: Calibration | None,
    sample: SampleOptions,
    propagate: str = "original",
    **run: Any,
) -> list[Estimate]:
    """Return what each stage of `compress` will take.

    Args:
        host: the machine.
        original: the original.
        method: the method with its parameters.
        given: budget, text, format and the other options, as `precheck` takes them.
        calibration: a finished calibration that is used; None where one is to be made.
        sample: which tokens are kept whole.
        propagate: what stand-ins are fitted on.
        **run: how the model runs, see `of_calibration`.
    """
    about = {name: given[name] for name in ("layers", "protect", "allocation", "width")}
    plan, parts = estimate_plan(original.facts, method, given["budget"], **about), []
    asked = to_record(method, given["allocation"])
    if calibration is None or (asked["sensitivity"] and not calibration.holds("sensitivity")):
        asked |= {"finished": calibration is not None}
        parts.append(of_calibration(host, original, text=given["text"], sample=sample, **asked, **run))
    itemsize = resolve_dtype(run.get("dtype"), host.device, original.checkpoint).itemsize
    sampled = _sampled(original, itemsize, calibration, given["text"], sample)
    parts.append(of_plan(host, original.facts, method, plan, sampled, original=original))
    form = form_of(plan, given["format"], given["allocation"], original)
    carried = form.carried(plan)
    parts.append(of_apply(host, carried, original, form, sampled, compressed=propagate == "compressed"))
    return parts


def of_comparison(
    host: Host,
    original: Original,
    cells: Sequence[Cell],
    *,
    held_out: TextOptions,
    text: TextOptions | None,
    calibration: Calibration | None,
    sample: SampleOptions,
    stream: bool = False,
    dtype: str | None = None,
) -> Estimate:
    """Return what `compare` will take on a machine for some methods at some sizes; see there for the rest."""
    run, parts = run_of(original, held_out, stream=stream, device=host.device, dtype=dtype), []
    if calibration is None:
        assert text is not None
        needs = {name for cell in cells for name in cell.method.needs}
        asked: dict[str, Any] = {option: name in needs for name, option in ON_REQUEST.items()}
        asked |= {"sensitivity": True, "stream": stream}
        parts.append(of_calibration(host, original, text=text, sample=sample, **asked, dtype=dtype))
    if cells:
        parts.append(_recorded(host, run))
    sampled, measured = _sampled(original, run.width, calibration, text or held_out, sample), set()
    refused: list[str] = []
    for cell in cells:
        try:
            if calibration is not None:
                check_recorded(calibration, cell.method)
            plan = estimated(cell, original.facts)
        except PlanError as error:  # which loses that row alone
            refused.append(f"{cell.name} ({cell.budget}): {error}")
            continue
        part = of_plan(host, original.facts, cell.method, plan, sampled, original=original)
        if cell.method.label in measured and part.seconds is not None:
            part = replace(part, seconds=host.startup)  # what was measured for another size is kept
        measured.add(cell.method.label)
        rest = (_streamed if stream else _in_memory)(host, original, run, cell, plan, sampled)
        parts.append(in_turn(cell.name, [part, *rest], host.startup))
    found = in_turn("compare", parts or [nothing("compare", host)], host.startup)
    return replace(found, notes=(*found.notes, *refused))


def _recorded(host: Host, run: Run) -> Estimate:
    """Return what the original takes that is run once over the text."""
    work = run.loading + run.batches * run.cost.forward(run.batch, run.length)
    return Estimate(
        verb="original",
        seconds=host.seconds(work, moved=run.cost.nbytes + _moved(run)),
        **host.memory(run.memory(0), run.cost.nbytes),
        reads=run.cost.nbytes,
        writes=0,
        meanwhile=run.states * (STATES if run.stream else 1),
    )


def _moved(run: Run) -> int:
    """Return the bytes of hidden states that are written and read while a model runs."""
    return run.states * (1 + 2 * run.stream * len(run.cost.layers))


def _in_memory(host: Host, original: Original, run: Run, cell: Cell, plan: Plan, sampled: Sampled) -> list[Estimate]:
    """Return what a plan takes that is applied to a copy of the original and measured."""
    work = _cell(original, cell, plan, sampled)
    loops = of_loops(host.device, kinds_of(plan))
    # The original lies there, and a copy of its experts that changes.
    copied = sum(layer.routed_all for layer in run.cost.layers) * run.width + loops.nbytes
    return [
        Estimate(
            verb=cell.name,
            seconds=None if work is None else host.seconds(work + loops + judging(run, models=1, speed=True)),
            why=f"nobody has counted what {cell.method.name} computes" if work is None else "",
            **host.memory(run.memory(copied + run.predictions), run.cost.nbytes),
            reads=0,
            writes=0,
            meanwhile=run.states,
        )
    ]


def _streamed(host: Host, original: Original, run: Run, cell: Cell, plan: Plan, sampled: Sampled) -> list[Estimate]:
    """Return what a plan takes that is written, run from disk beside the original's head, and deleted."""
    written = of_apply(host, plan, original, resolve_format(plan, "auto", original), sampled, verify=False)
    nbytes = written.writes
    judged = Estimate(
        verb=cell.name,
        seconds=host.seconds(run.loading + judging(run, models=1, speed=False), moved=nbytes + _moved(run)),
        **host.memory(run.memory(run.cost.outside * run.width + run.predictions), run.cost.nbytes),
        reads=nbytes,
        writes=0,
    )
    # Most lies there while the result is written: it stays until it was run, what was computed for it does not.
    return [replace(written, writes=0, meanwhile=nbytes + written.meanwhile + STATES * run.states), judged]


def _sampled(
    original: Original, itemsize: int, calibration: Calibration | None, text: TextOptions, sample: SampleOptions
) -> Sampled:
    """Return the tokens of which each layer's inputs are, or will be, kept."""
    if calibration is None:
        assert text.sequences is not None  # as in `run_of`
        length = length_of(text.length, longest_sequence(original.plain_config))
        return Sampled(tokens=min(sample.of_model(original.facts, itemsize), text.sequences * length))
    return Sampled.of(calibration)


def _cell(original: Original, cell: Cell, plan: Plan, sampled: Sampled) -> Work | None:
    """Return the work of a plan's new tensors; None where nobody has counted it."""
    total = Work()
    for stack in original.facts.stacks:
        layer = plan.layers.get(stack.prefix)
        if layer is not None and stack.shape is not None and layer.computed:
            work = building(cell.method, sampled.size(stack, original.facts), layer)
            if work is None:
                return None
            total += work
    return total
