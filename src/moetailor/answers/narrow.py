"""Narrow: a slot's own expert with some of its neurons only: rows of gate and up with their columns of down.

Shapes: n narrow experts, F their neurons, D model width, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch.nn.functional import pad

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.products import ALIGNMENT, Pairs, grouped
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import PlanError
from moetailor.schema import Within

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap


@dataclass(frozen=True)
class Narrow(Answer):
    """The slot's own expert with fewer neurons, as many in all of a layer.

    Tensors: ``narrow_<matrix or bias>`` [n, ...], as those of an expert of that width.

    Attributes:
        neurons: how many are left.
    """

    neurons: Annotated[int, Within(1)]

    kind = "narrow"
    letter = "n"
    label = "kept, narrower"
    color = "#66c2a5"
    alike = True
    beside = True
    expands = True

    @classmethod
    def standing_for(cls, other: int) -> Narrow:
        """Return an expert of one neuron."""
        return cls(1)

    def expert(self, slot: int) -> int:
        """Return the slot's own expert: it stays."""
        return slot

    def describe(self) -> str:
        """Say how many neurons there are."""
        return f"{self.label}: {self.neurons} neuron{'s' * (self.neurons > 1)}"

    def check(self, slot: int, context: Context) -> None:
        """Refuse as many neurons as the expert has, and slots that other experts of the layer answer."""
        shape = context.stack.shape if context.stack else None
        if shape is not None and self.neurons >= shape.intermediate:
            raise PlanError(
                f"{context.where}: slot {slot} is to have {self.neurons} neurons, its expert has {shape.intermediate}; "
                "keep fewer, or keep it as it is"
            )
        if any(other != self and other.expert(number) is not None for number, other in enumerate(context.slots)):
            raise PlanError(
                f"{context.where}: beside experts of {self.neurons} neurons others are wider; all that stay in a layer "
                "have one width"
            )

    def weights(self, module: Any, slot: int) -> dict[str, torch.Tensor]:
        """Return the expert with neurons that give nothing in place of those that are gone."""
        row, gone = list(module.slots.of(Narrow)).index(slot), Experts(module).shape.intermediate - self.neurons
        found = {name: module.tensor(f"narrow_{name}")[row] for name in Experts(module).shape.tensors}
        # the axes of neurons: rows of gate and up and their biases, columns of down
        sides = {name: (0, gone) if name in ("down", "gate_bias", "up_bias") else (0, 0, 0, gone) for name in found}
        return {name: part if name == "down_bias" else pad(part, sides[name]) for name, part in found.items()}

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the matrices and biases."""
        answers = list(slots.of(cls).values())
        narrow = replace(shape, intermediate=answers[0].neurons)
        return {f"narrow_{name}": TensorSpec(shape=(len(answers), *size)) for name, size in narrow.tensors.items()}

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return ``narrow_slot``: the narrow expert of each slot, -1 for none."""
        return {"narrow_slot": slots.numbered(slots.of(cls))}

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add the gated outputs."""
        pairs, experts = Pairs.of(call.of_slots(module.narrow_slot), call.gate_TK), Experts(module)
        if not len(pairs):
            return out_TD

        def given(part: str, inputs: torch.Tensor) -> torch.Tensor:
            bias = module.tensor(f"narrow_{part}_bias") if experts.shape.biased else None
            weight, short = module.tensor(f"narrow_{part}"), -inputs.shape[1] % ALIGNMENT
            if short:  # grouped kernels want rows of a multiple of 16 bytes
                inputs, weight = pad(inputs, (0, short)), pad(weight, (0, short))
            return grouped(inputs, weight, pairs.number, bias)

        x_PD = call.hidden_TD[pairs.token]
        inner = experts.activated([given(part, x_PD) for part in experts.inputs])
        return pairs.added(out_TD, given("down", inner) * pairs.gate)


def cut(matrices: Mapping[str, torch.Tensor], kept: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Return the matrices and biases of an expert, or stacks of them, with some of its neurons only.

    Args:
        matrices: as `Experts` names them.
        kept: the neurons.
    """
    found = dict(matrices)
    for name, matrix in matrices.items():
        if name in ("gate", "up"):
            found[name] = matrix[..., kept, :]
        elif name != "down_bias":
            found[name] = matrix[..., kept]
    return found
