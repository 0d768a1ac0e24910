"""Packed: an expert that stays in few bits, its matrices as integers or as codes of tables, in groups.

A plan names the width of each expert that it keeps in few bits, whatever stands behind the slots (`LayerPlan.widths`);
slots whose expert is one of these have this answer in config.json. Experts of one width are a class: they lie together,
and the running model turns few of them into numbers at a time.

Shapes: n experts of a class, T tokens, P pairs, D model width, F expert width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.products import FEW_PAIRS, Pairs, grouped, joined_gates
from moetailor.answers.width import Width
from moetailor.checkpoint.devices import formed, runs_compiled, runs_kernels
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.checkpoint.storage.few_bits import FEW
from moetailor.errors import PlanError

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap

# In pictures: the fewer bits, the lighter.
SHADES = dict(
    zip(range(8, 0, -1), "#08306b #08519c #2171b5 #4292c6 #6baed6 #9ecae1 #c6dbef #deebf7".split(), strict=True)
)


@dataclass(frozen=True, kw_only=True)
class Packed(Width, Answer):
    """An expert in few bits: in config.json the answer of each slot whose row of the pool lies so.

    Tensors, for the experts of one width: ``<stem>_<matrix>`` [n, ...] as integers and ``<stem>_<bias>`` plain.
    """

    kind = "packed"
    letter = "4"
    label = "kept in few bits"
    color = "#5f6f80"
    from_method = False
    expands = True
    beside = True

    @property
    def mark(self) -> str:
        """The bits of its gate and up projections."""
        return str(self.bits)

    @classmethod
    def marks(cls) -> dict[str, tuple[str, str]]:
        """Return a digit for each number of bits."""
        return {str(bits): (f"kept in {bits} bits", shade) for bits, shade in SHADES.items()}

    @classmethod
    def of(cls, width: Width) -> Packed:
        """Return the answer of a width."""
        return cls(**vars(width.width))

    def expert(self, slot: int) -> int:
        """Return the slot's own expert: some row of the pool it is."""
        return slot

    def describe(self) -> str:
        """Name the width."""
        return f"kept in {Width.__str__(self)}"

    def check(self, slot: int, context: Context) -> None:
        """Refuse it in a plan."""
        raise PlanError(f"{context.where}: slot {slot} is packed; keep its expert, and say its bits in `widths`")

    def weights(self, module: Any, slot: int) -> dict[str, torch.Tensor]:
        """Return the numbers of the expert behind a slot."""
        row = module.slots.packed[self.width][slot]
        names = Experts(module).shape.tensors
        return {name: module.tensor(f"{self.stem}_{name}", slice(row, row + 1))[0] for name in names}

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the matrices, and biases where there are some, of each class."""
        found = {}
        for width, rows in slots.packed.items():
            count, storages = len(set(rows.values())), width.storages(shape)
            for name, size in shape.tensors.items():
                storage = storages[name].name if name in storages else "plain"
                found[f"{width.stem}_{name}"] = TensorSpec(shape=(count, *size), storage=storage, trainable=False)
        return found

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return for each class the row of each slot, -1 for none."""
        found = {}
        for width, rows in slots.packed.items():
            row = torch.full((len(slots.answers),), -1, dtype=torch.int32)
            row[list(rows)] = torch.tensor(list(rows.values()), dtype=torch.int32)
            found[f"{width.stem}_row"] = row
        return found

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add the gated outputs, a class at a time; slots with one expert run it once for a token."""
        experts, hidden_TD = Experts(module), call.hidden_TD
        few = len(hidden_TD) <= FEW and runs_compiled(hidden_TD) and call.listed is not None
        if few:
            out_TD = _together(experts, call, out_TD)
        classes = {width: rows for width, rows in module.slots.packed.items() if width.whole or not few}
        at_once = max(formed(hidden_TD.device) // math.prod(experts.shape.matrices["down"]), 1) if classes else 1
        for width, rows in classes.items():
            row_TK, gate_TK = call.of_slots(getattr(module, f"{width.stem}_row")), call.gate_TK
            if len({*rows.values()}) < len(rows):
                row_TK, gate_TK = joined_gates(row_TK, gate_TK)
            if not width.whole and row_TK.numel() <= FEW_PAIRS and runs_kernels(hidden_TD):
                out_TD.add_(_by_kernels(experts, width.stem, hidden_TD, row_TK, gate_TK))
                continue
            pairs = Pairs.of(row_TK, gate_TK)
            if not len(pairs):
                continue
            if at_once > 1 and pairs.live is None:
                x_PD = hidden_TD.index_select(0, pairs.token)
                out_TD = pairs.added(out_TD, _several(experts, width.stem, x_PD, pairs.number, at_once) * pairs.gate)
                continue
            for each in pairs.by_number():
                out_TD = each.added(out_TD, _alone(experts, width.stem, hidden_TD, each) * each.gate)
        return out_TD


def _together(experts: Experts, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
    """Return an output to which is added what few tokens get of all classes that are to lie as they do.

    Args:
        experts: the compressed ones.
        call: what they are called with.
        out_TD: the output so far.
    """
    gates = call.gates(experts.module.slots.in_bits)
    if not gates:
        return out_TD
    counts = Counter(stem for (stem, _), _ in gates)
    pairs = Pairs.listed([(number, token) for (_, number), token in gates], gates.values(), out_TD.dtype)
    given_PD = _as_they_lie(experts, counts, call.hidden_TD[pairs.token], pairs.number)
    return pairs.added(out_TD, given_PD * pairs.gate)


def _by_kernels(
    experts: Experts, stem: str, hidden_TD: torch.Tensor, number_TK: torch.Tensor, gate_TK: torch.Tensor
) -> torch.Tensor:
    """Return the gated outputs of a class for a few tokens, float32 [T, D].

    Slots that stand for nothing cost nothing in a kernel, so that no shape depends on what the router chose: the device
    is never waited for, and graphs hold for all tokens.

    Args:
        experts: the compressed ones.
        stem: of the class.
        hidden_TD: inputs.
        number_TK: the expert of each slot, negative for none.
        gate_TK: the gates.
    """
    number_P = number_TK.flatten()
    x_PD = hidden_TD.repeat_interleave(number_TK.shape[1], 0)
    given_PD = _as_they_lie(experts, {stem: len(x_PD)}, x_PD, number_P)
    given_PD = given_PD.masked_fill(number_P[:, None] < 0, 0) * gate_TK.flatten()[:, None]
    return given_PD.unflatten(0, number_TK.shape).sum(1)


def _as_they_lie(
    experts: Experts, counts: Mapping[str, int], x_PD: torch.Tensor, number_P: torch.Tensor
) -> torch.Tensor:
    """Return the outputs of experts, float32 [P, D], with their codes as they lie: no weight becomes a number.

    Args:
        experts: the compressed ones.
        counts: inputs of each class that has some, by its stem, in their order.
        x_PD: inputs, those of one expert next to each other where loops run.
        number_P: the expert of each in its class; negative for none where kernels run.
    """
    module, biased = experts.module, experts.shape.biased

    def given(part: str, inputs: torch.Tensor) -> torch.Tensor:
        product = module.picked({f"{stem}_{part}": count for stem, count in counts.items()}, inputs, number_P)
        if not biased:
            return product
        each = zip(counts, number_P.clamp_min(0).split([*counts.values()]), strict=True)
        return product + torch.cat([module.tensor(f"{stem}_{part}_bias")[number] for stem, number in each])

    return given("down", experts.activated([given(part, x_PD) for part in experts.inputs]).to(x_PD))


def _alone(experts: Experts, stem: str, hidden_TD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the outputs of one expert of a class, [P, D].

    Args:
        experts: the compressed ones.
        stem: of the class.
        hidden_TD: inputs.
        pairs: of the expert; in a graph, which cannot know it, it is looked up.
    """
    module, rows = experts.module, pairs.number[:1]
    x_PD = hidden_TD.index_select(0, pairs.token)
    if pairs.live is None:
        row = int(rows)
        rows = slice(row, row + 1)

    def given(part: str, inputs: torch.Tensor) -> torch.Tensor:
        product = module.product(f"{stem}_{part}", inputs[None], rows)[0]
        return product + module.tensor(f"{stem}_{part}_bias", rows) if experts.shape.biased else product

    given_PD = given("down", experts.activated([given(part, x_PD) for part in experts.inputs]).to(x_PD))
    return given_PD.to(x_PD).contiguous()  # outputs in columns would be added slowly


def _several(experts: Experts, stem: str, x_PD: torch.Tensor, number_P: torch.Tensor, at_once: int) -> torch.Tensor:
    """Return the same where experts are small and tokens many: some at a time are turned into numbers, and run grouped.

    Args:
        experts: the compressed ones.
        stem: of the class.
        x_PD: inputs, sorted by expert.
        number_P: the expert of each.
        at_once: experts that are numbers at the same time.
    """
    module, found = experts.module, []
    hit, place_P = number_P.unique_consecutive(return_inverse=True)
    counts = (place_P // at_once).bincount().tolist()
    parts = (each.split(counts) for each in (x_PD, place_P % at_once))
    for rows, x, place in zip(hit.split(at_once), *parts, strict=True):

        def given(part: str, inputs: torch.Tensor, rows: Any = rows, place: torch.Tensor = place) -> torch.Tensor:
            bias = module.tensor(f"{stem}_{part}_bias", rows) if experts.shape.biased else None
            return grouped(inputs, module.tensor(f"{stem}_{part}", rows).to(inputs.dtype), place, bias)

        found.append(given("down", experts.activated([given(part, x) for part in experts.inputs])))
    return torch.cat(found)
