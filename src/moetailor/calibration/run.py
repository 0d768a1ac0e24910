"""The calibration run: one walk through the model, in which each MoE layer's statistics are on disk before the next.

A model in memory and one streamed from disk take the same road and give the same bytes, and so do several processes,
which share the batches out (`ranks`). A stopped run resumes after the last finished layer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moetailor import ranks
from moetailor.calibration.batch import Batch, save_batches
from moetailor.calibration.capture import captured, silenced
from moetailor.calibration.collector import Collector
from moetailor.calibration.fingerprint import run_fingerprint
from moetailor.calibration.finite import Stored, check_weights
from moetailor.calibration.folder import STATES, TEXT, Calibration, layer_file, part_name
from moetailor.calibration.layers import PartlyLoaded
from moetailor.calibration.resume import finished_run, measured_layers, note, noted
from moetailor.calibration.sampling import SampleOptions, sampled_positions
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.anatomy import Anatomy, MoELayer
from moetailor.checkpoint.artifact import write_text
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.lock import growing
from moetailor.progress import Progress, resumed


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """The model that is measured.

    Attributes:
        anatomy: its MoE layers.
        facts: what planning will need to know of it.
        settings: what else makes a run what it is (dtype, tokenizer, options), for the fingerprint.
        open: gives the model; weights are loaded no sooner.
        stored: tells damaged weights from those that overflow in the dtype of the run; None for a model in memory.
    """

    anatomy: Anatomy
    facts: ModelFacts
    settings: dict
    open: Callable[[], PartlyLoaded]
    stored: Stored | None = None


def run_calibration(
    model: MeasuredModel,
    batches: Sequence[Batch],
    folder: Path,
    *,
    sample: SampleOptions,
    residual: bool = False,
    states_on_disk: bool,
    progress: Progress | None = None,
) -> Calibration:
    """Measure every MoE layer and write the calibration folder.

    Args:
        model: the model.
        batches: the text.
        folder: where the calibration goes; one that holds the same run resumes, a finished one is returned.
        sample: which tokens to keep whole.
        residual: record `Sums.gated_norm_shift` too, by a second run of each layer without its routed experts.
        states_on_disk: keep hidden states in the folder, not in memory; a killed run then loses one layer at most.
        progress: called with (batches done, batches in all) over all layers.

    Raises:
        CalibrationError: the folder holds another calibration, or weights or activations are not finite.
    """
    sampled = sampled_positions(batches, sample)
    # A folder whose run recorded it serves those who do not need it.
    residual = ranks.once(lambda: residual or bool((noted(folder)[0] or {}).get("residual")))
    fingerprint = run_fingerprint(model.facts.fingerprint, model.settings, batches, sample, residual=residual)
    ranks.same(**fingerprint)
    if not (calibration := ranks.once(lambda: finished_run(folder, fingerprint))):
        with ranks.held(growing(folder)) as work:
            # By another run, in between.
            if not (calibration := ranks.once(lambda: finished_run(folder, fingerprint))):
                waiting = work / STATES if states_on_disk else None
                hashes = _measure(model, batches, folder, waiting, fingerprint, sampled, residual, progress)
                calibration = Calibration(folder=folder, model=model.facts, fingerprint=fingerprint, hashes=hashes)
                ranks.once(calibration.save)
    return calibration


def _measure(
    model: MeasuredModel,
    batches: Sequence[Batch],
    folder: Path,
    waiting: Path | None,
    fingerprint: dict,
    sampled: list,
    residual: bool,
    progress: Progress | None,
) -> dict[str, str]:
    """Measure the layers that are not measured yet; returns the hashes of all that the folder holds."""
    anatomy = model.anatomy
    hashes, missing = ranks.once(lambda: _begun(model, batches, folder, fingerprint))
    if missing:
        walk = Walk(model.open(), batches, folder=waiting, progress=progress, shared=True)
        stream, began = walk.begin(min(missing)), time.time()
        for index in walk.layers(max(missing) + 1):
            moe, collector = anatomy.layers.get(index), None
            if index in missing:
                check_weights(walk.model, anatomy.layers[index], model.stored)
                collector = Collector(anatomy, index, batches, sampled, residual)
            walk.advance(stream, None if moe is None else partial(_run, walk, moe, collector), collector)
            if not ranks.first():
                continue
            if collector is not None:
                file = layer_file(folder, index)
                hashes |= {part_name(file, prefix): known for prefix, known in collector.finish().save(file).items()}
                # A layer counts as measured once its hash is known: what a kill left before that is measured again.
                note(folder, fingerprint, hashes)
            _log(folder, layer=index, seconds=round(time.time() - began, 3))
            began = time.time()
    return ranks.once(lambda: hashes)


def _begun(
    model: MeasuredModel, batches: Sequence[Batch], folder: Path, fingerprint: dict
) -> tuple[dict[str, str], list[int]]:
    """Write down what is measured; return the hashes of what the folder holds, and the layers that it lacks."""
    hashes = noted(folder)[1]
    note(folder, fingerprint, hashes)
    missing = sorted(set(model.anatomy.layers) - measured_layers(folder, model.facts, hashes))
    resumed(len(model.anatomy.layers) - len(missing), len(model.anatomy.layers), "layers")
    return hashes | {TEXT: save_batches(batches, folder / TEXT)}, missing


def _run(walk: Walk, moe: MoELayer, collector: Collector | None, number: int, hidden: torch.Tensor) -> torch.Tensor:
    """Run a batch through an MoE layer and show the collector what its experts do."""
    if collector is not None:
        collector.begin(number)
    # A layer that a stopped run measured already goes the same way again, for the same bits.
    with captured(walk.model, moe, collector):
        whole = walk.run(number, hidden)
    if collector is not None and collector.residuals:
        with silenced(walk.model, moe):
            collector.residual(walk.run(number, hidden), whole)
    return whole


def _log(folder: Path, **entry: Any) -> None:
    log = folder / "log.jsonl"
    told = log.read_text(encoding="utf-8") if log.is_file() else ""
    write_text(log, told + json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S")} | entry) + "\n")
