"""The fingerprint of a calibration run: what makes it that run, and which run a folder belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moetailor._version import __version__
from moetailor.calibration.batch import Batch, text_fingerprint
from moetailor.calibration.sampling import SampleOptions
from moetailor.checkpoint.place import check_empty
from moetailor.errors import CalibrationError


def run_fingerprint(
    model: dict, settings: dict, batches: Sequence[Batch], sample: SampleOptions, *, residual: bool
) -> dict:
    """Return what makes a run what it is, as JSON values.

    Args:
        model: fingerprint of the weights.
        settings: dtype, tokenizer and options of the text.
        batches: the text.
        sample: which tokens are kept whole.
        residual: whether `Sums.gated_norm_shift` is recorded.
    """
    import transformers

    versions = {"moetailor": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    text = text_fingerprint(batches) | {"shapes": [list(batch.input_ids.shape) for batch in batches]}
    sampled = {"tokens": sample.tokens, "seed": sample.seed}
    fingerprint = {"model": model, "text": text, "sample": sampled, "versions": versions} | settings
    return json.loads(json.dumps(fingerprint | ({"residual": True} if residual else {})))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary and special tokens."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def check_same_run(folder: Path, stored: dict | None, fingerprint: dict) -> None:
    """Refuse a folder that belongs to another run or to something else.

    Args:
        folder: the folder.
        stored: the fingerprint that it holds, finished or not; None when it holds none.
        fingerprint: that of the run that wants it.

    Raises:
        CalibrationError: see above.
    """
    if stored is None and folder.exists():
        check_empty(folder, "calibration", error=CalibrationError)
    if stored is not None and stored != fingerprint:
        differs = [name for name in fingerprint | stored if stored.get(name) != fingerprint.get(name)]
        raise CalibrationError(
            f"{folder}: holds another calibration ({', '.join(differs)} differ); choose another folder or delete it"
        )
