"""The calibration run: layer by layer over cached hidden states, each layer finished on disk before the next begins.

A model in memory and one streamed from disk take the same road and give the same bytes. A killed run resumes after the
last finished layer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetailor._version import __version__
from moetailor.calibration.batch import Batch, save_batches, text_fingerprint
from moetailor.calibration.capture import Pairs, Routed, captured, silenced
from moetailor.calibration.folder import ANEW, MANIFEST, RUN, STATES, TEXT, Calibration, layer_file, part_name
from moetailor.calibration.layers import HiddenStates, LayerRunner, PartlyLoaded
from moetailor.calibration.statistics import (
    SAMPLE,
    SUMS,
    LayerStatistics,
    Sample,
    Sums,
    add_pairs,
    add_tokens,
    load_sample,
    load_sums,
    sample_keys,
)
from moetailor.checkpoint.anatomy import Anatomy, MoELayer
from moetailor.checkpoint.artifact import write_json, write_text
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.lock import entries, growing, sweep
from moetailor.checkpoint.tensors import digest
from moetailor.errors import CalibrationError
from moetailor.progress import Progress
from moetailor.schema import find_json


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which tokens are kept whole: the `tokens` smallest hashes of (document, position) under `seed`."""

    tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or not -(2**63) <= self.seed < 2**63:
            raise CalibrationError(
                f"{self.tokens} sampled tokens, seed {self.seed}: sample 1 or more, with 64 bits of seed"
            )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured.

    Attributes:
        anatomy: its MoE layers.
        facts: what planning will need to know of it.
        settings: what else makes a run what it is (dtype, tokenizer, options), for the fingerprint.
        open: gives the model; weights are loaded no sooner.
    """

    anatomy: Anatomy
    facts: ModelFacts
    settings: dict
    open: Callable[[], PartlyLoaded]


def run_calibration(
    subject: Subject,
    batches: list[Batch],
    folder: Path,
    *,
    sample: SampleOptions,
    residual: bool = False,
    states_on_disk: bool,
    progress: Progress | None = None,
) -> Calibration:
    """Measure every MoE layer and write the calibration folder.

    Args:
        subject: the model.
        batches: the text.
        folder: where the calibration goes; one that holds the same run resumes, a finished one is returned.
        sample: which tokens to keep whole.
        residual: record `Sums.gated_norm_shift` too, by a second run of each layer without its routed experts.
        states_on_disk: keep hidden states in the folder, not in memory; a killed run then loses one layer at most.
        progress: called with (batches done, batches in all) over all layers.

    Raises:
        CalibrationError: the folder holds another calibration, or weights or activations are not finite.
    """
    # A folder that holds more than was asked for serves as well.
    residual = residual or bool((_noted(folder) or {}).get("residual"))
    fingerprint = _fingerprint(subject, batches, sample) | ({"residual": True} if residual else {})
    if finished := _finished(folder, fingerprint):
        sweep(folder)
        return finished
    with growing(folder) as work:
        if finished := _finished(folder, fingerprint):
            return finished  # by another run, in between
        write_json(folder / RUN, fingerprint)
        hashes = _hashes(folder, subject.facts) | {TEXT: save_batches(batches, folder / TEXT)}
        states = HiddenStates(work / STATES if states_on_disk else None)
        hashes |= _measure(subject, batches, folder, states, sampled_positions(batches, sample), residual, progress)
        shutil.rmtree(work / STATES, ignore_errors=True)
        calibration = Calibration(folder=folder, model=subject.facts, fingerprint=fingerprint, hashes=hashes)
        calibration.save()
    return calibration


def _measure(
    subject: Subject,
    batches: list[Batch],
    folder: Path,
    states: HiddenStates,
    sampled: list,
    residual: bool,
    progress: Progress | None,
) -> dict[str, str]:
    """Walk through the model and write the statistics of each layer that has none; return their hashes."""
    hashes: dict[str, str] = {}
    anatomy, runner = subject.anatomy, LayerRunner(subject.open(), batches)
    first, last = _first_layer(folder, states, anatomy), max(anatomy.layers)
    count = _counter(progress, first * len(batches), (last + 1) * len(batches))
    embedded = runner.embed()
    if first == 0:
        states.write(0, embedded)
    else:
        deque(embedded, maxlen=0)  # the layers' arguments are recorded on the way
    for index in range(first, last + 1):
        began, collector = time.time(), None
        with runner.layer(index) as layer:
            if index in anatomy.layers and not layer_file(folder, index).exists():
                _check_weights(runner.source.model, anatomy.layers[index])
                collector = Collector(anatomy, index, batches, sampled, residual)
            inputs = states.read(index, len(batches))
            outputs = map(count, _run_layer(runner, layer, index, inputs, anatomy.layers.get(index), collector))
            if index < last:
                states.write(index + 1, outputs)
            else:
                deque(outputs, maxlen=0)
        if collector is not None:
            file = layer_file(folder, index)
            hashes |= {part_name(file, prefix): known for prefix, known in collector.finish().save(file).items()}
        states.forget(index)
        _log(folder, layer=index, seconds=round(time.time() - began, 3))
    return hashes


class Collector:
    """Gathers the statistics of one layer over all batches."""

    def __init__(
        self, anatomy: Anatomy, index: int, batches: list[Batch], sampled: list, residual: bool = False
    ) -> None:
        self.layer, self.probabilities = anatomy.layers[index], anatomy.probabilities
        self.batches, self.sampled = batches, sampled
        self.sums = Sums.zeros(self.layer.num_experts, self.layer.width, residual=residual)
        self.weighted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.parts: list[Sample] = []
        self.number = 0
        self.counted: torch.Tensor | None = None

    def begin(self, number: int) -> None:
        """Say that batch `number` comes next."""
        self.number = number
        counted = self.batches[number].counted.reshape(-1)
        self.counted = None if bool(counted.all()) else counted

    def tokens(self, run: Routed) -> None:
        """Take the tokens of one run of the layer."""
        self._sample(run)
        logits, index = run.logits.float(), run.index
        if self.counted is not None:
            counted = self.counted.to(index.device)
            logits, index = logits[counted], index[counted]
        probability = logits.sigmoid() if self.probabilities == "sigmoid" else logits.softmax(-1)
        add_tokens(self.sums, index, probability)

    def pairs(self, run: Pairs) -> None:
        """Take a portion of the run's routed pairs."""
        token, output, expert, gate = run.token, run.output, run.expert, run.gate
        if self.counted is not None:
            counted = self.counted.to(expert.device)[token]
            token, output, expert, gate = token[counted], output[counted], expert[counted], gate[counted]
        if len(expert):
            add_pairs(self.sums, output, expert, gate)
            if self.sums.gated_norm_shift is not None:
                norm = torch.linalg.vector_norm(output, dim=1, dtype=torch.float32)
                self.weighted.append((token, expert.cpu(), gate.double() * norm))

    def residual(self, without: torch.Tensor, whole: torch.Tensor) -> None:
        """Take what leaves the decoder layer [B, L, ...] without the routed experts and with them, after the pairs."""
        assert self.sums.gated_norm_shift is not None
        tokens = self.batches[self.number].counted.numel()
        before, after = (hidden.reshape(tokens, -1).double() for hidden in (without, whole))
        # max(0, 1 - cos(h, h~)) of each token
        shift_T = (1 - torch.cosine_similarity(before, after)).clamp_min(0)
        for token, expert, weight in self.weighted:
            self.sums.gated_norm_shift.index_add_(0, expert, (weight * shift_T[token]).cpu())
        self.weighted.clear()

    def _sample(self, run: Routed) -> None:
        key, position = self.sampled[self.number]
        position = position.to(run.hidden.device)
        self.parts.append(
            Sample(
                key=key,
                hidden=run.hidden[position].cpu(),
                index=run.index[position].int().cpu(),
                gate=run.gate[position].float().cpu(),
                logits=run.logits[position].float().cpu(),
            )
        )

    def finish(self) -> LayerStatistics:
        """Return the statistics.

        Raises:
            CalibrationError: an expert's outputs were not finite.
        """
        bad = (~torch.isfinite(self.sums.norm_sq)).nonzero().flatten().tolist()
        if bad:
            raise CalibrationError(
                f"layer {self.layer.index}, expert {bad[0]}: outputs are not finite ({len(bad)} experts in this layer) "
                "though its weights are: the activations overflowed, then calibrate in a wider --dtype; "
                "or a weight before the experts is damaged, then download the checkpoint again"
            )
        # Experts may be sound behind a router that is not.
        if not bool(torch.isfinite(self.sums.gate + self.sums.probability).all()):
            raise CalibrationError(
                f"layer {self.layer.index}: the router gives values that are not finite; "
                "its weights are damaged: download the checkpoint again"
            )
        for name, total in self.sums.recorded.items():
            if not bool(torch.isfinite(total).all()):
                raise CalibrationError(f"layer {self.layer.index}: {name} is not finite; calibrate in a wider --dtype")
        return LayerStatistics(sums=self.sums, sample=Sample.concatenated(self.parts))


