"""All stages in one go, and what can be refused before any data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moetailor.calibration.calibrate import States, calibrate
from moetailor.calibration.folder import Calibration
from moetailor.calibration.run import SampleOptions
from moetailor.calibration.statistics import ON_REQUEST
from moetailor.calibration.text import TextOptions, files_of
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.facts import facts_of_checkpoint
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.loader import StreamedModel, load_config
from moetailor.checkpoint.place import check_place, holding
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import PlanError
from moetailor.methods.allocation import Allocation
from moetailor.methods.estimate import estimate_plan, pairs_of
from moetailor.methods.registry import find_method
from moetailor.methods.run import make_plan
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan
from moetailor.progress import Stages, part
from moetailor.transform.apply import apply
from moetailor.transform.build import Propagate
from moetailor.transform.formats import resolve_format


def precheck(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    budget: Budget,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    allocation: Allocation = "uniform",
    calibration: str | Path | None = None,
    text: TextOptions | None = None,
    format: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Refuse what cannot work, and say in one line what would be done.

    Args:
        model: folder or hub name of the original.
        out: folder of the result.
        method: name of the method.
        budget: how much stays.
        parameters: the method's parameters.
        layers: decoder layers to change.
        protect: (layer, expert) pairs that must stay.
        allocation: how many experts each layer keeps, see `make_plan`.
        calibration: calibration folder to use or to make, when it is named.
        text: calibration text; its files must stay, they are not read here.
        format: format of the result.
        overwrite: an earlier result is replaced.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        MoetailorError: whatever would be refused later, as far as it shows without data.
    """
    chosen = find_method(method).of(parameters or {})
    checkpoint = open_checkpoint(model)
    inputs = {"the original": checkpoint.folder, "the calibration": Path(calibration) if calibration else None}
    check_place(Path(out), overwrite=overwrite, inputs=inputs | {"the text": files_of(text.data) if text else None})
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    skeleton = StreamedModel(checkpoint, config, dtype=torch.float32)
    anatomy = discover(config, skeleton.model, trust_remote_code=trust_remote_code)
    facts = facts_of_checkpoint(checkpoint, anatomy, skeleton.names)
    plan = estimate_plan(facts, chosen, budget, layers=layers, protect=protect, allocation=allocation)
    ruled = allocation in ("error", "global")
    if ruled and format == "native":
        raise PlanError(f"--allocation {allocation}: layers keep different numbers of experts; use --format moetailor")
    written = "moetailor" if ruled else resolve_format(plan, format).name
    kept = sorted({len(layer.pool) for layer in plan.layers.values()}) or ["all"]
    return (
        f"{anatomy.model_type}: {len(anatomy.layers)} MoE layers, top-{anatomy.top_k}; {chosen.name} keeps "
        f"{', '.join(map(str, kept))} experts {'on average ' if ruled else ''}"
        f"in {len(plan.layers)} of them: {plan.nbytes:,} of {facts.nbytes:,} bytes, format {written}"
    )


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
    calibration: str | Path | None = None,
    sample: SampleOptions = SampleOptions(),  # noqa: B008 (frozen)
    stream: bool = False,
    states: States = "auto",
    propagate: Propagate = "original",
    format: str = "auto",
    overwrite: bool = False,
    device: str | None = None,
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
        calibration: calibration folder to use or to make; ``OUT.calibration`` when None.
        sample: which tokens are kept whole.
        stream: hold one decoder layer in memory at a time.
        states: where hidden states wait between layers.
        propagate: what stand-ins and merged experts are fitted on, see `apply_to_checkpoint`.
        format: format of the result.
        overwrite: replace an earlier result, at the end.
        device: where the model runs.
        dtype: dtype of the run.
        device_map: as transformers takes it.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (stage, done, in all).

    Raises:
        MoetailorError: see `precheck`, `calibrate`, `make_plan` and `apply`.
    """
    given: dict[str, Any] = {"parameters": parameters, "allocation": allocation, "protect": pairs_of(protect)}
    given |= {"layers": None if layers is None else list(layers)}
    written: dict[str, Any] = {"format": format, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    precheck(model, out, method=method, budget=budget, calibration=calibration, text=text, **given, **written)
    folder = Path(calibration) if calibration is not None else Path(out).with_name(Path(out).name + ".calibration")
    needs = find_method(method).needs | ({"effect"} if allocation == "error" else set())
    with holding(Path(out)):
        measured = calibrate(
            model,
            folder,
            text=text,
            sample=sample,
            **{option: name in needs for name, option in ON_REQUEST.items()},
            stream=stream,
            states=states,
            device=device,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=part(progress, "calibrate"),
        )
        weights = ExpertWeights(model, trust_remote_code=trust_remote_code)
        plan = make_plan(
            measured,
            method,
            budget,
            guard_super_experts=guard_super_experts,
            weights=weights,
            progress=part(progress, "plan"),
            **given,
        )
        fitted: dict[str, Any] = {"calibration": measured, "propagate": propagate, "device": device}
        apply(plan, model, out, verify=True, progress=progress, **fitted, **written)
    return measured, plan
