"""The compare stage: a checkpoint, calibration text and held-out text in, every method at every ratio out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from moetailor._version import __version__
from moetailor.calibration.batch import Batch, text_fingerprint
from moetailor.calibration.calibrate import calibrate
from moetailor.calibration.folder import Calibration
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.statistics import ON_REQUEST
from moetailor.calibration.text import TextOptions, read_batches, words_of
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.devices import resolve_device
from moetailor.checkpoint.files import Checkpoint
from moetailor.checkpoint.lock import growing
from moetailor.checkpoint.lock import scratch as scratch_folder
from moetailor.checkpoint.models import longest_sequence, resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.place import check_apart, check_empty
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.comparison.bench import Bench, forget
from moetailor.comparison.cells import Cell, cells_of
from moetailor.comparison.results import failed, layers_of, results_of, sensitivities_of
from moetailor.comparison.stored import VERSION, Notes, forget_plans_without_sensitivities, read_cell
from moetailor.comparison.streamed import StreamedBench, make_room
from moetailor.comparison.whole import WholeBench
from moetailor.errors import MoetailorError, MoetailorWarning
from moetailor.evaluation.evaluate import check_predicts
from moetailor.methods.run import check_weights
from moetailor.planning.plan import calibration_hash
from moetailor.progress import Stages, part, resumed
from moetailor.schema import load_json, read

RUN, RESULTS, REPORT = "comparison.json", "results.json", "report.html"
CELLS, CALIBRATION = "cells", "calibration"
DEFAULT = ("10%", "25%", "50%")


def compare(
    model: str | Path,
    out: str | Path,
    *,
    held_out: TextOptions,
    text: TextOptions | None = None,
    calibration: str | Path | None = None,
    methods: str | Iterable[str] = ("all",),
    remove: str | float | Iterable[str | float] | None = None,
    sizes: str | float | Iterable[str | float] | None = None,
    sample: SampleOptions = SampleOptions(),  # noqa: B008 (frozen)
    stream: bool = False,
    scratch: Path | None = None,
    device: str | None = None,
    batch_memory: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Stages | None = None,
) -> dict:
    """Measure methods at several ratios or sizes from one calibration, without leaving a checkpoint.

    Each cell is planned, applied to a copy of the original in memory and measured on the held-out text. With `stream`
    it is written instead, run from disk and deleted: what is measured is then as rounded as what is written, and speed,
    bytes in memory and errors of layers are not measured, null in the results. Finished cells
    lie in ``OUT/cells``; the same call after a stop goes on behind the last of them. A cell that fails becomes a row
    that says why, and is tried again by the next call. What was found is in ``OUT/results.json``, and to be looked
    at in ``OUT/report.html``.

    Args:
        model: folder or hub name of the original.
        out: folder of the comparison.
        held_out: text to measure on; its documents may name a ``domain``.
        text: calibration text, measured into ``OUT/calibration``.
        calibration: a finished calibration folder of the model, instead of text.
        methods: names, with parameters and bits as in ``linear:rank=4`` or ``reap@4``, see `cells_of`; ``all`` stands
            for those that are neither trained nor slow.
        remove: shares of each layer's experts to remove; 10%, 25% and 50% when neither these nor sizes are given.
        sizes: bytes that each result may take, as ``60%`` of the original's or as ``12GB``, so that rows are of equal
            bytes; ``all`` then means the bits of `PLAIN` and `COMPOSED`, too.
        sample: which calibration tokens are kept whole.
        stream: hold one decoder layer in memory at a time, of either model; the disk must have room for one result.
        scratch: folder for the original's hidden states and, with `stream`, for the result that is measured; a stopped
            comparison records the states anew then. In the folder of the comparison when None.
        device: where models run; CUDA when there is one.
        batch_memory: bytes that experts computed together may take; what the device is good for when None.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's on CUDA, else float32.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (what is running, done, in all).

    Returns:
        What is in results.json.

    Raises:
        PlanError: an unknown method, parameter, share or size.
        CalibrationError: a text or the calibration cannot be used.
        MoetailorError: the folder holds something else, another run writes there, a disk has no room, or a model
            cannot be used.
    """
    out = Path(out)
    cells = asked_for(methods, remove, sizes, text, calibration)
    original = Original(model, trust_remote_code=trust_remote_code)
    given = None if calibration is None else Calibration.open(calibration)
    if given is not None:
        check_weights(ExpertWeights(original), given.model)
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device, original.checkpoint)
    batches = _read(original, held_out)
    settings = _settings(original.checkpoint, batches, device, torch_dtype, stream)
    noted(out, settings)
    check_apart(scratch, (original.folder,))
    with growing(out) as work, nullcontext(work) if scratch is None else scratch_folder(scratch) as place:
        noted(out, settings)  # another run may have been here in between
        if place != work:
            forget(work)  # as a run without this --scratch left it
        if stream:
            left = [cell for cell in cells if not (out / CELLS / cell.file).exists()]
            make_room(place, original, left, batches, torch_dtype)
        began = time.perf_counter()
        if given is None:
            assert text is not None
            options = {"sample": sample, "stream": stream, "device": device, "dtype": dtype}
            given = _calibrated(original, out / CALIBRATION, text, cells, progress, options)
        settings |= {"calibration": calibration_hash(given.fingerprint), "sensitivities": sensitivities_of(given)}
        notes = noted(out, settings)
        (out / CELLS).mkdir(exist_ok=True)
        if notes.get("sensitivities") is None and settings["sensitivities"] is not None:
            forget_plans_without_sensitivities(out / CELLS)
        run = {"calibrate_seconds": time.perf_counter() - began} | notes | settings
        write_json(out / RUN, run)
        _warn_of_shared(given.batches(), batches)

        bench = (StreamedBench if stream else WholeBench)(
            original,
            given,
            batches,
            out,
            place,
            device=device,
            batch_memory=batch_memory,
            dtype=torch_dtype,
            progress=part(progress, "original"),
        )
        found = _measured(bench, cells, out / CELLS, progress)
        results = results_of(bench, held_out, cells, found, device, run["calibrate_seconds"])
        write_json(out / RESULTS, results)
        forget(place)
        from moetailor.report import write_report  # draws: no other stage should wait for that

        write_report(results, out / REPORT)
    return results


def asked_for(
    methods: str | Iterable[str],
    remove: str | float | Iterable[str | float] | None,
    sizes: str | float | Iterable[str | float] | None,
    text: TextOptions | None,
    calibration: str | Path | None,
) -> list[Cell]:
    """Return the cells that a comparison is asked for; see `compare`.

    Raises:
        PlanError: an unknown method, parameter, share or size.
        MoetailorError: both or neither of text and calibration.
    """
    if (text is None) == (calibration is None):
        raise MoetailorError("give either calibration text (--data) or a finished calibration folder (--calibration)")
    return cells_of(words_of(methods), _entries(DEFAULT if remove is sizes is None else remove), _entries(sizes))


def _entries(given: str | float | Iterable[str | float] | None) -> list[str | float]:
    """Return what was given as a list."""
    return [] if given is None else [given] if isinstance(given, str | float | int) else list(given)


def _calibrated(
    model: Original, folder: Path, text: TextOptions, cells: Sequence[Cell], progress: Stages | None, options: dict
) -> Calibration:
    """Calibrate with all that the methods of the cells read, and with what errors of each layer cost."""
    recorded = {ON_REQUEST[name] for cell in cells for name in cell.method.needs & ON_REQUEST.keys()}
    return calibrate(
        model,
        folder,
        text=text,
        residual="residual" in recorded,
        sensitivity=True,
        progress=progress,
        **options,
    )


def _measured(bench: Bench, cells: Sequence[Cell], folder: Path, progress: Stages | None) -> list[dict]:
    """Return all cells: read where they are finished, measured where they are not."""
    found, steps = [], len(bench.batches)
    resumed(sum((folder / cell.file).exists() for cell in cells), len(cells), "rows")

    def step(cell: int, done: int) -> None:
        if progress is not None:
            progress("compare", cell * steps + done, len(cells) * steps)

    for number, cell in enumerate(cells):
        result = _finished(cell, folder / cell.file, bench.calibration)
        if result is None:
            step(number, 0)
            try:
                result = bench.measure(cell, lambda done, _, number=number: step(number, done))
            # One cell that is refused or runs out of memory must not lose the others.
            except (MoetailorError, RuntimeError, MemoryError) as error:
                result = failed(cell, error)
            else:
                write_json(folder / cell.file, result)
        found.append(result)
        step(number + 1, 0)
    return found


def _finished(cell: Cell, file: Path, calibration: Calibration) -> dict | None:
    """Return a cell that was measured before, if it was.

    Raises:
        MoetailorError: its file is damaged, or of another cell.
    """
    if not file.exists():
        return None
    cure = f"delete {file.name} and run the same command again"
    result = read_cell(load_json(file, error=MoetailorError, cure=cure), str(file), layers_of(calibration), cure=cure)
    if any(result[name] != value for name, value in cell.to_json().items()):
        raise MoetailorError(f"{file}: is of another cell; {cure}")
    return result


def _read(original: Original, held_out: TextOptions) -> list[Batch]:
    if not held_out.data:
        raise MoetailorError("no held-out text; name some that was not calibrated on with --held-out")
    check_predicts(held_out)
    config = original.config
    limits = {"max_length": longest_sequence(config), "vocab_size": config.vocab_size}
    return read_batches(held_out, original.tokenizer(), **limits)


def _settings(checkpoint: Checkpoint, batches: Sequence[Batch], device: str, dtype: torch.dtype, stream: bool) -> dict:
    """Return what every cell of a folder has in common, beside the calibration."""
    import transformers

    shapes = [list(batch.input_ids.shape) for batch in batches]
    return {
        "model": checkpoint.fingerprint(),
        "held-out text": text_fingerprint(batches) | {"shapes": shapes},
        "device": device,
        "dtype": str(dtype),
        "way of running": "streamed" if stream else "in memory",
        "versions": {
            "moetailor": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cells": str(VERSION),
        },
    }


def noted(out: Path, settings: dict) -> dict:
    """Return what the folder notes of the comparison that it holds, if any.

    Raises:
        MoetailorError: it holds something else.
    """
    file, notes = out / RUN, {}
    if file.exists():
        cure = "delete the folder and compare again"
        notes = dict(
            read(Notes, load_json(file, error=MoetailorError, cure=cure), str(file), error=MoetailorError, cure=cure)
        )
    # A run that was stopped while it calibrated has no notes yet.
    elif out.exists():
        check_empty(out, "comparison", but=[CALIBRATION])
    # A finished calibration takes sensitivities later; rows that go by none are as good as before.
    known = {name: value for name, value in notes.items() if (name, value) != ("sensitivities", None)}
    if differs := [name for name, value in settings.items() if known.get(name, value) != value]:
        raise MoetailorError(
            f"{out}: holds a comparison with another {', '.join(differs)}; choose another folder or delete it"
        )
    return notes


def _warn_of_shared(calibrated: Sequence[Batch], held_out: Sequence[Batch]) -> None:
    before, now = (torch.cat([batch.document.flatten() for batch in text]).unique() for text in (calibrated, held_out))
    if shared := int(torch.isin(now, before).sum()):
        warnings.warn(
            f"{shared:,} of {len(now):,} held-out documents were calibrated on; damage will look smaller than it is",
            MoetailorWarning,
            stacklevel=3,
        )
