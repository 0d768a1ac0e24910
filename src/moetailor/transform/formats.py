"""The two formats and what each writes into config.json; the original's config is patched, never written anew."""

from __future__ import annotations

import copy
from typing import Any, Literal

from moetailor.checkpoint import family
from moetailor.errors import PlanError
from moetailor.planning.plan import Plan
from moetailor.runtime.quantizer import MoetailorConfig

Format = Literal["auto", "native", "moetailor"]


def resolve_format(plan: Plan, wanted: Format) -> Literal["native", "moetailor"]:
    """Return the format to write: native when the plan allows it, unless told otherwise.

    Raises:
        PlanError: native is asked for but the plan has answers that an ordinary checkpoint cannot hold.
    """
    if wanted not in ("auto", "native", "moetailor"):
        raise PlanError(f"unknown format {wanted!r}; known: auto, native, moetailor")
    if wanted == "native" and not plan.native:
        counts = sorted({len(layer.pool) for layer in plan.layers.values()})
        raise PlanError(
            "format native holds dropped slots only, the same number in every MoE layer; "
            f"this plan keeps {counts} experts in {len(plan.layers)} of {len(plan.model.stacks)} layers"
            + ("" if all(layer.native for layer in plan.layers.values()) else " and has stand-ins or remaps")
            + "; use --format moetailor"
        )
    return "native" if wanted == "native" or (wanted == "auto" and plan.native) else "moetailor"


def patched_config(original: dict, config: Any, plan: Plan, written: str) -> dict:
    """Return config.json of the result.

    Args:
        original: config.json of the original.
        config: the same as transformers reads it, for the spelling when the file leaves the count to the default.
        plan: the plan.
        written: ``native`` or ``moetailor``.
    """
    patched = copy.deepcopy(original)
    if not plan.layers:
        return patched
    if written == "native":
        names = family.expert_count_spellings(original) or family.expert_count_spellings(config)[:1]
        count = len(next(iter(plan.layers.values())).pool)
        return patched | dict.fromkeys(names, count)
    entry = MoetailorConfig.of(plan.slot_maps)
    patched["quantization_config"] = {
        "quant_method": entry.quant_method,
        "version": entry.version,
        "layers": entry.layers,
    }
    return patched
