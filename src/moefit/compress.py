"""What can be refused before any data is read: family, budget, top-k, groups, parameters and output folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moefit.calibration.facts import facts_of_checkpoint
from moefit.checkpoint.anatomy import discover
from moefit.checkpoint.files import open_checkpoint
from moefit.checkpoint.loader import StreamedModel, load_config
from moefit.errors import MoefitError
from moefit.methods.registry import find_method
from moefit.methods.run import outline_plan
from moefit.planning.budget import Budget
from moefit.transform.formats import Format, resolve_format


def precheck(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    budget: Budget,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    format: Format = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Refuse what cannot work, and say in one line what would be done.

    Args:
        model: folder or hub name of the original.
        out: folder of the result.
        method: name of the method.
        budget: how much stays.
        parameters: the method's parameters.
        layers: decoder layers to change.
        protect: (layer, expert) pairs that must stay.
        format: format of the result.
        overwrite: an existing folder is replaced.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        MoefitError: whatever would be refused later, as far as it shows without data.
    """
    chosen = find_method(method)
    resolved = chosen.resolve(parameters or {})
    if Path(out).exists() and not overwrite:
        raise MoefitError(f"{out}: exists; choose another folder or pass --overwrite")
    checkpoint = open_checkpoint(model)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    skeleton = StreamedModel(checkpoint, config, dtype=torch.float32)
    anatomy = discover(config, skeleton.model, trust_remote_code=trust_remote_code)
    facts = facts_of_checkpoint(checkpoint, anatomy, skeleton.names)
    plan = outline_plan(facts, chosen, resolved, budget, layers=layers, protect=protect)
    written = resolve_format(plan, format)
    kept = sorted({len(layer.pool) for layer in plan.layers.values()}) or ["all"]
    return (
        f"{anatomy.model_type}: {len(anatomy.layers)} MoE layers, top-{anatomy.top_k}; {method} keeps "
        f"{', '.join(map(str, kept))} experts "
        f"in {len(plan.layers)} of them: {plan.nbytes:,} of {facts.nbytes:,} bytes, format {written}"
    )
