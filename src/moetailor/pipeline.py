"""All stages in one go, and what can be refused before any data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moetailor import ranks
from moetailor.answers import Width
from moetailor.calibration.calibrate import States, calibrate
from moetailor.calibration.folder import MANIFEST, Calibration
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.text import TextOptions, files_of
from moetailor.checkpoint.devices import give_back
from moetailor.checkpoint.original import Original, open_original
from moetailor.checkpoint.place import check_place, holding
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import PlanError
from moetailor.methods.allocation import DECIDED_LATER, Allocation
from moetailor.methods.estimate import estimate_plan, pairs_of
from moetailor.methods.registry import find_method
from moetailor.methods.run import check_same, make_plan, to_record
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan
from moetailor.progress import Stages, part
from moetailor.transform.apply import apply
from moetailor.transform.build import Propagate
from moetailor.transform.formats import find_format, resolve_format
from moetailor.transform.formats.format import Finish, Format


def precheck(
    model: str | Path | Original,
    out: str | Path,
    *,
    method: str,
    budget: Budget,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    allocation: Allocation = "uniform",
    width: Width | None = None,
    calibration: str | Path | None = None,
    text: TextOptions | None = None,
    format: str = "auto",
    overwrite: bool = False,
    converter: Path | None = None,
    quantizer: Path | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Refuse what cannot work, and say in one line what would be done.

    Args:
        model: folder or hub name of the original, or the original opened.
        out: folder of the result.
        method: name of the method.
        budget: how much stays.
        parameters: the method's parameters.
        layers: decoder layers to change.
        protect: (layer, expert) pairs that must stay.
        allocation: how many experts each layer keeps, see `make_plan`.
        width: how all that stays of experts lies, see `make_plan`.
        calibration: calibration folder to use or to make, when it is named.
        text: calibration text; its files must stay, they are not read here.
        format: format of the result.
        overwrite: an earlier result is replaced.
        converter: llama.cpp's ``convert_hf_to_gguf.py``, for format gguf.
        quantizer: llama.cpp's ``llama-quantize``, the same.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        MoetailorError: whatever would be refused later, as far as it shows without data.
    """
    chosen = find_method(method).of(parameters or {})
    original = open_original(model, trust_remote_code=trust_remote_code)
    inputs = {"the original": original.folder, "the calibration": Path(calibration) if calibration else None}
    check_place(Path(out), overwrite=overwrite, inputs=inputs | {"the text": files_of(text.data) if text else None})
    anatomy, facts = original.anatomy, original.facts
    plan = estimate_plan(facts, chosen, budget, layers=layers, protect=protect, allocation=allocation, width=width)
    form, ruled = form_of(plan, format, allocation, original), allocation in DECIDED_LATER
    form.check(plan, original)
    form.check_tools(Finish(plan=plan, original=original, converter=converter, quantizer=quantizer))
    kept = sorted({len(layer.pool) for layer in plan.layers.values()}) or ["all"]
    return (
        f"{anatomy.model_type}: {len(anatomy.layers)} MoE layers, top-{anatomy.top_k}; {chosen.name} keeps "
        f"{', '.join(map(str, kept))} experts {'on average ' if ruled else ''}"
        f"in {len(plan.layers)} of them: {plan.nbytes:,} of {facts.nbytes:,} bytes, format {form.name}"
    )


def form_of(plan: Plan, wanted: str, allocation: Allocation, original: Original | None = None) -> Format:
    """Return the form that a result will be written in, as far as it shows without data.

    Args:
        plan: what `estimate_plan` gave.
        wanted: name of a form, or ``auto``.
        allocation: how many experts each layer keeps.
        original: see `resolve_format`.

    Raises:
        PlanError: the form that is asked for cannot hold it.
    """
    if allocation not in DECIDED_LATER:
        return resolve_format(plan, wanted, original)
    form = find_format("moetailor") if wanted == "auto" else resolve_format(plan, wanted, original)
    if form.one_count and any(len(layer.kept_slots) < len(layer.slots) for layer in plan.layers.values()):
        raise PlanError(f"--allocation {allocation}: layers keep different numbers of experts; use --format moetailor")
    return form


