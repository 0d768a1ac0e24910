"""An original or a result with one part in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moetailor.answers import SlotMap
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.original import Original
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.quantizer import MoetailorConfig, fill_maps, reshape_loaded


def slot_maps(result: Original) -> dict[int, SlotMap]:
    """Return the maps of a result's layers that changed; none of an original."""
    return MoetailorConfig(**result.checkpoint.config["quantization_config"]).slot_maps() if result.written_here else {}


def in_parts(
    result: Original, *, dtype: torch.dtype, device: str = "cpu", complete: Callable[[nn.Module], None] | None = None
) -> StreamedModel:
    """Return an original or a result with a part in memory at a time.

    Args:
        result: which.
        dtype: dtype to load floating-point weights in.
        device: where to load them.
        complete: called with each part that was loaded.
    """
    maps = slot_maps(result)

    def completed(part: nn.Module) -> None:
        fill_maps(part)
        if complete:
            complete(part)

    return result.streamed(
        dtype=dtype, device=device, prepare=lambda model: reshape_loaded(model, maps), complete=completed
    )


def lenders_of(model: Any) -> dict[int, set[int]]:
    """Return the decoder layers whose experts answer in another one, by that one."""
    layers = model.get_decoder().layers
    return {
        index: set(module.slots.lenders)
        for index, layer in enumerate(layers)
        for module in layer.modules()
        if isinstance(module, CompressedExperts)
    }
