"""Opening a result again: names, shapes, bytes, every weight, and one forward pass in which everything is finite.

It runs layer by layer, so a result larger than memory is checked too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moetailor.calibration.batch import Batch
from moetailor.calibration.finite import not_finite
from moetailor.calibration.layers import Head
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.original import Original
from moetailor.errors import CheckpointError
from moetailor.planning.plan import Plan
from moetailor.progress import Progress
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.parts import in_parts, lenders_of


def verify_result(
    folder: str | Path, plan: Plan, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> None:
    """Check a written checkpoint.

    Args:
        folder: the result.
        plan: what it was written from.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (layers done, in all).

    Raises:
        CheckpointError: bytes, names or shapes are not as planned, or a weight or what layers and head give is not
            finite.
    """
    result = Original(folder, takes="results", trust_remote_code=trust_remote_code)
    if result.checkpoint.nbytes != plan.nbytes:
        raise CheckpointError(f"{folder}: {result.checkpoint.nbytes:,} bytes, the plan says {plan.nbytes:,}")
    run_once(result, progress)


def run_once(result: Original, progress: Progress | None = None) -> None:
    """Load a result part by part, and run a few tokens through it.

    Args:
        result: the opened result.
        progress: called with (layers done, in all).

    Raises:
        CheckpointError: names or shapes are not as planned, or a weight or what layers and head give is not finite.
    """
    checkpoint, folder = result.checkpoint, result.folder

    def check_part(part: nn.Module) -> None:
        if name := not_finite(source.model, but=corrections):
            raise CheckpointError(f"{folder}: {name} holds NaN or Inf; where the original's does, download it again")

    # Infinite corrections may be meant: they close a slot.
    corrections = {layer.correction for layer in result.anatomy.layers.values() if layer.correction}
    # bfloat16 holds numbers as large as float32 does, in half the memory.
    source = in_parts(result, dtype=torch.bfloat16, complete=check_part)
    named = (name for name, module in source.model.named_modules() if isinstance(module, CompressedExperts))
    paths = tuple(f"{name}." for name in named)
    lost = [name for name in checkpoint.numbers if name.startswith(paths) and name not in source.names]
    if lost:
        raise CheckpointError(f"{folder}: {len(lost)} tensors have no place in the model, first {lost[0]}")
    ids = torch.arange(16)[None] % result.config.vocab_size
    walk = Walk(source, [Batch.of(ids)], progress=progress)
    stream = walk.begin()
    for index in walk.layers(beside=lenders_of(source.model)):
        walk.advance(stream)
        if not bool(torch.isfinite(stream[0]).all()):
            raise CheckpointError(f"{folder}: decoder layer {index} gives values that are not finite")

    def check_logits(number: int, batch: Batch, head: Head) -> None:
        if not bool(torch.isfinite(head(stream[number])).all()):
            raise CheckpointError(f"{folder}: the head gives values that are not finite")

    walk.predict(check_logits)
