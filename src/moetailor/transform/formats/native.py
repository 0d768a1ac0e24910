"""Native: an ordinary checkpoint with a smaller expert count, which loads wherever the original does."""

from __future__ import annotations

from typing import Any

from moetailor.checkpoint import family
from moetailor.planning.plan import Plan
from moetailor.transform.formats.format import Format, register_format


class Native(Format):
    """The original's own form."""

    name = "native"
    automatic = True
    loading = "An ordinary checkpoint: it loads wherever the original does."

    def refusal(self, plan: Plan) -> str | None:
        """Refuse all but dropped slots, the same number in every layer."""
        if plan.native:
            return None
        counts = sorted({len(layer.pool) for layer in plan.layers.values()})
        others = "" if all(layer.native for layer in plan.layers.values()) else " and has stand-ins or remaps"
        return (
            "holds dropped slots only, the same number in every MoE layer; this plan keeps "
            f"{counts} experts in {len(plan.layers)} of {len(plan.model.stacks)} layers{others}"
        )

    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        """Return the config with the smaller count under every spelling that it has."""
        if not plan.layers:
            return original
        names = family.expert_count_spellings(original) or family.expert_count_spellings(config)[:1]
        return original | dict.fromkeys(names, len(next(iter(plan.layers.values())).pool))


register_format(Native())
