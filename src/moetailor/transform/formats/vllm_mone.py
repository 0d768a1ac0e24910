"""vLLM's MoNE layout: constants in place of some experts, as vLLM loads them since 0.33 without a plug-in."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from moetailor.answers import Constant
from moetailor.checkpoint.layout import DiskStack
from moetailor.checkpoint.mone import ENTRY, VALUE
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.writer import Piece, rows
from moetailor.errors import PlanError
from moetailor.planning.plan import Plan
from moetailor.transform.formats.format import Format
from moetailor.transform.pieces import Parts, shards_of


class VllmMone(Format):
    """What vLLM calls expert substitution: the original with vectors in place of some experts."""

    name = "vllm-mone"
    loading = (
        "Loads in vLLM since 0.33, without a plug-in; not with expert or data parallelism, EPLB or LoRA on experts."
    )

    def refusal(self, plan: Plan) -> str | None:
        """Refuse all but kept experts as they lie and constants, and layers without an expert."""
        for prefix, layer in plan.layers.items():
            if layer.widths:
                told = ", ".join(sorted(map(str, layer.packed)))
                return f"holds experts as they lie, vLLM takes no quantized ones beside constants; {prefix} has {told}"
            for slot, answer in enumerate(layer.slots):
                if answer.drops or not (isinstance(answer, Constant) or answer.is_native(slot)):
                    told = f"slot {slot} of {prefix} is {answer.describe()}"
                    return f"holds kept experts and constants, and the router as it was; {told}"
            if not layer.pool:
                return f"holds at least one expert in each layer; {prefix} keeps none"
        return None

    def check(self, plan: Plan, original: Original) -> None:
        """Refuse originals whose experts lie fused or as codes, or in a place that vLLM does not find.

        Raises:
            PlanError: see the message.
        """
        for prefix in plan.layers:
            stack = original.stacks[prefix]
            if stack.lies != "plain":
                raise PlanError(
                    f"format {self.name}: vLLM takes no quantized experts beside constants, and those of {prefix} are "
                    f"{stack.lies}; use --format moetailor"
                )
            if stack.fused:
                raise PlanError(
                    f"format {self.name}: vLLM reads experts one by one here, and {min(stack.fused)!r} holds all of a "
                    "layer's; use --format moetailor"
                )
            if (path := _path(stack)) is None or sum(part.isdigit() for part in path.split(".")) != 1:
                raise PlanError(
                    f"format {self.name}: vLLM finds the layer by the one number in the names of its experts, such as "
                    f"{min(stack.experts)!r}; use --format moetailor"
                )

    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        """Return the config with the experts of each layer that are constants."""
        layers = {str(index): list(layer.of(Constant)) for index, layer in sorted(plan.by_layer.items())}
        return original | {ENTRY: {index: slots for index, slots in layers.items() if slots}}

    def shards(self, parts: Parts) -> list[list[Piece]]:
        """Return kept experts under the numbers that they had, and a vector for each constant."""
        names = {}
        for prefix, layer in parts.plan.layers.items():
            stack = parts.stacks[prefix]
            for name, expert in stack.experts.items():
                if expert in layer.plain:
                    names[stack.renamed(name, layer.plain.index(expert))] = name
        return [
            [replace(piece, name=names.get(piece.name, piece.name)) for piece in shard]
            for shard in shards_of(parts, _vectors)
        ]


def _path(stack: DiskStack) -> str | None:
    """Return the path on disk under which a layer's experts have their numbers."""
    match = re.match(r"(.*\bexperts)\.\d+\.", min(stack.experts))
    return match[1] if match else None


def _vectors(parts: Parts, stack: DiskStack) -> list[Piece]:
    """Return the constants of a layer, a tensor each."""
    assert stack.index is not None
    info = parts.added[stack.index]["constant"]
    return [
        replace(rows(info, 0, [row]), name=f"{_path(stack)}.{slot}.{VALUE}", shape=info.shape[1:])
        for row, slot in enumerate(parts.plan.layers[stack.prefix].of(Constant))
    ]
