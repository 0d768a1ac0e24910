"""How far a compressed model's predictions are from the original's, with bootstrap intervals over blocks.

The original's log-probabilities are kept on disk, so only one model is in memory at a time.
Shapes: B sequences, L tokens, V vocabulary; each block predicts its last L - 1 tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.finite import not_finite
from moetailor.checkpoint.artifact import save_tensors
from moetailor.checkpoint.tensors import read_tensors
from moetailor.errors import MoetailorError
from moetailor.progress import Progress

RESAMPLES = 1000


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
    """The original model's predictions on some text, in a folder.

    Args:
        folder: where they lie; made by `record`, deleted by `close`.
        batches: the text.
    """

    def __init__(self, folder: Path, batches: Sequence[Batch]) -> None:
        self.folder = folder
        self.batches = list(batches)

    @torch.no_grad()
    def record(self, model: Any, progress: Progress | None = None) -> Reference:
        """Run the original model and keep its log-probabilities, float32 [B, L - 1, V] a batch.

        Raises:
            MoetailorError: the disk has no room for them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        need = sum(batch.input_ids.numel() for batch in self.batches) * model.config.vocab_size * 4
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise MoetailorError(
                f"{self.folder}: the original's log-probabilities take {need:,} bytes, {free:,} are "
                "free; evaluate on less text"
            )
        for number, batch in enumerate(self.batches):
            save_tensors({"logp": _log_probabilities(model, batch, "original").cpu()}, self._file(number))
            if progress:
                progress(number + 1, len(self.batches))
        return self

    @torch.no_grad()
    def compare(self, model: Any, progress: Progress | None = None) -> dict[str, Fidelity]:
        """Run the compressed model and compare; returns ``""`` for all tokens, and each domain by name.

        Raises:
            MoetailorError: the models have other vocabularies, or a prediction is not finite.
        """
        parts = []
        for number, (batch, original, compressed) in enumerate(self._pairs(model)):
            parts.append(_per_token(batch, original, compressed))
            if progress:
                progress(number + 1, len(self.batches))
        domains = sorted({name for batch in self.batches for name in batch.domains if name})
        overall = {"": _summary(parts, None)}
        return overall | {name: found for name in domains if (found := _summary(parts, name)).tokens}

    @torch.no_grad()
    def overlap(self, model: Any) -> float:
        """Run the compressed model and return what both predict alike, between 0 and 1: the share of words that
        speculative decoding would accept of it.

        Raises:
            MoetailorError: the models have other vocabularies.
        """
        total, tokens = 0.0, 0
        for batch, original, compressed in self._pairs(model):
            counted = batch.counted[:, 1:]
            # mean over tokens of sum_v min(p_v, q_v)
            common = torch.minimum(original, compressed).exp().sum(-1)
            total += float(common[counted].sum(dtype=torch.float64))
            tokens += int(counted.sum())
        return total / max(tokens, 1)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pairs(self, model: Any) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        """Yield each batch with the log-probabilities of the original and of another model, [B, L - 1, V]."""
        for number, batch in enumerate(self.batches):
            cure = f"delete {self.folder} and run the same command again"
            original = read_tensors(self._file(number), names=["logp"], error=MoetailorError, cure=cure)["logp"]
            compressed = _log_probabilities(model, batch, "compressed model").cpu()
            if original.shape != compressed.shape:
                raise MoetailorError(
                    f"the original has {original.shape[-1]} words, the compressed model {compressed.shape[-1]}"
                )
            yield batch, original, compressed

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def _log_probabilities(model: Any, batch: Batch, what: str) -> torch.Tensor:
    """Return the log-probabilities of all words but the first, [B, L - 1, V].

    Raises:
        MoetailorError: one is not finite, with what is known of the reason.
    """
    device = model.get_input_embeddings().weight.device
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
    found = torch.log_softmax(logits[:, :-1].float(), -1)
    if not bool(torch.isfinite(found).all()):
        dtype, bad = str(logits.dtype).removeprefix("torch."), not_finite(model)
        if bad is None:
            why = f"though its weights are: activations overflow in {dtype}; evaluate in a wider --dtype"
        elif logits.dtype == torch.float16:
            why = f"since its {bad} is not, in {dtype}; evaluate in a wider --dtype, which shows whether it is damaged"
        else:
            why = f"since its {bad} holds NaN or Inf; it is damaged"
        raise MoetailorError(f"a prediction of the {what} is not finite, {why}")
    return found


def _per_token(batch: Batch, original: torch.Tensor, compressed: torch.Tensor) -> list[dict]:
    target = batch.input_ids[:, 1:, None]
    # KL(p || q) = sum_v p (log p - log q)
    kl = (original.exp() * (original - compressed)).sum(-1)
    values = {
        "kl": kl,
        "agree": (original.argmax(-1) == compressed.argmax(-1)).float(),
        "original": -original.gather(2, target)[..., 0],
        "compressed": -compressed.gather(2, target)[..., 0],
    }
    names = np.array(batch.domains)[batch.domain[:, 1:].numpy()]
    counted = (
        torch.ones_like(kl, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask[:, 1:].bool()
    )
    return [
        {name: value[row].double().numpy() for name, value in values.items()}
        | {"domain": names[row], "counted": counted[row].numpy()}
        for row in range(len(kl))
    ]


def _summary(parts: list[list[dict]], domain: str | None) -> Fidelity:
    blocks = [block for part in parts for block in part]
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
