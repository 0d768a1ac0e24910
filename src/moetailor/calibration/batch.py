"""Token sequences as the model gets them, and their file in a calibration folder.

Shapes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moetailor.checkpoint.artifact import write_tensors
from moetailor.checkpoint.tensors import digest, read_tensors
from moetailor.errors import CalibrationError

# What to do about a file of a calibration that cannot be used.
AGAIN = "delete it and run the same calibrate command again: it measures what is missing"

FIELDS = ("input_ids", "counted", "attention_mask", "document", "position", "domain")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences of one length.

    Attributes:
        input_ids: token ids, [B, L].
        counted: which tokens enter statistics, bool [B, L]; padding and masked tokens do not.
        attention_mask: 1 for tokens, 0 for padding, [B, L]; None when nothing is padded.
        document: a 64-bit hash of the document a token comes from, int64 [B, L].
        position: place of the token in its document, int64 [B, L].
        domain: index into `domains`, int64 [B, L].
        domains: names of the domains.
    """

    input_ids: torch.Tensor
    counted: torch.Tensor
    attention_mask: torch.Tensor | None
    document: torch.Tensor
    position: torch.Tensor
    domain: torch.Tensor
    domains: tuple[str, ...] = ("",)

    def sequence(self, row: int) -> Batch:
        """Return one sequence as a batch."""
        parts = {name: getattr(self, name) for name in FIELDS}
        return replace(self, **{name: part[row : row + 1] for name, part in parts.items() if part is not None})

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Batch:
        """Make a batch of plain token ids, each sequence a document of its own, for callers with text of their own."""
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        counted = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        keys = torch.tensor([document_key(str(row)) for row in input_ids.tolist()])
        position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return cls(
            input_ids=input_ids,
            counted=counted,
            attention_mask=attention_mask,
            document=keys[:, None].expand_as(input_ids),
            position=position,
            domain=torch.zeros_like(input_ids),
        )


def evenly_spaced_sequences(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return every n-th sequence of a text, each as a batch of its own.

    Args:
        batches: the text.
        tokens: how many tokens they have together, rounded to whole sequences; at least one sequence is returned.
    """
    rows = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
    count = max(1, tokens * len(rows) // sum(batch.input_ids.numel() for batch in batches))
    return [batch.sequence(row) for batch, row in rows[:: math.ceil(len(rows) / count)]]


def text_fingerprint(batches: Sequence[Batch]) -> dict:
    """Say what text this is: its tokens in order and their domains, how many there are and how many count."""
    digest = hashlib.sha256()
    for batch in batches:
        for part in (batch.input_ids, batch.counted.long(), batch.position):
            digest.update(part.contiguous().numpy().tobytes())
        # By their names: numbers are as batches were made.
        for name, number in sorted((name, number) for number, name in enumerate(batch.domains) if name):
            digest.update(name.encode(errors="surrogatepass") + (batch.domain == number).numpy().tobytes())
    return {
        "hash": digest.hexdigest()[:32],
        "tokens": sum(batch.input_ids.numel() for batch in batches),
        "counted": sum(int(batch.counted.sum()) for batch in batches),
    }


def save_batches(batches: Sequence[Batch], file: Path) -> str:
    """Write batches as one safetensors file; return the hash of what was written."""
    tensors = {
        f"{number:05d}.{name}": getattr(batch, name).contiguous()
        for number, batch in enumerate(batches)
        for name in FIELDS
        if getattr(batch, name) is not None
    }
    tensors |= {
        f"{number:05d}.domains": torch.tensor(list(json.dumps(batch.domains).encode()), dtype=torch.uint8)
        for number, batch in enumerate(batches)
    }
    write_tensors(file, tensors)
    return digest(tensors)


def load_batches(file: Path, known: str) -> list[Batch]:
    """Read what `save_batches` wrote.

    Args:
        file: the file.
        known: the hash that it gave.

    Raises:
        CalibrationError: the file is missing, damaged or of another text.
    """
    batches: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(file, known=known, error=CalibrationError, cure=AGAIN).items():
        number, _, name = key.partition(".")
        batches.setdefault(number, {})[name] = tensor
    return [
        Batch(
            domains=tuple(json.loads(bytes(parts["domains"].tolist()))),
            **{name: parts.get(name) for name in FIELDS},  # type: ignore[arg-type]
        )
        for _, parts in sorted(batches.items())
    ]


def document_key(text: str) -> int:
    """Return the 64-bit hash of a document, as int64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