def calibration_folder(out: str | Path) -> Path:
    """Return the folder of the calibration that `compress` makes or uses for a result where none is named."""
    return Path(out).with_name(Path(out).name + ".calibration")


def finished_calibration(original: Original, folder: Path) -> Calibration | None:
    """Return the calibration that a run on an original will find finished in a folder, if it will.

    Raises:
        CalibrationError: see `Calibration.open`.
        PlanError: it is of another model.
    """
    if not (folder / MANIFEST).exists():
        return None
    found = Calibration.open(folder)
    check_same(original, found.model)
    return found


def compress(
    model: str | Path,
    out: str | Path,
    *,
    text: TextOptions,
    method: str,
    budget: Budget,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    guard_super_experts: bool = False,
    allocation: Allocation = "uniform",
    width: Width | None = None,
    calibration: str | Path | None = None,
    sample: SampleOptions = SampleOptions(),  # noqa: B008 (frozen)
    stream: bool = False,
    states: States = "auto",
    propagate: Propagate = "original",
    format: str = "auto",
    overwrite: bool = False,
    converter: Path | None = None,
    quantizer: Path | None = None,
    device: str | None = None,
    batch_memory: int | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    progress: Stages | None = None,
) -> tuple[Calibration, Plan]:
    """Calibrate, plan and apply, then open the result and run it once.

    Args:
        model: folder or hub name of the original.
        out: folder of the result.
        text: calibration text.
        method: name of the method.
        budget: how much stays.
        parameters: the method's parameters.
        layers: decoder layers to change.
        protect: (layer, expert) pairs that must stay.
        guard_super_experts: protect experts with extreme outputs.
        allocation: how many experts each layer keeps, see `make_plan`.
        width: how all that stays of experts lies, see `make_plan`.
        calibration: calibration folder to use or to make; ``OUT.calibration`` when None.
        sample: which tokens are kept whole.
        stream: hold one decoder layer in memory at a time.
        states: where hidden states wait between layers.
        propagate: what stand-ins and merged experts are fitted on, see `apply_to_checkpoint`.
        format: format of the result.
        overwrite: replace an earlier result, at the end.
        converter: llama.cpp's ``convert_hf_to_gguf.py``, for format gguf, see `apply_to_checkpoint`.
        quantizer: llama.cpp's ``llama-quantize``, the same.
        device: where the model runs.
        batch_memory: bytes that experts computed together may take; what the device is good for when None.
        dtype: dtype of the run.
        device_map: as transformers takes it.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (stage, done, in all).

    Raises:
        MoetailorError: see `precheck`, `calibrate`, `make_plan` and `apply`.
    """
    original = Original(model, trust_remote_code=trust_remote_code)
    given: dict[str, Any] = {"parameters": parameters, "allocation": allocation, "protect": pairs_of(protect)}
    given |= {"layers": None if layers is None else list(layers), "width": width}
    written: dict[str, Any] = {"format": format, "overwrite": overwrite}
    written |= {"converter": converter, "quantizer": quantizer}
    precheck(original, out, method=method, budget=budget, calibration=calibration, text=text, **given, **written)
    folder = calibration_folder(out) if calibration is None else Path(calibration)
    with ranks.held(holding(Path(out))):
        measured = calibrate(
            original,
            folder,
            text=text,
            sample=sample,
            **to_record(find_method(method).of(parameters or {}), allocation),
            stream=stream,
            states=states,
            device=device,
            dtype=dtype,
            device_map=device_map,
            progress=progress,
        )
        give_back()
        plan = make_plan(
            measured,
            method,
            budget,
            guard_super_experts=guard_super_experts,
            weights=ExpertWeights(original, device=device, batch_memory=batch_memory),
            progress=part(progress, "plan"),
            **given,
        )
        give_back()
        fitted: dict[str, Any] = {"calibration": measured, "propagate": propagate, "device": device}
        fitted["batch_memory"] = batch_memory
        apply(plan, original, out, progress=progress, **fitted, **written)
    return measured, plan
