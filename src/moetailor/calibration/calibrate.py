"""The calibrate stage: a model and text in, a calibration folder out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from moetailor import ranks
from moetailor.calibration.batch import Batch
from moetailor.calibration.fingerprint import tokenizer_fingerprint
from moetailor.calibration.finite import stored_rows
from moetailor.calibration.folder import STATES, Calibration
from moetailor.calibration.layers import PartlyLoaded, ResidentModel
from moetailor.calibration.run import MeasuredModel, run_calibration
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.sensitivity import measure_sensitivities
from moetailor.calibration.text import TextOptions, length_of, read_batches
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.devices import resolve_device
from moetailor.checkpoint.facts import facts_of_model
from moetailor.checkpoint.lock import growing, sweep
from moetailor.checkpoint.models import longest_sequence, resolve_dtype
from moetailor.checkpoint.original import Original, open_original
from moetailor.errors import CalibrationError, did_you_mean
from moetailor.progress import Stages, part

States = Literal["auto", "memory", "disk"]


def calibrate(
    model: str | Path | Original | nn.Module,
    out: str | Path,
    *,
    text: TextOptions | Iterable[Batch],
    tokenizer: Any = None,
    sample: SampleOptions = SampleOptions(),  # noqa: B008 (frozen)
    residual: bool = False,
    sensitivity: bool = False,
    stream: bool = False,
    states: States = "auto",
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    progress: Stages | None = None,
) -> Calibration:
    """Measure what each routed expert does on text.

    Args:
        model: checkpoint folder, hub name, opened original, or a transformers model in memory.
        out: calibration folder; the same call resumes a run that was stopped.
        text: what to read, or batches that the caller made.
        tokenizer: for text, when the model is given in memory.
        sample: which tokens are kept whole.
        residual: also measure how far the routed experts turn the residual stream, which easy_ep reads; everything
            but the routed experts then runs twice.
        sensitivity: also measure what errors of each layer do to the predictions, by which `auto` weighs layers; about
            one and a half times as many runs of a few thousand tokens as there are layers.
        stream: keep one decoder layer in memory at a time, for checkpoints larger than memory.
        states: where hidden states wait between layers; ``auto`` is the disk when streaming, else memory.
        device: where the model runs; CUDA when there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's on CUDA, else float32.
        device_map: as transformers takes it, for a model spread over several devices.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (what is running, batches done, batches in all) over all layers: ``calibrate``, and then
            ``sensitivity`` where that is measured.

    Raises:
        CheckpointError: the model cannot be used.
        CalibrationError: the text or the folder cannot be used, or values are not finite.
    """
    if states not in get_args(States):
        raise CalibrationError(f"states {states!r}" + did_you_mean(states, get_args(States)))
    if isinstance(model, nn.Module):
        measured, config, original = _resident(model), model.config, None
    else:
        original = open_original(model, trust_remote_code=trust_remote_code)
        measured, config = _on_disk(original, stream, resolve_device(device), dtype, device_map), original.config
    if isinstance(text, TextOptions):
        if tokenizer is None:
            if original is None:
                raise CalibrationError("a model in memory needs its tokenizer to read text; pass tokenizer=")
            tokenizer = original.tokenizer()
        limit = longest_sequence(config)
        text = replace(text, length=length_of(text.length, limit))
        batches = read_batches(text, tokenizer, max_length=limit, vocab_size=getattr(config, "vocab_size", None))
        read = {"tokenizer": tokenizer_fingerprint(tokenizer), "options": _options(text)}
        measured = replace(measured, settings=measured.settings | read)
    else:
        batches = list(text)
        if not batches:
            raise CalibrationError("no batch of text given; give at least one")
    on_disk = states == "disk" or (states == "auto" and stream)
    itemsize = getattr(torch, measured.settings["dtype"].removeprefix("torch.")).itemsize
    sample = replace(sample, tokens=sample.of_model(measured.facts, itemsize))
    calibration = run_calibration(
        measured,
        batches,
        Path(out),
        sample=sample,
        residual=residual,
        states_on_disk=on_disk,
        progress=part(progress, "calibrate"),
    )
    if sensitivity and calibration.sensitivities() is None:
        with ranks.held(growing(calibration.folder)) as work:
            # Not where the calibration's own run keeps its states: that one resumes from what it finds.
            waiting = work / f"{STATES}-sensitivity" if on_disk else None
            told = part(progress, "sensitivity")
            calibration = measure_sensitivities(
                calibration, measured.open(), measured.anatomy, states=waiting, progress=told
            )
    ranks.once(lambda: sweep(calibration.folder))
    return calibration


def _options(text: TextOptions) -> dict[str, Any]:
    """Return the options of a text for the fingerprint; a column that nobody named is not said."""
    found = asdict(text)
    return {name: value for name, value in found.items() if name != "text_column" or value is not None}


def _resident(model: Any) -> MeasuredModel:
    anatomy = discover(model.config, model)
    facts = facts_of_model(model, anatomy)
    return MeasuredModel(
        anatomy=anatomy, facts=facts, settings={"dtype": str(model.dtype)}, open=lambda: ResidentModel(model)
    )


def _on_disk(original: Original, stream: bool, device: str, dtype: str | None, device_map: str | None) -> MeasuredModel:
    torch_dtype = resolve_dtype(dtype, device, original.checkpoint)

    def load() -> PartlyLoaded:
        if stream:
            return original.streamed(dtype=torch_dtype, device=device)
        return ResidentModel(original.load(dtype=torch_dtype, device=device, device_map=device_map))

    stored = stored_rows(original.checkpoint, original.skeleton.names, original.stacks)
    settings = {"dtype": str(torch_dtype)}
    return MeasuredModel(anatomy=original.anatomy, facts=original.facts, settings=settings, open=load, stored=stored)
