"""The calibrate stage: a model and text in, a calibration folder out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from moetailor.calibration.batch import Batch
from moetailor.calibration.effect import measure_effects
from moetailor.calibration.folder import STATES, Calibration
from moetailor.calibration.layers import PartlyLoaded, ResidentModel
from moetailor.calibration.run import SampleOptions, Subject, run_calibration, tokenizer_fingerprint
from moetailor.calibration.text import TextOptions, read_batches
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.facts import facts_of_checkpoint, facts_of_model
from moetailor.checkpoint.files import Checkpoint, open_checkpoint
from moetailor.checkpoint.loader import StreamedModel, load_config
from moetailor.checkpoint.lock import growing
from moetailor.checkpoint.models import load_model, load_tokenizer, longest_sequence, resolve_device, resolve_dtype
from moetailor.errors import CalibrationError, did_you_mean
from moetailor.progress import Progress

States = Literal["auto", "memory", "disk"]


def calibrate(
    model: str | Path | nn.Module,
    out: str | Path,
    *,
    text: TextOptions | Iterable[Batch],
    tokenizer: Any = None,
    sample: SampleOptions = SampleOptions(),  # noqa: B008 (frozen)
    residual: bool = False,
    effect: bool = False,
    stream: bool = False,
    states: States = "auto",
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Measure what each routed expert does on text.

    Args:
        model: checkpoint folder, hub name, or a transformers model in memory.
        out: calibration folder; the same call resumes a run that was stopped.
        text: what to read, or batches that the caller made.
        tokenizer: for text, when the model is given in memory.
        sample: which tokens are kept whole.
        residual: also measure how far the routed experts turn the residual stream, which easy_ep reads; it runs all
            but the routed experts once more.
        effect: also measure what errors of each layer do to the predictions, by which `auto` weighs layers; about half
            as many runs of a few thousand tokens as there are layers.
        stream: keep one decoder layer in memory at a time, for checkpoints larger than memory.
        states: where hidden states wait between layers; ``auto`` is the disk when streaming, else memory.
        device: where the model runs; CUDA when there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's on CUDA, else float32.
        device_map: as transformers takes it, for a model spread over several devices.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (batches done, batches in all).

    Raises:
        CheckpointError: the model cannot be used.
        CalibrationError: the text or the folder cannot be used, or values are not finite.
    """
    if states not in get_args(States):
        raise CalibrationError(f"states {states!r}" + did_you_mean(states, get_args(States)))
    if isinstance(model, nn.Module):
        subject, config, folder = _resident(model), model.config, None
    else:
        checkpoint = open_checkpoint(model)
        config, folder = load_config(checkpoint, trust_remote_code=trust_remote_code), checkpoint.folder
        subject = _on_disk(checkpoint, config, stream, resolve_device(device), dtype, device_map, trust_remote_code)
    if isinstance(text, TextOptions):
        if tokenizer is None:
            if folder is None:
                raise CalibrationError("a model in memory needs its tokenizer to read text; pass tokenizer=")
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        batches = read_batches(
            text, tokenizer, max_length=longest_sequence(config), words=getattr(config, "vocab_size", None)
        )
        read = {"tokenizer": tokenizer_fingerprint(tokenizer), "options": asdict(text)}
        subject = replace(subject, settings=subject.settings | read)
    else:
        batches = list(text)
    on_disk = states == "disk" or (states == "auto" and stream)
    made = run_calibration(
        subject,
        batches,
        Path(out),
        sample=sample,
        residual=residual,
        states_on_disk=on_disk,
        progress=progress,
    )
    if effect and made.effects() is None:
        with growing(made.folder) as work:
            waiting = work / STATES if on_disk else None
            made = measure_effects(made, subject.open(), subject.anatomy, states=waiting, progress=progress)
    return made


def _resident(model: Any) -> Subject:
    anatomy = discover(model.config, model)
    facts = facts_of_model(model, anatomy)
    return Subject(
        anatomy=anatomy, facts=facts, settings={"dtype": str(model.dtype)}, open=lambda: ResidentModel(model)
    )


def _on_disk(
    checkpoint: Checkpoint,
    config: Any,
    stream: bool,
    device: str,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
) -> Subject:
    torch_dtype = resolve_dtype(dtype, device, checkpoint)
    streamed = StreamedModel(checkpoint, config, dtype=torch_dtype, device=device)
    anatomy = discover(config, streamed.model, trust_remote_code=trust_remote_code)

    def load() -> PartlyLoaded:
        if stream:
            return streamed
        options = {"device": device, "device_map": device_map, "trust_remote_code": trust_remote_code}
        return ResidentModel(load_model(checkpoint.folder, dtype=torch_dtype, **options))

    facts = facts_of_checkpoint(checkpoint, anatomy, streamed.names)
    return Subject(anatomy=anatomy, facts=facts, settings={"dtype": str(torch_dtype)}, open=load)
