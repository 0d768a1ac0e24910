"""Packed: an expert that stays in few bits, its matrices as integers or as codes of tables, in groups.

A plan names the width of each expert that it keeps in few bits, whatever stands behind the slots (`LayerPlan.widths`);
slots whose expert is one of these have this answer in config.json. Experts of one width are a class: they lie together,
and the running model turns few of them into numbers at a time.

Shapes: n experts of a class, T tokens, P pairs, D model width, F expert width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.products import Pairs, grouped, joined_gates
from moetailor.checkpoint.devices import formed
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.storage import (
    WEIGHTS,
    BlockFloat8,
    Codebook,
    FewBits,
    Float8,
    Integers,
    MxFloat4,
    NvFloat4,
    TensorSpec,
)
from moetailor.errors import PlanError
from moetailor.schema import Within

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap

# In pictures: the fewer bits, the lighter.
SHADES = dict(
    zip(range(8, 0, -1), "#08306b #08519c #2171b5 #4292c6 #6baed6 #9ecae1 #c6dbef #deebf7".split(), strict=True)
)
# Bits that say that weights lie as numbers of the experts' dtype.
NUMBERS = 16
# What codes are, see `Width`.
Kind = Literal["uint", "int", "vq", "fp8", "fp8b128", "mxfp4", "nvfp4"]
# Floats: each kind has one number of bits and one way to share scales.
FLOATS = {storage.name: storage for storage in (Float8(), BlockFloat8(), MxFloat4(), NvFloat4())}
# What is said of each but the default beside its bits.
WORDS = {"uint": "", "int": ", symmetric", "vq": ", vq", "fp8": ", floats", "fp8b128": ", floats in blocks"}
WORDS |= {"mxfp4": ", MXFP4", "nvfp4": ", NVFP4"}
# The most bits that codebooks have: wider matrices lie as integers.
VQ_BITS = max(WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Width:
    """How an expert lies in few bits.

    Attributes:
        bits: of a weight of the gate and up projections; 16 where all matrices lie as numbers: experts that were
            computed anew, where the others lie as the codes of a quantized original.
        down: of a weight of the down projection; `bits` when 0.
        group: inputs that share a scale, at most; widths are cut into the fewest groups, as equal as they can be.
        codes: what they are: integers with zero points or around zero, for matrices in 1 to 4 bits codes of tables,
            each of several weights, beside integers with zero points, or floats: of 8 bits with a scale for each row or
            for each block of 128 x 128, of 4 bits as MXFP4 or NVFP4.
    """

    bits: Annotated[int, Within(1, NUMBERS)]
    down: Annotated[int, Within(0, 8)] = 0
    group: Annotated[int, Within(1, 2**16)] = 128
    codes: Kind = "uint"

    def __post_init__(self) -> None:
        both = (self.bits, self.down or self.bits)
        if self.whole and not self.down and self.codes == "uint":
            return
        if self.codes == "vq" and not 1 <= self.bits <= VQ_BITS:
            raise PlanError(f"vq{self.bits}: codebooks have 1 to {VQ_BITS} bits of gate and up")
        if self.codes in FLOATS:
            bits = FLOATS[self.codes].bits
            if both != (bits, bits) or self.group != Width.group:
                told = f"say bits={bits}, and neither down nor group"
                raise PlanError(f"{self.codes} has {bits} bits and groups of its own: {told}")
        for bits in both:
            if not 2 - (self.codes == "vq") <= bits <= 8:
                more = "; codebooks have 1, as vq1" if bits == 1 else ""
                raise PlanError(f"{bits} bit{'s' * (bits != 1)}: there are 2 to 8{more}")

    @property
    def whole(self) -> bool:
        """Whether weights lie as numbers."""
        return self.bits == NUMBERS

    @classmethod
    def parse(cls, text: str | int) -> Width:
        """Read ``4``, ``4/6`` where the down projection has other bits, ``int4g32``, or ``vq2/4`` and ``vq2g64``.

        Raises:
            PlanError: not such bits.
        """
        text = str(text).strip()
        kind: Any = text
        if match := re.fullmatch(r"([2-8])(?:/([2-8]))?", text):
            return cls(bits=int(match[1]), down=int(match[2] or 0))
        if match := re.fullmatch(r"(uint|int|vq)([1-8])(?:/([1-8]))?(?:g([1-9]\d{0,4}))?", text):
            kind = match[1]
            try:
                return cls(bits=int(match[2]), down=int(match[3] or 0), group=int(match[4] or cls.group), codes=kind)
            except PlanError as error:
                raise PlanError(f"--bits {text}: {error}") from None
        if text in FLOATS:
            return cls(bits=FLOATS[text].bits, codes=kind)
        raise PlanError(
            f"--bits {text}: write 2 to 8, or as 4/6 with those of the down projection, or as int4g32: symmetric, in "
            f"groups of 32 (uint4g32 with zero points), as vq2 or vq2/4: 1 to {VQ_BITS} bits from codebooks, or "
            f"{', '.join(FLOATS)}: floats"
        )

    def storages(self, shape: ExpertShape) -> dict[str, FewBits]:
        """Return how each matrix lies that lies in few bits.

        Args:
            shape: the layer's experts.
        """
        if self.whole:
            return {}
        bits = {name: self.down or self.bits if name == "down" else self.bits for name in shape.matrices}
        return {name: self._storage(b) for name, b in bits.items()}

    def _storage(self, bits: int) -> FewBits:
        if self.codes in FLOATS:
            return FLOATS[self.codes]
        if self.codes == "vq" and bits <= VQ_BITS:
            return Codebook(bits=bits, group=self.group)
        return Integers(bits=bits, group=self.group, symmetric=self.codes == "int")

    @property
    def width(self) -> Width:
        """The width alone."""
        return Width(bits=self.bits, down=self.down, group=self.group, codes=self.codes)

    @property
    def stem(self) -> str:
        """The start of the names of the tensors of this width."""
        bits = f"{self.codes}{self.bits}_{self.down or self.bits}_g{self.group}"
        return "packed_whole" if self.whole else f"packed_{self.codes if self.codes in FLOATS else bits}"

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        if self.codes in FLOATS:
            return self.codes
        bits = f"{self.bits}/{self.down}" if self.down else str(self.bits)
        plain = self.codes == Width.codes and self.group == Width.group
        return bits if plain else f"{self.codes}{bits}g{self.group}"

    def __str__(self) -> str:
        if self.whole:
            return "16 bits"
        alike = self.down in (0, self.bits)
        bits = f"{self.bits} bit{'s' * (self.bits > 1)}" if alike else f"{self.bits}/{self.down} bits"
        return bits + WORDS[self.codes]


WHOLE = Width(bits=NUMBERS)


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
        experts = Experts(module)
        at_once = max(4 * formed(call.hidden_TD.device) // math.prod(experts.shape.matrices["down"]), 1)
        for width in module.slots.packed:
            row_TK, gate_TK = joined_gates(call.of_slots(getattr(module, f"{width.stem}_row")), call.gate_TK)
            pairs = Pairs.of(row_TK, gate_TK)
            if len(pairs):
                x_PD = call.hidden_TD[pairs.token]
                if at_once > 1 and pairs.live is None:
                    given_PD = _several(experts, width.stem, x_PD, pairs.number, at_once)
                else:
                    given_PD = _one_by_one(experts, width.stem, x_PD, pairs)
                out_TD = pairs.added(out_TD, given_PD * pairs.gate)
        return out_TD


def _one_by_one(experts: Experts, stem: str, x_PD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the outputs of some experts of a class, one at a time, [P, D].

    Args:
        experts: the compressed ones.
        stem: of the class.
        x_PD: inputs, sorted by expert.
        pairs: with their experts; in a graph, which cannot know these, each is looked up and runs alone.
    """
    module, found, ones = experts.module, [], [1] * len(x_PD)
    places: Sequence[torch.Tensor | slice] = pairs.number.split(1)
    if pairs.live is None:
        hit, count = pairs.number.unique_consecutive(return_counts=True)
        places, ones = [slice(row, row + 1) for row in hit.tolist()], count.tolist()
    for rows, x in zip(places, x_PD.split(ones), strict=True):

        def given(part: str, inputs: torch.Tensor, rows: torch.Tensor | slice = rows) -> torch.Tensor:
            product = module.product(f"{stem}_{part}", inputs[None], rows)[0]
            return product + module.tensor(f"{stem}_{part}_bias", rows) if experts.shape.biased else product

        found.append(given("down", experts.activated([given(part, x) for part in experts.inputs])).to(x))
    return torch.cat(found)


def _several(experts: Experts, stem: str, x_PD: torch.Tensor, number_P: torch.Tensor, at_once: int) -> torch.Tensor:
    """Return the same where experts are small: some at a time are turned into numbers, and run grouped.

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
