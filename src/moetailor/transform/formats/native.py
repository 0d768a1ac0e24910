"""Native: an ordinary checkpoint with a smaller expert count, which loads wherever the original does."""

from __future__ import annotations

from typing import Any

from moetailor.checkpoint import family
from moetailor.planning.plan import Plan
from moetailor.transform.formats.format import Format


class Native(Format):
    """The original's own form."""

    name = "native"
    one_count = True
    automatic = True
    loading = "An ordinary checkpoint: it loads wherever the original does."

    def refusal(self, plan: Plan) -> str | None:
        """Refuse all but dropped slots, the same number in every layer."""
        if plan.only_drops and not plan.native:
            return "holds experts as they lie in the original; this plan keeps some in few bits"
        return other_than_drops(plan)

    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        """Return the config with the smaller count under every spelling that it has."""
        return with_count(original, config, kept_in(plan))


def other_than_drops(plan: Plan) -> str | None:
    """Say what of a plan a smaller expert count does not say; None where it says what becomes of all slots."""
    if plan.only_drops:
        return None
    counts = sorted({len(layer.pool) for layer in plan.layers.values()})
    others = "" if all(layer.only_drops for layer in plan.layers.values()) else " and has stand-ins or remaps"
    return (
        "holds dropped slots only, the same number in every MoE layer; this plan keeps "
        f"{counts} experts in {len(plan.layers)} of {len(plan.model.stacks)} layers{others}"
    )


def kept_in(plan: Plan) -> int | None:
    """Return the experts that stay in each layer of such a plan; None where no layer changes."""
    return len(next(iter(plan.layers.values())).pool) if plan.layers else None


def with_count(original: dict, config: Any, count: int | None) -> dict:
    """Return config.json with another expert count, see `Format.config`; as it is for None."""
    if count is None:
        return original
    names = family.expert_count_spellings(original) or family.expert_count_spellings(config)[:1]
    return original | dict.fromkeys(names, count)