def _run_layer(
    runner: LayerRunner,
    layer: nn.Module,
    index: int,
    inputs: Iterator[torch.Tensor],
    moe: MoELayer | None,
    collector: Collector | None,
) -> Iterator[torch.Tensor]:
    for number, hidden in enumerate(inputs):
        if moe is None:
            yield runner.run(layer, index, number, hidden)
            continue
        if collector is not None:
            collector.begin(number)
        # A layer that a stopped run measured already goes the same way again, for the same bits.
        with captured(runner.source.model, moe, collector):
            whole = runner.run(layer, index, number, hidden)
        if collector is not None and collector.sums.gated_norm_shift is not None:
            with silenced(runner.source.model, moe):
                collector.residual(runner.run(layer, index, number, hidden), whole)
        yield whole


def _check_weights(model: nn.Module, layer: MoELayer) -> None:
    experts = model.get_submodule(layer.experts)
    for name in layer.expert_rows:
        # One pass: a row with NaN or Inf sums to NaN or Inf.
        sums = getattr(experts, name).detach().flatten(1).sum(1, dtype=torch.float32)
        bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        if bad:
            raise CalibrationError(
                f"layer {layer.index}, expert {bad[0]}: {name} holds NaN or Inf; the checkpoint is damaged"
            )


def sampled_positions(batches: list[Batch], sample: SampleOptions) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, for each batch, the keys and flat positions of its sampled tokens."""
    keys = [sample_keys(batch.document, batch.position, sample.seed).reshape(-1) for batch in batches]
    counted = [batch.counted.reshape(-1) for batch in batches]
    every = torch.cat([key[mask] for key, mask in zip(keys, counted, strict=True)])
    if len(every) == 0:
        raise CalibrationError("no token counts: the text is all special tokens or padding")
    # Ties at the limit are cut by place in the text, as a stable sort does.
    order = torch.argsort(every, stable=True)[: sample.tokens]
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[order] = True
    sampled = []
    for key, mask in zip(keys, counted, strict=True):
        here, chosen = chosen[: int(mask.sum())], chosen[int(mask.sum()) :]
        position = mask.nonzero().flatten()[here]
        sampled.append((key[position], position))
    return sampled


def _first_layer(folder: Path, states: HiddenStates, anatomy: Anatomy) -> int:
    """Return the layer to begin with: the last one whose inputs are on disk and whose predecessors are all measured."""
    last = max(anatomy.layers)
    if all(layer_file(folder, moe).exists() for moe in anatomy.layers):
        return last + 1
    for index in range(last, 0, -1):
        if states.has(index) and all(layer_file(folder, moe).exists() for moe in anatomy.layers if moe < index):
            return index
    return 0


def _finished(folder: Path, fingerprint: dict) -> Calibration | None:
    """Return the calibration of a folder when it is finished.

    Raises:
        CalibrationError: the folder holds something else.
    """
    notes = _noted(folder)
    if notes is None and folder.is_dir() and (others := entries(folder)):
        raise CalibrationError(
            f"{folder}: not empty and no calibration; choose another folder, or delete what is in it: "
            f"{', '.join(others[:5])}{' ...' * (len(others) > 5)}"
        )
    if notes is not None and notes != fingerprint:
        differs = [name for name in fingerprint | notes if notes.get(name) != fingerprint.get(name)]
        raise CalibrationError(
            f"{folder}: holds another calibration ({', '.join(differs)} differ); choose another folder or delete it"
        )
    finished = Calibration.open(folder) if (folder / MANIFEST).exists() else None
    return finished if finished is not None and finished.complete else None


def _noted(folder: Path) -> dict | None:
    """Return the fingerprint of the run that a folder holds, finished or not."""
    if (folder / MANIFEST).exists():
        return Calibration.open(folder).fingerprint
    return find_json(folder / RUN, error=CalibrationError, cure=ANEW)


def _hashes(folder: Path, facts: ModelFacts) -> dict[str, str]:
    """Return the hashes of what a run measured that was stopped, or has lost a part since; a file of it that cannot be
    used is refused.
    """
    if (folder / MANIFEST).exists():
        return dict(Calibration.open(folder).hashes)
    hashes: dict[str, str] = {}
    for stack in facts.stacks:
        if stack.index is not None and (file := layer_file(folder, stack.index)).exists():
            sums = load_sums(file, stack.num_experts, facts.width)
            sample = load_sample(file, stack.num_experts, facts.width, facts.top_k)
            hashes |= {part_name(file, SUMS): digest(sums.recorded), part_name(file, SAMPLE): digest(vars(sample))}
    return hashes


def _fingerprint(subject: Subject, batches: list[Batch], sample: SampleOptions) -> dict:
    import transformers

    versions = {"moetailor": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    text = text_fingerprint(batches) | {"shapes": [list(batch.input_ids.shape) for batch in batches]}
    fingerprint = {"model": subject.facts.fingerprint, "text": text, "sample": asdict(sample), "versions": versions}
    return json.loads(json.dumps(fingerprint | subject.settings))


def _counter(progress: Progress | None, done: int, total: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that counts the batches that pass through it."""

    def count(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)
        return hidden

    return count


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary and special tokens."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _log(folder: Path, **entry: Any) -> None:
    log = folder / "log.jsonl"
    told = log.read_text(encoding="utf-8") if log.is_file() else ""
    write_text(log, told + json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S")} | entry) + "\n")
