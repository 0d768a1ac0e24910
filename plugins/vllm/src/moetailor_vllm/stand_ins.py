"""What may stand behind a slot beside a row of the pool: one module for each kind in a layer.

A module has `tensors`, the stored tensors by name, and gives the weighted sum of its slots for each token. Shapes: T
tokens, K slots of a token, P pairs of both, D model width, F intermediate size, N stand-ins, R rows of all, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moetailor_vllm.pairs import Pairs, ends, grouped
from moetailor_vllm.slots import Constant, Linear, LowRank, Packed, Slots
from moetailor_vllm.stored import ALONE, FewBits, Plain, Rank
from moetailor_vllm.widths import stem, storages

# The grouped kernels of CUDA want rows of 16 bytes.
ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class Expert:
    """What an expert of the layer is made of.

    Attributes:
        width: of its input and output, D.
        inner: its intermediate size on all ranks, F.
        dtype: of its weights.
        activated: what the down projection is applied to, from what the others gave.
        gated: whether it has three matrices or two.
        biased: whether each has a bias.
        live: whether pairs for which nothing runs are left out, and experts that nothing reaches: what runs, and its
            shapes, then follow from what the router chose, which no graph can hold.
        rank: of this process.
    """

    width: int
    inner: int
    dtype: torch.dtype
    activated: Callable[..., torch.Tensor]
    gated: bool = True
    biased: bool = False
    live: bool = False
    rank: Rank = ALONE

    @property
    def inputs(self) -> tuple[str, ...]:
        """The matrices that are applied to its input."""
        return ("gate", "up") if self.gated else ("up",)

    def plain(self, *shape: int, axis: int | None = None, **more: Any) -> Plain:
        """Return a tensor of numbers, see `Plain`."""
        return Plain(shape, self.rank, axis, self.dtype, **more)

    def matrices(self, count: int, few_bits: dict[str, str] | None = None) -> dict[str, nn.Module]:
        """Return stacks of so many matrices, and of biases where there are some, by name; ranks cut them along F.

        Args:
            count: experts, n.
            few_bits: how they lie; plain when None.
        """
        found: dict[str, nn.Module] = {}
        for name in (*self.inputs, "down"):
            shape = (count, self.width, self.inner) if name == "down" else (count, self.inner, self.width)
            axis = 2 if name == "down" else 1
            if few_bits:
                found[name] = FewBits(shape, few_bits[name], self.rank, axis, self.dtype)
            else:
                found[name] = self.plain(*shape, axis=axis)
            if self.biased:
                found[f"{name}_bias"] = self.plain(*shape[:2], axis=None if name == "down" else 1, first=name == "down")
        return found


class StandIns(nn.Module):
    """The stand-ins of one kind in a layer.

    Args:
        tensors: the stored tensors, by the names that they have in the experts module.
        number: what stands behind each slot, -1 for nothing of this kind.
    """

    number: torch.Tensor
    # Whether the first rank alone gives what all would give.
    once = False

    def __init__(self, tensors: dict[str, nn.Module], number: list[int]) -> None:
        super().__init__()
        self.tensors = nn.ModuleDict(
            {name: tensor for name, tensor in tensors.items() if all(tensor.parts[next(iter(tensor.parts))])}
        )
        self.register_buffer("number", torch.tensor(number), persistent=False)

    def numbers(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers of a tensor, or of some of its rows."""
        return self.tensors[name].numbers() if rows is None else self.tensors[name].numbers(rows)

    def gates(self, slot_TK: torch.Tensor, weight_TK: torch.Tensor, count: int) -> torch.Tensor:
        """Return the summed weight of each stand-in for each token, float32 [T, count]."""
        number_TK = self.number[slot_TK]
        gate_TN = weight_TK.new_zeros(len(slot_TK), count + 1)  # the last column collects the rest
        return gate_TN.scatter_add(1, number_TK.where(number_TK >= 0, count), weight_TK)[:, :count]


