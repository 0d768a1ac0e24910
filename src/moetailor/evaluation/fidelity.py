"""How far a compressed model's predictions are from the original's, with bootstrap intervals over blocks.

What the original's last layer gave is kept on disk, and only its head beside the compressed model: of real models that
is a fiftieth of the bytes that their predictions would take. Both heads run on some tokens at a time.
Shapes: B sequences, L tokens, C of them, D model width, V vocabulary; each block predicts its last L - 1 tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moetailor.calibration.batch import Batch
from moetailor.calibration.finite import not_finite
from moetailor.calibration.layers import LayerRunner, PartlyLoaded, ResidentModel, by_rows, pieces
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.artifact import save_tensors
from moetailor.checkpoint.tensors import is_finite, read_tensors
from moetailor.errors import MoetailorError
from moetailor.progress import Progress
from moetailor.runtime.parts import lenders_of

RESAMPLES = 1000

Judge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Interval:
    """A mean over tokens and its 95% bootstrap interval over blocks."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """What was measured on one set of tokens.

    Attributes:
        tokens: predicted tokens.
        original_perplexity: of the original model.
        compressed_perplexity: of the compressed one.
        kl: KL(original || compressed) over the full vocabulary, nats a token.
        top1_agreement: share of tokens for which both rank the same word first.
    """

    tokens: int
    original_perplexity: Interval
    compressed_perplexity: Interval
    kl: Interval
    top1_agreement: Interval

    def to_json(self) -> dict:
        """Return the numbers as they stand in scores.json."""
        models = {"original": self.original_perplexity, "compressed": self.compressed_perplexity}
        perplexities = {
            name: {"perplexity": found.mean, "perplexity_interval": [found.low, found.high]}
            for name, found in models.items()
        }
        agreement = {"kl": asdict(self.kl), "top1_agreement": asdict(self.top1_agreement)}
        return {"tokens": self.tokens} | perplexities | agreement


class Reference:
    """What the original gives on some text in front of its head, in a folder: its predictions are made of that again.

    Models are in memory, or streamed from disk with a layer in memory at a time.

    Args:
        folder: where it lies; made by `record`, deleted by `close`.
        batches: the text.
    """

    def __init__(self, folder: Path, batches: Sequence[Batch]) -> None:
        self.folder = folder
        self.batches = list(batches)

    def record(self, model: Any, progress: Progress | None = None) -> Reference:
        """Run the original model and keep what its last decoder layer gives, [B, L, D] a batch.

        Raises:
            MoetailorError: the disk has no room for that, or it is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        source = _partly(model)
        weight, streams = source.model.get_input_embeddings().weight, 1 + 2 * (not isinstance(source, ResidentModel))
        need = sum(batch.input_ids.numel() for batch in self.batches) * weight.shape[1] * weight.element_size()
        if need * streams > (free := shutil.disk_usage(self.folder).free):
            told = f"hidden states take {need * streams:,} bytes, {free:,} are free"
            raise MoetailorError(
                f"{self.folder}: {told}; evaluate on less text, or name a folder with more room with --scratch"
            )
        for number, hidden in enumerate(self._states(source, progress)):
            if not is_finite(hidden):
                raise _not_finite(source.model, "original", hidden.dtype)
            save_tensors({"hidden": hidden.contiguous().cpu()}, self._file(number))
        return self

    def compare(self, model: Any, original: Any, progress: Progress | None = None) -> dict[str, Fidelity]:
        """Run the compressed model and compare; returns ``""`` for all tokens, and each domain by name.

        Args:
            model: the compressed model.
            original: the original, of which only the head runs.
            progress: called with (batches done, batches in all).

        Raises:
            MoetailorError: the models have other vocabularies, or a prediction is not finite.
        """
        parts = []
        for batch, found in self._each(model, original, _per_token, progress):
            parts += _blocks(batch, found)
        domains = sorted({name for batch in self.batches for name in batch.domains if name})
        overall = {"": _summary(parts, None)}
        return overall | {name: found for name in domains if (found := _summary(parts, name)).tokens}

    def overlap(self, model: Any, original: Any) -> float:
        """Run the compressed model and return what both predict alike, between 0 and 1: the share of words that
        speculative decoding would accept of it; see `compare`.
        """
        total, tokens = 0.0, 0

        def common(a: torch.Tensor, b: torch.Tensor, word: torch.Tensor) -> dict[str, torch.Tensor]:
            # sum_v min(p_v, q_v)
            return {"common": torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1)}

        for batch, found in self._each(model, original, common):
            counted = batch.counted[:, 1:]
            total += float(found["common"][counted].sum(dtype=torch.float64))
            tokens += int(counted.sum())
        return total / max(tokens, 1)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @torch.no_grad()
    def _each(
        self, model: Any, original: Any, judge: Judge, progress: Progress | None = None
    ) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
        """Yield each batch with what is said of each of its words but the first, [B, L - 1] by name.

        Args:
            model: the compressed model.
            original: the original.
            judge: called with logits of both for some tokens, float32 [R, V], and the words that follow, [R]; what it
                returns, [R] by name, is not finite where a logit is not.
            progress: called with (batches done, batches in all).
        """
        source, first = _partly(model), _partly(original)
        vocab_size = first.model.config.get_text_config().vocab_size
        states = self._states(source, progress)
        with ExitStack() as heads:
            true = heads.enter_context(LayerRunner(first, self.batches).head())
            same = source.model is first.model
            other = true if same else heads.enter_context(LayerRunner(source, self.batches).head())

            def judged(before: torch.Tensor, after: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
                a, b = true(before), other(after)
                if a.shape != b.shape:
                    raise MoetailorError(f"the original has {a.shape[-1]} words, the compressed model {b.shape[-1]}")
                said = by_rows(judge, a, b.to(a.device), words.to(a.device))
                if not all(map(is_finite, said.values())):
                    if is_finite(a):
                        raise _not_finite(source.model, "compressed model", b.dtype)
                    raise _not_finite(first.model, "original", a.dtype)
                return {name: each.cpu() for name, each in said.items()}

            for number, after in enumerate(states):
                batch, before = self.batches[number], self._recorded(number)
                words = batch.input_ids[:, 1:]
                if not words.shape[1]:  # the last block of a text may be one token, which nothing predicts
                    continue
                parts = [
                    judged(before[:, here], after[:, here], words[:, here])
                    for here in pieces(words.shape[1], len(words), vocab_size)
                ]
                yield batch, {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def _states(self, source: PartlyLoaded, progress: Progress | None) -> Iterator[torch.Tensor]:
        """Return what the last decoder layer gives for each batch, [B, L, D]; a walk is over when this returns."""
        count = len(self.batches)
        if isinstance(source, ResidentModel):
            runner, done = LayerRunner(source, self.batches), progress or (lambda number, every: None)

            def run(number: int) -> torch.Tensor:
                hidden = runner.final(number)
                done(number + 1, count)
                return hidden

            return (run(number) for number in range(count))  # to map, a StopIteration in it is the end
        walk = Walk(source, self.batches, folder=self.folder / "walk", progress=progress)
        stream = walk.begin()
        for _ in walk.layers(beside=lenders_of(source.model)):
            walk.advance(stream)
        return (stream[number] for number in range(count))

    def _recorded(self, number: int) -> torch.Tensor:
        cure = f"delete {self.folder} and run the same command again"
        return read_tensors(self._file(number), names=["hidden"], error=MoetailorError, cure=cure)["hidden"]

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def _partly(model: Any) -> PartlyLoaded:
    return ResidentModel(model) if isinstance(model, nn.Module) else model


def _not_finite(model: Any, what: str, dtype: torch.dtype) -> MoetailorError:
    name, bad = str(dtype).removeprefix("torch."), not_finite(model)
    if bad is None:
        why = f"though its weights are: activations overflow in {name}; evaluate in a wider --dtype"
    elif dtype == torch.float16:
        why = f"since its {bad} is not, in {name}; evaluate in a wider --dtype, which shows whether it is damaged"
    else:
        why = f"since its {bad} holds NaN or Inf; it is damaged"
    return MoetailorError(f"a prediction of the {what} is not finite, {why}")


def _per_token(a_RV: torch.Tensor, b_RV: torch.Tensor, word_R: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is said of each word, of the logits of the original and of the compressed model."""

    def at(numbers_RV: torch.Tensor, words_R: torch.Tensor) -> torch.Tensor:
        return numbers_RV.gather(1, words_R[:, None])[:, 0]

    p_RV, q_RV, top_a, top_b = a_RV.softmax(-1), b_RV.softmax(-1), a_RV.argmax(-1), b_RV.argmax(-1)
    # log sum_v e^a = a_v - log p_v for every v: of the likeliest, whose p is largest; logsumexp takes twice as long
    z_a, z_b = at(a_RV, top_a) - at(p_RV, top_a).log(), at(b_RV, top_b) - at(q_RV, top_b).log()
    return {
        "agree": (top_a == top_b).float(),
        "original": z_a - at(a_RV, word_R),
        "compressed": z_b - at(b_RV, word_R),
        # KL(p || q) = sum_v p (log p - log q) = sum_v p (a - b) - (log sum_v e^a - log sum_v e^b)
        "kl": torch.linalg.vecdot(p_RV, a_RV - b_RV) - (z_a - z_b),
    }


def _blocks(batch: Batch, values: dict[str, torch.Tensor]) -> list[dict]:
    names = np.array(batch.domains)[batch.domain[:, 1:].numpy()]
    counted = (
        torch.ones_like(values["kl"], dtype=torch.bool)
        if batch.attention_mask is None
        else batch.attention_mask[:, 1:].bool()
    )
    return [
        {name: value[row].double().numpy() for name, value in values.items()}
        | {"domain": names[row], "counted": counted[row].numpy()}
        for row in range(len(counted))
    ]


def _summary(blocks: list[dict], domain: str | None) -> Fidelity:
    masks = [block["counted"] & ((block["domain"] == domain) | (domain is None)) for block in blocks]
    weight = np.array([mask.sum() for mask in masks], dtype=float)
    if not weight.sum():
        nothing = Interval(float("nan"), float("nan"), float("nan"))
        return Fidelity(0, nothing, nothing, nothing, nothing)
    # The same resamples of blocks for every number; seeded, so the same text gives the same interval.
    draws = np.random.default_rng(0).multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=RESAMPLES)

    def interval(name: str, transform: Callable = lambda x: x) -> Interval:
        total = np.array([block[name][mask].sum() for block, mask in zip(blocks, masks, strict=True)])
        tokens = draws @ weight
        means = transform((draws @ total)[tokens > 0] / tokens[tokens > 0])
        low, high = np.percentile(means, [2.5, 97.5])
        return Interval(float(transform(total.sum() / weight.sum())), float(low), float(high))

    return Fidelity(
        tokens=int(weight.sum()),
        original_perplexity=interval("original", np.exp),
        compressed_perplexity=interval("compressed", np.exp),
        kl=interval("kl"),
        top1_agreement=interval("agree"),
    )
