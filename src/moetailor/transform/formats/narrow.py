"""Narrow: an ordinary checkpoint whose experts have fewer neurons; config.json says how many."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from moetailor.answers import Narrow
from moetailor.answers.narrow import cut
from moetailor.checkpoint.anatomy import build_skeleton, tensors_of
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.original import Original
from moetailor.errors import PlanError
from moetailor.planning.plan import Plan
from moetailor.transform.formats.expanded import Expanded
from moetailor.transform.formats.format import Finish


class Narrower(Expanded):
    """The original's own form, with another width of experts."""

    name = "narrow"
    automatic = True
    loading = "An ordinary checkpoint: it loads wherever the original does."

    def refusal(self, plan: Plan) -> str | None:
        """Refuse all but experts of one width in all layers."""
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
        width_entry(original, _neurons(plan))

    def room(self, plan: Plan, finish: Finish) -> int:
        """Return the bytes of the compressed form and of the ordinary one."""
        return 2 * plan.nbytes

    def ordinary(self, config: dict, finish: Finish) -> dict:
        """Return the config with the counts and the width of the experts."""
        neurons = _neurons(finish.plan)
        return super().ordinary(config, finish) | {width_entry(finish.original, neurons): neurons}

    def laid(self, experts: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
        """Return the experts of a layer without the neurons that are gone."""
        return cut(experts, slice(_neurons(plan)))


def _neurons(plan: Plan) -> int:
    layer = next(iter(plan.layers.values()))
    return next(iter(layer.of(Narrow).values())).neurons


def width_entry(original: Original, neurons: int) -> str:
    """Return the entry of config.json that gives experts another width and changes nothing else.

    Nothing of this is declared: the model is built without weights for each entry that is the width, and compared.

    Args:
        original: the opened checkpoint.
        neurons: the width.

    Raises:
        PlanError: there is none.
    """
    config, model, layers = original.config, original.skeleton.model, original.anatomy.layers.values()
    sizes = {layer.expert_shape.intermediate for layer in layers}
    of_experts = {f"{layer.experts}.{name}" for layer in layers for name in layer.expert_rows}
    shapes = {name: tensor.shape for name, tensor in tensors_of(model).items() if name not in of_experts}
    told = "none is that width"
    for name in sorted(name for name, value in config.to_dict().items() if type(value) is int and {value} == sizes):
        if (other := _built(config, name, neurons, model)) is None:
            continue
        found = [Experts(other.get_submodule(layer.experts)).shape for layer in layers]
        wanted = [replace(layer.expert_shape, intermediate=neurons) for layer in layers]
        changed = [key for key, tensor in tensors_of(other).items() if tensor.shape != shapes.get(key, tensor.shape)]
        if found == wanted and not changed:
            return name
        if any(shape.intermediate == neurons for shape in found):
            told = f"{name} is also the size of {min(changed)}" if changed else f"{name} is that of some layers"
    raise PlanError(
        f"format narrow: {original.source}: config.json of {config.model_type!r} has no entry for the width of experts "
        f"alone: {told}; use --format moetailor"
    )


def _built(config: Any, name: str, value: int, model: Any) -> Any:
    """Return the model without weights with another value of an entry; None where none can be built."""
    other = copy.deepcopy(config)
    try:
        setattr(other, name, value)
        return build_skeleton(other, torch.float32, of=type(model))
    except Exception:  # whatever the family's code makes of a number that was meant for something else
        return None
