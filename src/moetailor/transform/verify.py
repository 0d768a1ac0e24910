"""Opening a result again: names, shapes, bytes, and one forward pass in which everything is finite.

It runs layer by layer, so a result larger than memory is checked too.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.original import Original
from moetailor.errors import CheckpointError
from moetailor.planning.plan import Plan
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.quantizer import MoetailorConfig, fill_maps, reshape_loaded


def verify_result(folder: str | Path, plan: Plan, *, trust_remote_code: bool = False) -> None:
    """Check a written checkpoint.

    Args:
        folder: the result.
        plan: what it was written from.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CheckpointError: bytes, names or shapes are not as planned, or a value is not finite.
    """
    result = Original(folder, takes="results", trust_remote_code=trust_remote_code)
    checkpoint = result.checkpoint
    if checkpoint.nbytes != plan.nbytes:
        raise CheckpointError(f"{folder}: {checkpoint.nbytes:,} bytes, the plan says {plan.nbytes:,}")
    entry = checkpoint.config.get("quantization_config")
    maps = {} if entry is None else MoetailorConfig(layers=entry["layers"], version=entry["version"]).slot_maps()
    source = result.streamed(dtype=torch.float32, prepare=lambda model: reshape_loaded(model, maps), complete=fill_maps)
    named = (name for name, module in source.model.named_modules() if isinstance(module, CompressedExperts))
    paths = tuple(f"{name}." for name in named)
    lost = [name for name in checkpoint.tensors if name.startswith(paths) and name not in source.names]
    if lost:
        raise CheckpointError(f"{folder}: {len(lost)} tensors have no place in the model, first {lost[0]}")
    ids = torch.arange(16)[None] % result.config.vocab_size
    walk = Walk(source, [Batch.of(ids)])
    stream = walk.begin()
    for index in walk.layers(beside={layer: slots.lenders for layer, slots in maps.items()}):
        walk.advance(stream)
        if not bool(torch.isfinite(stream[0]).all()):
            raise CheckpointError(f"{folder}: decoder layer {index} gives values that are not finite")
