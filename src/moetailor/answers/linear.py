"""Linear: a constant and a linear map of low rank of the layer's input in place of an expert.

Shapes: n slots, T tokens, K slots of a token, R rows of all maps, r rank, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch.nn import functional as F

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.products import added_rows, weighted_rows
from moetailor.checkpoint.devices import runs_compiled
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import PlanError
from moetailor.schema import Within

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap


@dataclass(frozen=True)
class Linear(Answer):
    """An affine map of low rank: map n of rank r gives constant[n] + (in[a:a+r] @ x) @ out[b:b+r].

    b is the sum of the ranks before it, and a the same, or 0 where the input factor is shared.

    Tensors: ``linear_constant`` [n, D], ``linear_out`` [R, D], and ``linear_in`` of as many rows, or of the largest
    rank where it is shared; in 8 bits rows are matrices of one row, [R, 1, D].

    Attributes:
        rank: r.
        shared: whether the maps of the layer share their input factor: each takes its first rows.
        int8: whether both factors lie as integers of 8 bits with a scale for each row.
    """

    rank: Annotated[int, Within(1)]
    shared: bool = False
    int8: bool = False

    kind = "linear"
    letter = "l"
    label = "linear map"
    color = "#009e73"

    @classmethod
    def standing_for(cls, other: int) -> Linear:
        """Return a map of the least rank."""
        return cls(1)

    def describe(self) -> str:
        """Name the rank."""
        return f"linear of rank {self.rank}" + (", input shared" if self.shared else "") + (", int8" * self.int8)

    def check(self, slot: int, context: Context) -> None:
        """Refuse input factors of which only some are shared, or only some lie in 8 bits."""
        others = [other for other in context.slots if isinstance(other, Linear)]
        if any(other.shared != self.shared for other in others):
            raise PlanError(f"{context.where}: some linear maps share their input and some do not; make all alike")
        if any(other.int8 != self.int8 for other in others):
            raise PlanError(f"{context.where}: some linear maps lie in 8 bits and some do not; make all alike")

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the constants and both factors."""
        maps = list(slots.of(cls).values())
        ranks = [map.rank for map in maps]
        inputs = max(ranks) if maps[0].shared else sum(ranks)
        found = {"linear_constant": TensorSpec(shape=(len(ranks), shape.width))}
        for name, rows in (("linear_in", inputs), ("linear_out", sum(ranks))):
            if maps[0].int8:
                storage = f"int8g{shape.width}"
                found[name] = TensorSpec(shape=(rows, 1, shape.width), storage=storage, trainable=False)
            else:
                found[name] = TensorSpec(shape=(rows, shape.width))
        return found

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return the map of each slot (-1 for none), and the map and the row in ``linear_in`` of each row [R]."""
        maps = list(slots.of(cls).values())
        rank_n = torch.tensor([map.rank for map in maps])
        start_n = rank_n.cumsum(0) - rank_n
        owner_R = torch.arange(len(maps)).repeat_interleave(rank_n)
        row_R = torch.arange(len(owner_R))
        return {
            "linear_slot": slots.numbered(slots.of(cls)),
            "linear_owner": owner_R,
            "linear_input": row_R - start_n[owner_R] if maps[0].shared else row_R,
        }

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add g S(x) for each slot."""
        maps, constant = module.slots.of(cls), module.tensor("linear_constant")
        if call.listed is not None:
            gates = call.gates({slot: number for number, slot in enumerate(maps)})
            if len(gates) <= len(maps):
                added_rows(out_TD, constant, gates)
                return _chosen(module, list(maps.values()), call.hidden_TD, gates, out_TD)
        number_TK = call.of_slots(module.linear_slot)
        weight_TK = call.gate_TK.masked_fill(number_TK < 0, 0).to(constant.dtype)
        out_TD.add_(weighted_rows(constant, number_TK, weight_TK))
        # y_t = sum_R g_(t, owner of R) <x_t, in_R> out_R: two thin products over all maps of the layer.
        width, count = call.hidden_TD.shape[1], len(constant)
        inputs, outputs = (module.tensor(f"linear_{name}").view(-1, width) for name in ("in", "out"))
        gate_Tn = weight_TK.new_zeros(len(number_TK), count).scatter_add(1, number_TK.clamp_min(0), weight_TK)
        inner_TR = F.linear(call.hidden_TD, inputs)[:, module.linear_input]
        return out_TD.add_((inner_TR * gate_Tn[:, module.linear_owner]) @ outputs)


def _chosen(
    module: Any,
    maps: Sequence[Linear],
    hidden_TD: torch.Tensor,
    gates: Mapping[tuple[int, int], float],
    out_TD: torch.Tensor,
) -> torch.Tensor:
    """Add the products of single maps: as in decoding, where only the rows of those that are chosen are read.

    Args:
        module: the experts.
        maps: all of the layer.
        hidden_TD: inputs.
        gates: by map and token.
        out_TD: the output so far.
    """
    starts = [0, *accumulate(map.rank for map in maps)]
    pairs = [(token, 0 if maps[n].shared else starts[n], starts[n], maps[n].rank) for n, token in gates]
    factors = [module.parts(f"linear_{name}") for name in ("in", "out")]
    if runs_compiled(hidden_TD) and pairs:
        from moetailor.checkpoint.storage import plain_products  # numba takes half a second

        if plain_products.takes_factors(factors, out_TD):
            plain_products.add_maps(factors, hidden_TD, pairs, gates.values(), out_TD)
            return out_TD

    def rows(name: str, start: int, rank: int) -> torch.Tensor:
        return module.tensor(f"linear_{name}", slice(start, start + rank)).view(rank, -1)

    for (token, first, last, rank), gate in zip(pairs, gates.values(), strict=True):
        inner_1r = F.linear(hidden_TD[token : token + 1], rows("in", first, rank))
        out_TD[token].add_((inner_1r @ rows("out", last, rank))[0], alpha=gate)
    return out_TD
