"""LowRank: a base that several experts share and a part of low rank of its own (LightMoE, arXiv:2603.12645).

Shapes: M bases, N low-rank experts, R rows of all own parts, T tokens, P pairs, r rank, D model width, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch

from moetailor.answers.answer import Answer, Call, Context
from moetailor.answers.products import grouped, sorted_pairs
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.storage import TensorSpec
from moetailor.errors import PlanError
from moetailor.schema import Within

if TYPE_CHECKING:
    from moetailor.answers.slot_map import SlotMap

# The grouped kernels of CUDA want rows of 16 bytes.
ALIGNMENT = 8


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
        token_P, place_P, number_P = sorted_pairs(call.of_slots(module.low_rank_slot))
        if not len(token_P):
            return out_TD
        pairs_PD = outputs(module, call.hidden_TD, token_P, number_P) * call.gate_TK[token_P, place_P, None]
        return out_TD.index_add(0, token_P, pairs_PD.to(out_TD))


def members(slots: SlotMap) -> dict[int, LowRank]:
    """Return the low-rank experts of a layer by slot, base by base: the order of their rows."""
    return dict(sorted(slots.of(LowRank).items(), key=lambda item: (item[1].base, item[0])))


def outputs(module: Any, x_TD: torch.Tensor, token_P: torch.Tensor, number_P: torch.Tensor) -> torch.Tensor:
    """Return the outputs of low-rank experts, [P, D].

    Args:
        module: the compressed experts.
        x_TD: tokens.
        token_P: token of each pair.
        number_P: its low-rank expert, ascending; their bases ascend too.
    """
    experts, base_P = Experts(module), module.low_rank_base[number_P]
    # A token that chose several members of a base meets its gate and up projections once.
    both, place_P = torch.unique(base_P * len(x_TD) + token_P, return_inverse=True)
    x_UD, base_U, x_PD = x_TD[both % len(x_TD)], both // len(x_TD), x_TD[token_P]

    def base(part: str, inputs: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        bias = module.tensor(f"low_rank_base_{part}_bias") if experts.shape.biased else None
        return grouped(inputs, module.tensor(f"low_rank_base_{part}"), group, bias)

    def own(part: str, inputs: torch.Tensor) -> torch.Tensor:
        if not module.low_rank_row.shape[1]:
            return inputs.new_zeros(())
        if len(number_P) < len(module.low_rank_row):  # as in decoding: only the parts of these pairs are read
            inner = inputs[:, None] @ factor(module, f"{part}_in", number_P).transpose(1, 2)
            return (inner @ factor(module, f"{part}_out", number_P))[:, 0]
        inner = grouped(inputs, factor(module, f"{part}_in"), number_P)
        return grouped(inner, factor(module, f"{part}_out"), number_P, transposed=True)

    projected = [base(part, x_UD, base_U)[place_P] + own(part, x_PD) for part in experts.inputs]
    inner = experts.activated(projected)
    return base("down", inner, base_P) + own("down", inner)


def factor(module: Any, name: str, number: torch.Tensor | None = None) -> torch.Tensor:
    """Return a factor of the own parts with the rows of each low-rank expert, zeros where its rank is lower than
    others', [N, r, D or F].

    Args:
        module: the compressed experts.
        name: ``gate_in`` or another one.
        number: which low-rank experts, all when None; only their rows are read.
    """
    rows, table = module.tensor(f"low_rank_{name}"), module.low_rank_row
    if table.numel() == len(rows):  # all of one rank: as they lie
        whole = rows.view(*table.shape, -1)
        return whole if number is None else whole[number]
    row = table if number is None else table[number]
    return rows[row.clamp_max(len(rows) - 1)].masked_fill((row == len(rows))[..., None], 0)
