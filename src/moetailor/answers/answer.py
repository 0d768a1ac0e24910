"""What a kind of answer declares. Bytes, room in the model, names on disk, checks, training, pictures follow from it.

Shapes: T tokens, K slots of a token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from moetailor.checkpoint.devices import runs_compiled
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.storage import TensorSpec

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap

ANSWERS: dict[str, type[Answer]] = {}
# Choices of which a list is made: four tokens of up to 32.
LISTED = 128


@dataclass(frozen=True)
class Answer:
    """What stands behind one slot of a layer. Fields of a kind are what plan.json says of it; they are plain values.

    Attributes:
        kind: its name in plan.json and config.json, and the start of the names of its tensors and buffers.
        letter: one character for it in maps of slots, unless it has several `marks`.
        label: it in a few words.
        color: of its letter and its place in maps.
        drops: whether the slot goes: the router's rows too.
        rebuilds: whether the weights in the place of `expert` are computed anew.
        refers: the field that names another expert of the layer, if any.
        from_method: whether its tensors, if it has any, are computed by the plan's method.
        expands: whether an ordinary expert gives the same, see `weights`.
        alike: whether an ordinary checkpoint holds it only where all layers have it alike.
        beside: whether its expert stays, in tensors of its own and not as a row of the family's parameters.
    """

    kind: ClassVar[str]
    letter: ClassVar[str]
    label: ClassVar[str]
    color: ClassVar[str]
    drops: ClassVar[bool] = False
    rebuilds: ClassVar[bool] = False
    refers: ClassVar[str] = ""
    from_method: ClassVar[bool] = True
    expands: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    beside: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        assert cls.kind not in ANSWERS, f"answer {cls.kind} is registered twice"
        ANSWERS[cls.kind] = cls

    @classmethod
    def standing_for(cls, other: int) -> Answer:
        """Return the answer of this kind for a slot whose expert goes while `other` stays: for counts and bytes."""
        return cls(**({cls.refers: other} if cls.refers else {}))

    @property
    def mark(self) -> str:
        """Its character in maps of slots, one of `marks`."""
        return self.letter

    @classmethod
    def marks(cls) -> dict[str, tuple[str, str]]:
        """Return what each character in maps stands for: words, and a color."""
        return {cls.letter: (cls.label, cls.color)}

    @property
    def scale(self) -> float:
        """Factor on the slot's gate."""
        return 1.0

    def expert(self, slot: int) -> int | None:
        """Return the expert of this layer whose place in the pool it needs, if any.

        Args:
            slot: the slot behind which it stands.
        """
        return None

    def lender(self) -> int | None:
        """Return the decoder layer whose experts module it asks, if any."""
        return None

    def running(self, top_k: int) -> int:
        """Return how many slots of a token run where it stands.

        Args:
            top_k: slots that the router chooses.
        """
        return top_k

    def is_native(self, slot: int) -> bool:
        """Say whether an ordinary checkpoint with fewer experts can hold it behind a slot."""
        return False

    def describe(self) -> str:
        """Return it in words, with its fields."""
        return self.label

    def check(self, slot: int, context: Context) -> None:
        """Refuse what cannot be behind a slot.

        Raises:
            PlanError: see the message.
        """

    def weights(self, module: Any, slot: int) -> dict[str, torch.Tensor]:
        """Return the matrices and biases of the expert that gives what a slot gives; where the row is not all.

        Args:
            module: the compressed experts, with weights.
            slot: the slot, in the order of those that are left.
        """
        raise NotImplementedError(f"no expert gives what {self.kind} gives")

    def placed(self, slot_of: Callable[[int, int], int]) -> Answer | None:
        """Return what the running model knows of it; None when the row of the pool is all.

        Args:
            slot_of: (decoder layer, expert) -> the slot behind which that layer keeps the expert, in the order of the
                slots it has left.
        """
        return self

    @classmethod
    def whole_experts(cls, slots: SlotMap) -> int:
        """Return how many experts' worth of weights the answers of this kind store beside the pool."""
        return 0

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the tensors that are stored for the answers of this kind in a layer.

        Args:
            slots: the layer; `SlotMap.of` gives its answers of this kind.
            shape: its experts.
        """
        return {}

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return what follows from the map and the running model needs as tensors."""
        return {}

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with what the answers of this kind give.

        Args:
            module: the experts; `module.tensor(name)` gives a tensor of `tensors`, buffers are attributes.
            call: what they are called with.
            out_TD: the output so far, float32 at least, which nothing else holds: added to in place.
        """
        return out_TD


@dataclass(frozen=True, kw_only=True)
class Context:
    """The layer around an answer, for checks.

    Attributes:
        where: name of the layer in messages.
        slots: all its answers.
        top_k: slots of a token.
        stack: the layer on disk.
        other: decoder layer -> that layer on disk and its answers (None when it stays whole); None for no MoE layer.
    """

    where: str
    slots: Sequence[Answer]
    top_k: int
    stack: Stack | None = None
    other: Callable[[int], tuple[Stack, Sequence[Answer] | None] | None] = lambda layer: None


@dataclass
class Call:
    """One call of a layer's experts.

    Attributes:
        hidden_TD: their input.
        slot_TK: slots that the router chose.
        gate_TK: their gates.
        slots: how many there are to choose.
        listed: token, slot and gate of each choice where these are few, on a CPU: a list is gone through sooner than
            tensors are made. None of more, in graphs, where gates need gradients, and of slots that are not there.
    """

    hidden_TD: torch.Tensor
    slot_TK: torch.Tensor
    gate_TK: torch.Tensor
    slots: int
    listed: list[tuple[int, int, float]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not runs_compiled(self.gate_TK) or self.slot_TK.numel() > LISTED:
            return
        chosen = enumerate(zip(self.slot_TK.tolist(), self.gate_TK.tolist(), strict=True))
        listed = [(token, *pair) for token, both in chosen for pair in zip(*both, strict=True)]
        if all(0 <= slot < self.slots for _, slot, _ in listed):
            self.listed = listed

    def gates(self, numbers: Mapping[int, Any]) -> dict[tuple[Any, int], float]:
        """Return the gates of what is `listed` by what runs and the token, in their order; slots of one number add up.

        Args:
            numbers: of what slots run.
        """
        found: dict[tuple[Any, int], float] = {}
        for token, slot, gate in self.listed or ():
            if slot in numbers:
                pair = numbers[slot], token
                found[pair] = found.get(pair, 0.0) + gate
        return dict(sorted(found.items()))

    def of_slots(self, number_S: torch.Tensor) -> torch.Tensor:
        """Return the number of each chosen slot, [T, K].

        Args:
            number_S: the number of each slot.
        """
        return number_S[self.slot_TK].long()


def all_marks() -> dict[str, tuple[str, str]]:
    """Return what each character in maps of slots stands for, of every kind: words, and a color."""
    return {mark: shown for kind in ANSWERS.values() for mark, shown in kind.marks().items()}
