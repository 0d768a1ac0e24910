"""The apply stage: one plan, carried out on a model in memory or on a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from torch import nn

from moetailor.checkpoint.original import Original
from moetailor.errors import MoetailorError
from moetailor.planning.plan import Plan
from moetailor.transform.disk import apply_to_checkpoint
from moetailor.transform.memory import apply_to_model


@overload
def apply(plan: Plan, model: nn.Module, out: None = None, **options: Any) -> nn.Module: ...
@overload
def apply(
    plan: Plan, model: str | Path | Original, out: str | Path, *, verify: bool = True, **options: Any
) -> Path: ...
def apply(
    plan: Plan,
    model: str | Path | Original | nn.Module,
    out: str | Path | None = None,
    *,
    verify: bool = True,
    **options: Any,
) -> nn.Module | Path:
    """Carry a plan out.

    Args:
        plan: what becomes of the slots.
        model: a transformers model, which is changed in place, or the folder, hub name or opened files of a checkpoint.
        out: folder of the result, for a checkpoint.
        verify: open the result again and run it once before it takes its place, for a checkpoint.
        **options: see `apply_to_model` and `apply_to_checkpoint`.

    Raises:
        MoetailorError: a checkpoint without a folder for the result, a model with one, and all that the two functions
            raise.
    """
    if isinstance(model, nn.Module) and out is not None:
        raise MoetailorError(f"{out}: a model in memory is changed in place; leave out= away, and save it afterwards")
    if isinstance(model, nn.Module):
        return apply_to_model(plan, model, **options)
    if out is None:
        raise MoetailorError("applying a plan to a checkpoint needs a folder for the result; pass out=")
    return apply_to_checkpoint(plan, model, out, verify=verify, **options)
