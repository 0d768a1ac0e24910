"""Narrow: an ordinary checkpoint whose experts have fewer neurons; config.json says how many."""

from __future__ import annotations

import warnings

import torch

from moetailor.answers import Narrow
from moetailor.answers.narrow import cut
from moetailor.answers.products import ALIGNMENT
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.width import width_entry
from moetailor.errors import CheckpointError, MoetailorWarning, PlanError
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan, stored_nbytes
from moetailor.transform.formats.expanded import Expanded
from moetailor.transform.formats.format import Finish


class Narrower(Expanded):
    """The original's own form, with another width of experts."""

    name = "narrow"
    also = "native"
    automatic = True
    loading = "An ordinary checkpoint: it loads wherever the original does."

    def refusal(self, plan: Plan) -> str | None:
        """Refuse all but experts of one width in all layers, and models whose config cannot say it."""
        if plan.model.one_width:
            return f"cannot say how wide experts are: {plan.model.one_width}"
        widths: set[int | None] = {None} if len(plan.layers) < len(plan.model.stacks) else set()
        for prefix, layer in plan.layers.items():
            narrow = layer.of(Narrow)
            other = next((slot for slot in layer.kept_slots if slot not in narrow), None)
            if other is not None:
                told = f"slot {other} of {prefix} is {layer.slots[other].describe()}"
                return f"holds experts with fewer neurons and dropped slots only; {told}"
            widths |= {answer.neurons for answer in narrow.values()}
        if len(widths) != 1 or None in widths:
            found = sorted(width for width in widths if width is not None)
            told = f"{found} neurons in {len(plan.layers)} of {len(plan.model.stacks)} layers"
            return f"holds experts of one width in all MoE layers; this plan leaves {told}"
        return super().refusal(plan)

    def check(self, plan: Plan, original: Original) -> None:
        """Refuse quantized originals, and those whose config has no entry for the width of experts alone.

        Raises:
            PlanError: see the message.
        """
        super().check(plan, original)
        _entry(original, neurons := _neurons(plan))
        if neurons % ALIGNMENT:
            told = f"{neurons} neurons are no multiple of {ALIGNMENT}, which grouped products ask for in 16 bits"
            cure = "load the result with experts_implementation='eager'"
            warnings.warn(f"format {self.name}: {told}: {cure}", MoetailorWarning, stacklevel=4)

    def finished_nbytes(self, plan: Plan) -> int:
        """Return the bytes of the compressed form: the same numbers under other names."""
        return plan.nbytes

    def laid_nbytes(self, layer: LayerPlan, stack: Stack) -> int:
        """Return the bytes of a layer's experts written out."""
        return stored_nbytes(layer, stack)

    def ordinary(self, config: dict, finish: Finish) -> dict:
        """Return the config with the counts and the width of the experts."""
        neurons = _neurons(finish.plan)
        return super().ordinary(config, finish) | {_entry(finish.original, neurons): neurons}

    def laid(self, experts: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
        """Return the experts of a layer without the neurons that are gone."""
        return cut(experts, slice(_neurons(plan)))


def _neurons(plan: Plan) -> int:
    layer = next(iter(plan.layers.values()))
    return next(iter(layer.of(Narrow).values())).neurons


def _entry(original: Original, neurons: int) -> str:
    try:
        return width_entry(original.config, original.skeleton.model, original.anatomy, neurons)
    except CheckpointError as error:
        raise PlanError(f"format narrow: {original.source}: {error}; use --format moetailor") from None
