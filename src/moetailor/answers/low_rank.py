"""LowRank: a base that several experts share and a part of low rank of its own (LightMoE, arXiv:2603.12645).

Shapes: M bases, N low-rank experts, R rows of all own parts, T tokens, P pairs, r rank, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.products import ALIGNMENT, Pairs, grouped, pieces, runs, thin
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import PlanError
from moetailor.schema import Within

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap


@dataclass(frozen=True)
class LowRank(Answer):
    """A base and an own part: expert n of rank r runs with W = base + out[a:a+r]^T @ in[a:a+r] for each matrix.

    Tensors: ``low_rank_base_<matrix or bias>`` [M, ...], bases in the order of the experts that they are named after;
    ``low_rank_<matrix>_in`` and ``_out`` [R, inputs or outputs of the matrix], base by base, and slot by slot in each.

    Attributes:
        base: the member that the base is named after.
        rank: r.
    """

    base: int
    rank: Annotated[int, Within(0)] = 0

    kind = "low_rank"
    letter = "b"
    label = "low rank over a base"
    color = "#0072b2"
    refers = "base"
    expands = True

    def describe(self) -> str:
        """Name the rank and the base."""
        return f"rank {self.rank} over base {self.base}"

    def check(self, slot: int, context: Context) -> None:
        """Refuse a base that is named after none of its members."""
        named = context.slots[self.base]
        if not isinstance(named, LowRank) or named.base != self.base:
            raise PlanError(
                f"{context.where}: slot {slot} shares base {self.base}, whose own slot does not; a base is named after "
                "one of its members"
            )

    def weights(self, module: Any, slot: int) -> dict[str, torch.Tensor]:
        """Return W + B A of each matrix, in float32."""
        every = members(module.slots)
        place, base = list(every).index(slot), sorted({answer.base for answer in every.values()}).index(self.base)
        start, shape = sum(answer.rank for answer in list(every.values())[:place]), Experts(module).shape
        found = {name: module.tensor(f"low_rank_base_{name}")[base].float() for name in shape.tensors}
        own = slice(start, start + self.rank)
        for name in shape.matrices if self.rank else ():
            a_rI, b_rO = (module.tensor(f"low_rank_{name}_{side}")[own].float() for side in ("in", "out"))
            found[name] = found[name] + b_rO.T @ a_rI
        return found

    @classmethod
    def whole_experts(cls, slots: SlotMap) -> int:
        """Return the number of bases."""
        return len({answer.base for answer in members(slots).values()})

    @classmethod
    def tensors(cls, slots: SlotMap, shape: ExpertShape) -> dict[str, TensorSpec]:
        """Return the bases, biases included, and the factors of the own parts."""
        bases, rows = cls.whole_experts(slots), sum(answer.rank for answer in members(slots).values())
        found = {f"low_rank_base_{name}": TensorSpec(shape=(bases, *size)) for name, size in shape.tensors.items()}
        for name, (outputs, inputs) in shape.matrices.items():
            found[f"low_rank_{name}_in"] = TensorSpec(shape=(rows, inputs))
            found[f"low_rank_{name}_out"] = TensorSpec(shape=(rows, outputs))
        return found

    @classmethod
    def buffers(cls, slots: SlotMap) -> dict[str, torch.Tensor]:
        """Return the number of each slot's low-rank expert (-1 for none), the base of each one [N] and the rows of its
        own part [N, r], with R for none.
        """
        found = members(slots)
        bases = sorted({answer.base for answer in found.values()})
        rank_N = torch.tensor([answer.rank for answer in found.values()])
        step_r = torch.arange(-(-int(rank_N.max()) // ALIGNMENT) * ALIGNMENT)
        start_N = rank_N.cumsum(0) - rank_N
        return {
            "low_rank_slot": slots.numbered(found),
            "low_rank_base": torch.tensor([bases.index(answer.base) for answer in found.values()]),
            "low_rank_row": torch.where(step_r < rank_N[:, None], start_N[:, None] + step_r, int(rank_N.sum())),
        }

    @classmethod
    def run(cls, module: Any, call: Call, out_TD: torch.Tensor) -> torch.Tensor:
        """Add the gated outputs; full weights are never formed."""
        pairs = Pairs.of(call.of_slots(module.low_rank_slot), call.gate_TK)
        return _added(module, call.hidden_TD, pairs, out_TD) if len(pairs) else out_TD


def members(slots: SlotMap) -> dict[int, LowRank]:
    """Return the low-rank experts of a layer by slot, base by base: the order of their rows."""
    return dict(sorted(slots.of(LowRank).items(), key=lambda item: (item[1].base, item[0])))


def _added(module: Any, x_TD: torch.Tensor, pairs: Pairs, out_TD: torch.Tensor) -> torch.Tensor:
    """Return an output to which is added what low-rank experts give, gates included.

    Args:
        module: the compressed experts.
        x_TD: tokens.
        pairs: with their low-rank experts; the bases of these ascend, too.
        out_TD: the output so far.
    """
    experts, base_P = Experts(module), module.low_rank_base[pairs.number]
    if pairs.live is not None:
        once, place_P = base_P * len(x_TD) + pairs.token, torch.arange(len(pairs), device=x_TD.device)
    else:
        # A token that chose several members of a base meets the base's matrices once.
        once, place_P = torch.unique(base_P * len(x_TD) + pairs.token, return_inverse=True)
    token_U, base_U = once % len(x_TD), once // len(x_TD)
    own = _own_parts(module, pairs)

    def base(part: str, inputs: torch.Tensor, bias: bool) -> torch.Tensor:
        given = module.tensor(f"low_rank_base_{part}_bias") if bias else None
        return grouped(inputs, module.tensor(f"low_rank_base_{part}"), base_U, given)

    def projected(part: str) -> torch.Tensor:
        given_PF = base(part, x_TD[token_U], experts.shape.biased)[place_P]
        more_PF = own(part, x_TD[pairs.token])
        return given_PF if more_PF is None else given_PF + more_PF

    inner_PF = experts.activated([projected(part) for part in experts.inputs])
    # The down projection is linear: sum_p g_p W h_p = W sum_p g_p h_p. Sums are kept in float32 at least.
    gate_P1 = pairs.gate if pairs.live is None else pairs.gate.masked_fill(~pairs.live, 0)
    gated_PF = (inner_PF * gate_P1).to(out_TD)
    summed_UF = gated_PF.new_zeros(len(once), gated_PF.shape[1]).index_add_(0, place_P, gated_PF)
    given_UD = base("down", summed_UF.to(inner_PF), bias=False).to(out_TD)
    if experts.shape.biased:
        gate_U1 = gated_PF.new_zeros(len(once), 1).index_add_(0, place_P, gate_P1.to(out_TD))
        given_UD = given_UD + gate_U1 * module.tensor("low_rank_base_down_bias")[base_U].to(out_TD)
    out_TD.index_add_(0, token_U, given_UD)
    more_PD = own("down", gated_PF.to(inner_PF))
    return out_TD if more_PD is None else pairs.added(out_TD, more_PD)


def _own_parts(module: Any, pairs: Pairs) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """Return what applies the own parts of one of the matrices to the inputs of each pair; None where none has any."""
    ranks = [answer.rank for answer in members(module.slots).values()]
    if pairs.live is not None:
        number = pairs.number

        def compiled(part: str, inputs: torch.Tensor) -> torch.Tensor | None:
            if not any(ranks):
                return None
            inner = inputs[:, None] @ factor(module, f"{part}_in", number).transpose(1, 2)
            return (inner @ factor(module, f"{part}_out", number))[:, 0]

        return compiled
    # Few pairs meet few of the own parts: each alone, as nothing then goes over all.
    counts, alike = pairs.counts(len(ranks)), [(1, rank) for rank in ranks] if len(pairs) < len(ranks) else runs(ranks)

    def own(part: str, inputs: torch.Tensor) -> torch.Tensor | None:
        if not any(ranks):
            return None
        sizes = [count * rank for count, rank in alike]
        both = (pieces(module.tensor(f"low_rank_{part}_{side}"), sizes) for side in ("in", "out"))
        return thin(inputs, counts, alike, *both)

    return own


def factor(module: Any, name: str, number: torch.Tensor) -> torch.Tensor:
    """Return a factor of the own parts with the rows of some low-rank experts, zeros where one has fewer than others,
    [n, r, D or F].

    Args:
        module: the compressed experts.
        name: ``gate_in`` or another one.
        number: of the low-rank experts.
    """
    rows, row = module.tensor(f"low_rank_{name}"), module.low_rank_row[number]
    return rows[row.clamp_max(len(rows) - 1)].masked_fill((row == len(rows))[..., None], 0)