class Constants(StandIns):
    """Vectors."""

    once = True

    def __init__(self, slots: Slots, expert: Expert) -> None:
        mine = slots.of(Constant)
        super().__init__(
            {"constant": expert.plain(len(mine), expert.width)},
            slots.numbered({slot: n for n, slot in enumerate(mine)}),
        )

    def forward(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return sum_k g_k c_k, float32 [T, D]."""
        constant_ND = self.numbers("constant").float()
        return self.gates(slot_TK, weight_TK, len(constant_ND)) @ constant_ND


class LinearMaps(StandIns):
    """Affine maps of low rank, two thin products over all maps of the layer."""

    once = True

    def __init__(self, slots: Slots, expert: Expert) -> None:
        mine = slots.of(Linear)
        maps = list(mine.values())
        ranks = [map.rank for map in maps]
        shared = maps[0].shared
        rows = {"linear_in": max(ranks) if shared else sum(ranks), "linear_out": sum(ranks)}
        tensors: dict[str, nn.Module] = {"linear_constant": expert.plain(len(maps), expert.width)}
        for name, count in rows.items():
            if maps[0].int8:
                storage = f"int8g{expert.width}"
                tensors[name] = FewBits((count, 1, expert.width), storage, ALONE, dtype=expert.dtype)
            else:
                tensors[name] = expert.plain(count, expert.width)
        super().__init__(tensors, slots.numbered({slot: n for n, slot in enumerate(mine)}))
        owner = [n for n, rank in enumerate(ranks) for _ in range(rank)]
        row = [i for rank in ranks for i in range(rank)] if shared else list(range(sum(ranks)))
        self.register_buffer("owner", torch.tensor(owner), persistent=False)
        self.register_buffer("row", torch.tensor(row), persistent=False)

    def forward(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return sum_k g_k (c_k + out_k^T in_k x), float32 [T, D]."""
        constant_ND, width = self.numbers("linear_constant").float(), x_TD.shape[1]
        gate_TN = self.gates(slot_TK, weight_TK, len(constant_ND))
        inner_TR = F.linear(x_TD, self.numbers("linear_in").view(-1, width))[:, self.row].float()
        gated_TR = (inner_TR * gate_TN[:, self.owner]).to(x_TD.dtype)
        return gate_TN @ constant_ND + (gated_TR @ self.numbers("linear_out").view(-1, width)).float()


class LowRanks(StandIns):
    """Experts of low rank over bases that several share: W = base + out^T in for each matrix."""

    def __init__(self, slots: Slots, expert: Expert) -> None:
        # Base by base, and slot by slot in each: the order of their rows.
        mine = dict(sorted(slots.of(LowRank).items(), key=lambda item: (item[1].base, item[0])))
        bases = sorted({answer.base for answer in mine.values()})
        ranks = [answer.rank for answer in mine.values()]
        # Rows of each own part; where one has fewer than others, zeros.
        step_r, rank_N = torch.arange(-(-max(ranks) // ALIGNMENT) * ALIGNMENT), torch.tensor(ranks)
        start_N = rank_N.cumsum(0) - rank_N
        row_Nr = torch.where(step_r < rank_N[:, None], start_N[:, None] + step_r, sum(ranks))
        tensors = {f"low_rank_base_{name}": stack for name, stack in expert.matrices(len(bases)).items()}
        for name in (*expert.inputs, "down"):
            sizes = (expert.inner, expert.width) if name == "down" else (expert.width, expert.inner)
            for side, size in zip(("in", "out"), sizes, strict=True):
                cut = 1 if (side == "in") == (name == "down") else None
                tensors[f"low_rank_{name}_{side}"] = expert.plain(sum(ranks), size, axis=cut, places=row_Nr)
        super().__init__(tensors, slots.numbered({slot: n for n, slot in enumerate(mine)}))
        base = [bases.index(answer.base) for answer in mine.values()]
        self.register_buffer("base", torch.tensor(base), persistent=False)
        self.bases, self.own, self.expert = len(bases), any(ranks), expert

    def forward(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return sum_k g_k E_k(x), float32 [T, D]."""
        pairs = Pairs(x_TD, self.number[slot_TK], len(self.base), live=self.expert.live)
        # Members are sorted by their bases, so pairs are too; one base more for those that have none.
        base_P = F.pad(self.base, (0, 1), value=self.bases)[pairs.number_P]
        base_ends = ends(base_P, self.bases)

        def product(part: str, x: torch.Tensor) -> torch.Tensor:
            y = grouped(x, self.numbers(f"low_rank_base_{part}").transpose(1, 2), base_ends)
            if self.own:
                inner = grouped(x, self.numbers(f"low_rank_{part}_in").transpose(1, 2), pairs.ends_n)
                y = y + grouped(inner, self.numbers(f"low_rank_{part}_out"), pairs.ends_n)
            if self.expert.biased:
                y = y + self.numbers(f"low_rank_base_{part}_bias")[base_P.clamp_max(self.bases - 1)]
            return y

        h_PF = self.expert.activated(*(product(part, pairs.x_PD) for part in self.expert.inputs))
        return pairs.summed(product("down", h_PF), weight_TK)


class PackedExperts(StandIns):
    """Experts in few bits, of one width."""

    def __init__(self, slots: Slots, expert: Expert, width: Packed) -> None:
        behind = slots.classes[width]
        self.count, self.expert, self.stem = len(set(behind.values())), expert, stem(width)
        matrices = expert.matrices(self.count, storages(width))
        super().__init__({f"{self.stem}_{name}": stack for name, stack in matrices.items()}, slots.numbered(behind))

    def forward(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return sum_k g_k E_k(x), float32 [T, D]."""
        pairs = Pairs(x_TD, self.number[slot_TK], self.count, live=self.expert.live)
        return pairs.summed(self._each(pairs) if self.expert.live else self._grouped(pairs), weight_TK)

    def _each(self, pairs: Pairs) -> torch.Tensor:
        """Return what the pairs give, [P, D], expert by expert: codes of those that are reached become numbers."""
        y_PD = torch.empty_like(pairs.x_PD)
        for number, (start, end) in enumerate(pairwise([0, *pairs.ends_n.tolist()])):
            if start == end:
                continue

            def product(part: str, x: torch.Tensor, number: int = number) -> torch.Tensor:
                y = self.tensors[f"{self.stem}_{part}"].product(x, number)
                return y + self.numbers(f"{self.stem}_{part}_bias")[number] if self.expert.biased else y

            h_PF = self.expert.activated(*(product(part, pairs.x_PD[start:end]) for part in self.expert.inputs))
            y_PD[start:end] = product("down", h_PF)
        return y_PD

    def _grouped(self, pairs: Pairs) -> torch.Tensor:
        """Return the same in shapes that the call alone decides."""
        number_P = pairs.number_P.clamp_max(self.count - 1)
        # Few pairs: each turns the codes of its own expert into numbers. Many: all experts' codes, once.
        few = len(number_P) <= self.count
        rows = number_P if few else None
        groups = torch.arange(1, len(number_P) + 1, dtype=torch.int32, device=number_P.device) if few else pairs.ends_n

        def product(part: str, x: torch.Tensor) -> torch.Tensor:
            y = grouped(x, self.numbers(f"{self.stem}_{part}", rows).to(x.dtype).transpose(1, 2), groups)
            return y + self.numbers(f"{self.stem}_{part}_bias")[number_P] if self.expert.biased else y

        h_PF = self.expert.activated(*(product(part, pairs.x_PD) for part in self.expert.inputs))
        return product("down", h_PF)


def stand_ins(slots: Slots, expert: Expert) -> list[StandIns]:
    """Return what a layer has beside its pool."""
    found: list[StandIns] = [PackedExperts(slots, expert, width) for width in slots.classes]
    for kind, module in ((Constant, Constants), (Linear, LinearMaps), (LowRank, LowRanks)):
        if slots.of(kind):
            found.append(module(slots, expert))
    return found
