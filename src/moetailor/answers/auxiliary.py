"""Auxiliary: an expert that runs where it is among a token's main ones, and else only modulates those that run, or
gives a constant or a map of low rank.

Compressed Experts (arXiv:2503.00634). Shapes: T tokens, K slots of a token, m main ones, P pairs, n auxiliary slots, r
rank, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch.nn import functional as F

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.constant import Constant
from moetailor.answers.linear import Linear
from moetailor.answers.products import Pairs, grouped, pieces, runs, thin, weighted_rows
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import PlanError
from moetailor.schema import Within

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap

Vectors = Literal["expert", "layer", "none"]


@dataclass(frozen=True)
class Auxiliary(Answer):
    """The slot's own expert where its gate is among a token's largest, its vectors where it is not.

    Tensors: ``auxiliary_gate`` and ``auxiliary_up`` [slots, D], ``auxiliary_down`` [slots, F] (one row when they are
    the layer's): what is added to 1 in the factor on a matrix's input, so that zeros are the identity; and
    ``auxiliary_constant`` [slots, D]. Of maps, as in `Linear`, only those slots have one that may run:
    ``auxiliary_in`` and ``auxiliary_out`` [n r, D].

    Attributes:
        main: slots of a token that run, those with the largest gates.
        share: fewer of them run once their gates have this share of all the token's gates; 1 for always `main`.
        renormalise: scale the gates of the main slots so that they sum to those of all slots.
        vectors: the vectors that modulate: one set for each ``expert``, one for the whole ``layer`` or ``none``.
        constants: whether an auxiliary slot gives a constant of its own, as a novice does.
        rank: r of the map of its own that it gives beside the constant; 0 for none.
    """

    main: int
    share: float = 1.0
    renormalise: bool = False
    vectors: Vectors = "expert"
    constants: bool = False
    rank: Annotated[int, Within(0)] = 0

    kind = "auxiliary"
    letter = "v"
    label = "kept, auxiliary unless main"
    color = "#f0e442"

    @classmethod
    def standing_for(cls, other: int) -> Auxiliary:
        """Return one main slot of a token."""
        return cls(1)

    def expert(self, slot: int) -> int:
        """Return the slot's own expert."""
        return slot

    def running(self, top_k: int) -> int:
        """Return the main slots."""
        return self.main

    def describe(self) -> str:
        """Name the split."""
        said = {"share": self.share != 1.0, "renormalise": self.renormalise, "constants": self.constants}
        said |= {"rank": self.rank > 0}
        more = [f"{name}={getattr(self, name)}" for name, given in said.items() if given]
        return ", ".join([f"auxiliary unless among {self.main} main", f"vectors={self.vectors}", *more])

    def check(self, slot: int, context: Context) -> None:
        """Refuse a split that runs none or all of a token's slots, or that the other answers do not know."""
        where, top_k = context.where, context.top_k
        if not 1 <= self.main <= top_k or not 0 < self.share <= 1:
            raise PlanError(
                f"{where}: {self.main} main slots of a token and a share of {self.share}; the router picks {top_k}: "
                f"run 1 to {top_k} of them, and a share above 0 and at most 1"
            )
        if self.rank and not self.constants:
            raise PlanError(f"{where}: auxiliary slots have maps of rank {self.rank} without constants; give them both")
        known = (Constant, Linear)
        if any(other != self and not other.drops and not isinstance(other, known) for other in context.slots):
            raise PlanError(
                f"{where}: beside auxiliary slots only slots of the same split, constants, linear maps and dropped "
                "slots are known"
            )

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the vectors and constants, of which every slot of the layer has a row, and the maps."""
        split, count = _split(slots), len(slots.answers)
        rows = {"expert": count, "layer": 1, "none": 0}[split.vectors]
        found = {f"auxiliary_{name}": TensorSpec(shape=(rows, size[1])) for name, size in shape.matrices.items()}
        found["auxiliary_constant"] = TensorSpec(shape=(count if split.constants else 0, shape.width))
        rows = split.rank * len(slots.of(cls))
        return found | {f"auxiliary_{side}": TensorSpec(shape=(rows, shape.width)) for side in ("in", "out")}

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return ``auxiliary_row``: the row in the pool of each slot's expert, -1 for none."""
        return {"auxiliary_row": torch.tensor(slots.rows, dtype=torch.int32)}

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add the modulated outputs of each token's main slots, and the constants and maps of the others."""
        split = _split(module.slots)
        gate_TK, order = call.gate_TK.sort(dim=1, descending=True, stable=True)
        slot_TK = call.slot_TK.gather(1, order)
        row_TK = module.auxiliary_row[slot_TK].long()
        able_TK, main_TK = row_TK >= 0, split.mains(row_TK >= 0, gate_TK)
        aside_TK, gate_Tm = gate_TK.masked_fill(main_TK, 0), gate_TK.masked_fill(~main_TK, 0)
        if split.renormalise:
            gate_Tm = gate_Tm * (gate_TK.sum(1, keepdim=True) / gate_Tm.sum(1, keepdim=True).clamp_min(1e-20))
        pairs = Pairs.of(row_TK.masked_fill(~main_TK, -1), gate_Tm)
        if len(pairs) and split.vectors == "none":
            out_TD = pairs.added(out_TD, module.rows(call.hidden_TD[pairs.token], pairs.number[:, None], pairs.gate))
        elif len(pairs):
            vectors = _vectors(module, split, slot_TK, aside_TK)
            given_PD = modulated(module, call.hidden_TD, pairs.token, pairs.number, vectors)
            out_TD = pairs.added(out_TD, given_PD * pairs.gate)
        if split.constants:
            given_TD = weighted_rows(module.tensor("auxiliary_constant"), slot_TK, aside_TK.masked_fill(~able_TK, 0))
            out_TD.add_(given_TD)
        if split.rank:
            # Only auxiliary slots have rows of the pool, so that these number the maps, too.
            aside = Pairs.of(row_TK.masked_fill(main_TK, -1), aside_TK)
            out_TD = _mapped(module, split.rank, call.hidden_TD, aside, out_TD)
        return out_TD

    def mains(self, able_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Return which slots of a token run: the first `main` that have an expert, as long as those before them have
        less than the share of all gates, bool [T, K].

        Args:
            able_TK: whether a slot has an expert, those of the largest gates first.
            gate_TK: the gates, descending.
        """
        main_TK = able_TK & (able_TK.cumsum(1) <= self.main)
        if self.share < 1:
            main_TK &= gate_TK.cumsum(1) - gate_TK < self.share * gate_TK.sum(1, keepdim=True)
        return main_TK


def _split(slots: SlotMap) -> Auxiliary:
    return next(iter(slots.of(Auxiliary).values()))


def _vectors(module: Any, split: Auxiliary, slot_TK: torch.Tensor, aside_TK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return theta = 1 + sum_j alpha'_j delta_j over a token's auxiliary slots, once for each matrix's input."""
    # alpha'_j = alpha_j / sum of the auxiliary ones; a token without any is not modulated
    share_TK = aside_TK / aside_TK.sum(1, keepdim=True).clamp_min(1e-20)
    which_TK = slot_TK if split.vectors == "expert" else torch.zeros_like(slot_TK)
    found = {}
    for part in (*Experts(module).inputs, "down"):
        delta = module.tensor(f"auxiliary_{part}")
        mixed = F.embedding_bag(which_TK, delta, per_sample_weights=share_TK.to(delta.dtype), mode="sum")
        found[part] = 1 + mixed
    return found


def _mapped(module: Any, rank: int, x_TD: torch.Tensor, pairs: Pairs, out_TD: torch.Tensor) -> torch.Tensor:
    """Return an output to which is added what the maps of auxiliary slots give, gates included.

    Args:
        module: the experts.
        rank: of each map.
        x_TD: tokens.
        pairs: with their maps.
        out_TD: the output so far.
    """
    if not len(pairs):
        return out_TD
    both, x_PD = [module.tensor(f"auxiliary_{side}") for side in ("in", "out")], x_TD[pairs.token]
    count = len(both[0]) // rank
    if pairs.live is not None:
        inner, outer = (rows.view(count, rank, -1)[pairs.number] for rows in both)
        return pairs.added(out_TD, ((x_PD[:, None] @ inner.transpose(1, 2)) @ outer)[:, 0] * pairs.gate)
    # Few pairs meet few of the maps: each alone, as nothing then goes over all.
    alike = [(1, rank)] * count if len(pairs) < count else runs([rank] * count)
    sizes = [number * each for number, each in alike]
    given_PD = thin(x_PD, pairs.counts(count), alike, *(pieces(rows, sizes) for rows in both))
    return out_TD if given_PD is None else pairs.added(out_TD, given_PD * pairs.gate)


def modulated(
    module: Any,
    x_TD: torch.Tensor,
    token_P: torch.Tensor,
    row_P: torch.Tensor,
    vectors: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Return E(x; theta) = W_down[(act(W_gate(x e_gate)) (W_up(x e_up))) e_down], [P, D].

    Args:
        module: the experts.
        x_TD: tokens.
        token_P: token of each pair.
        row_P: its row of the pool, ascending.
        vectors: e of each token by the name of the matrix whose input it scales, [T, D] or [T, F].
    """
    experts = Experts(module)
    stacks = experts.matrices(detach=False)
    projected = [
        grouped((x_TD * vectors[part])[token_P], stacks[part], row_P, stacks.get(f"{part}_bias"))
        for part in experts.inputs
    ]
    inner = experts.activated(projected) * vectors["down"][token_P]
    return grouped(inner, stacks["down"], row_P, stacks.get("down_bias"))
