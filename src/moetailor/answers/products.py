"""The products that answers run: grouped by expert, of two thin factors, and weighted rows of a table.

Matrices are those of `Experts`, stacked: gate and up [E, F, D], down [E, D, F]. Everything is differentiable. Shapes: T
tokens, K slots of a token, P pairs of a token and an expert, E experts, I inputs, O outputs, D model width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np
import torch
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from moetailor.checkpoint.devices import evened, in_tiles, multiplied, runs_compiled

# As many pairs are all run when a call is compiled, with gates of zero where they stand for nothing: shapes must not
# depend on what the router chose.
FEW_PAIRS = 64
# Rows up to which loops on a CPU take no longer than torch, even where all meet one matrix.
FEW_ROWS = 16
# The grouped kernels of CUDA want rows of 16 bytes.
ALIGNMENT = 8


@dataclass
class Pairs:
    """Pairs of a token and what runs for it, by number.

    Attributes:
        token: [P].
        number: of what runs, ascending [P].
        gate: [P, 1].
        live: which count, [P, 1]; all when None.
    """

    token: torch.Tensor
    number: torch.Tensor
    gate: torch.Tensor
    live: torch.Tensor | None = None

    @classmethod
    def of(cls, number_TK: torch.Tensor, gate_TK: torch.Tensor) -> Pairs:
        """Return the pairs whose number is not negative; where few pairs are compiled, all of them.

        Args:
            number_TK: what each slot runs.
            gate_TK: the gates.
        """
        if torch.compiler.is_compiling() and number_TK.numel() <= FEW_PAIRS:
            # Those that stand for nothing go where another one goes anyway, so that no more weights are read.
            live_TK = number_TK >= 0
            every = number_TK.where(live_TK, number_TK.max().clamp_min(0)).flatten()
            number, order = every.sort(stable=True)
            gate, live = gate_TK.masked_fill(~live_TK, 0).flatten()[order, None], live_TK.flatten()[order, None]
            return cls(order // number_TK.shape[1], number, gate, live)
        token, place = (number_TK >= 0).nonzero().unbind(1)
        number, order = number_TK[token, place].sort(stable=True)
        token, place = token[order], place[order]
        return cls(token, number, gate_TK[token, place, None])

    @classmethod
    def listed(cls, pairs: Collection[tuple[int, int]], gates: Iterable[float], dtype: torch.dtype) -> Pairs:
        """Return the pairs of a list; see `Call.gates`.

        Args:
            pairs: numbers and tokens.
            gates: of each.
            dtype: of the gates.
        """
        # Through numpy, which is sooner done, and knows no default device.
        number, token = (torch.from_numpy(np.array([pair[at] for pair in pairs], np.int64)) for at in (0, 1))
        return cls(token, number, torch.from_numpy(np.array([*gates])).to(dtype)[:, None])

    def __len__(self) -> int:
        return len(self.token)

    def by_number(self) -> Iterator[Pairs]:
        """Yield the pairs of each number; in a graph, which cannot know these, each alone."""
        counts = [1] * len(self)
        if self.live is None:
            counts = self.number.unique_consecutive(return_counts=True)[1].tolist()
        lives: Iterable = repeat(None) if self.live is None else self.live.split(counts)
        yield from map(Pairs, *(each.split(counts) for each in (self.token, self.number, self.gate)), lives)

    def counts(self, numbers: int) -> list[int]:
        """Return how many pairs each number has."""
        return torch.bincount(self.number, minlength=numbers).tolist()

    def added(self, out_TD: torch.Tensor, given_PD: torch.Tensor) -> torch.Tensor:
        """Return an output to which is added, in place, what the pairs give, gates included."""
        if self.live is not None:
            given_PD = given_PD.masked_fill(~self.live, 0)
        return out_TD.index_add_(0, self.token, given_PD.to(out_TD))


def grouped(
    x_PI: torch.Tensor,
    weight_EOI: torch.Tensor,
    expert_P: torch.Tensor,
    bias_EO: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Return x W^T (+ b) of each row with the matrix of its expert, [P, O].

    Args:
        x_PI: inputs, sorted by expert.
        weight_EOI: a matrix for each expert, [E, I, O] when `transposed`.
        expert_P: the expert of each row, ascending.
        bias_EO: biases.
        transposed: how the matrices lie.
    """
    if not transposed and runs_plain(x_PI, weight_EOI):
        from moetailor.checkpoint.storage import plain_products

        given_PO = plain_products.product(x_PI, weight_EOI, expert_P).to(x_PI)
        return given_PO if bias_EO is None else given_PO + bias_EO[expert_P]
    if in_tiles(x_PI) and len(x_PI) > FEW_PAIRS and not transposed:
        counts = torch.bincount(expert_P, minlength=len(weight_EOI)).tolist()
        found = [multiplied(x, weight) for x, weight in zip(x_PI.split(counts), weight_EOI, strict=True) if len(x)]
        given_PO = torch.cat(found)
        return given_PO if bias_EO is None else given_PO + bias_EO[expert_P]
    if 1 not in weight_EOI.stride()[1:]:  # interleaved gate and up projections
        weight_EOI = weight_EOI.contiguous()
    numbers = torch.arange(len(weight_EOI), device=expert_P.device)
    ends = torch.searchsorted(expert_P, numbers, right=True, out_int32=True)
    bias = None if bias_EO is None else bias_EO[expert_P]
    return _grouped_linear(x_PI, weight_EOI, ends, bias, is_transposed=transposed)


def runs_plain(x_PI: torch.Tensor, weight_EOI: torch.Tensor) -> bool:
    """Return whether a few inputs meet matrices in loops that read these faster than torch does."""
    if len(x_PI) > FEW_ROWS or x_PI.dtype not in (torch.bfloat16, torch.float32) or not runs_compiled(x_PI):
        return False
    from moetailor.checkpoint.storage import plain_products  # numba takes half a second

    return plain_products.takes(x_PI, weight_EOI)


def weighted_rows(table_ND: torch.Tensor, number_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of some rows for each token, [T, D]: gathered and added, no matrix product.

    Args:
        table_ND: the rows.
        number_TK: which, negative for none.
        weight_TK: their weights.
    """
    weight_TK = weight_TK.masked_fill(number_TK < 0, 0).to(table_ND.dtype)
    return F.embedding_bag(number_TK.clamp_min(0), table_ND, per_sample_weights=weight_TK, mode="sum")


def added_rows(out_TD: torch.Tensor, table_ND: torch.Tensor, gates: Mapping[tuple[int, int], float]) -> torch.Tensor:
    """Return an output to which are added, in place, gated rows that a few tokens chose.

    Args:
        out_TD: the output so far.
        table_ND: the rows.
        gates: by row and token; see `Call.gates`.
    """
    for (number, token), gate in gates.items():
        out_TD[token].add_(table_ND[number], alpha=gate)
    return out_TD


def runs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many numbers next to each other have one rank, and that rank: those run as one grouped product."""
    found: list[tuple[int, int]] = []
    for rank in ranks:
        if found and found[-1][1] == rank and rank % ALIGNMENT == 0:
            found[-1] = (found[-1][0] + 1, rank)
        else:
            found.append((1, rank))
    return found


def thin(
    x_PI: torch.Tensor,
    pairs: Sequence[int],
    runs: Sequence[tuple[int, int]],
    inner: Callable[[int], torch.Tensor],
    outer: Callable[[int], torch.Tensor],
) -> torch.Tensor | None:
    """Return x in^T out of each row with the two thin factors of its number, [P, O]; None where all ranks are zero.

    Args:
        x_PI: inputs, sorted by number.
        pairs: rows of each number.
        runs: of the numbers.
        inner: gives the input factors of a run, [n r, I]; asked for runs that some row has.
        outer: gives the output factors of a run, [n r, O].
    """
    found: list[torch.Tensor | int] = []
    number = pair = 0
    for run, (count, rank) in enumerate(runs):
        mine, number = pairs[number : number + count], number + count
        if not (some := sum(mine)):
            continue
        x, pair = x_PI[pair : pair + some], pair + some
        if not rank:
            found.append(some)
        elif count == 1:
            found.append((F.linear(evened(x), inner(run)) @ outer(run))[:some])
        else:
            place = torch.arange(count).repeat_interleave(torch.tensor(mine)).to(x.device)
            both = [factor.view(count, rank, -1) for factor in (inner(run), outer(run))]
            found.append(grouped(grouped(x, both[0], place), both[1], place, transposed=True))
    given = next((each for each in found if isinstance(each, torch.Tensor)), None)
    if given is None:
        return None
    # Those of rank zero give nothing.
    return torch.cat([given.new_zeros(each, given.shape[1]) if isinstance(each, int) else each for each in found])


def pieces(rows_RI: torch.Tensor, sizes: Sequence[int]) -> Callable[[int], torch.Tensor]:
    """Return what gives so many rows each, by number: cut when they are asked for, or all at once where gradients are
    wanted, as that of each cut would be as large as all rows.
    """
    if torch.is_grad_enabled() and rows_RI.requires_grad:
        return rows_RI.split(list(sizes)).__getitem__
    ends = [0, *accumulate(sizes)]
    return lambda number: rows_RI[ends[number] : ends[number + 1]]


def joined_gates(number_TK: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let slots of a token with one number run once: its first slot, with the sum of their gates.

    Args:
        number_TK: what each slot runs, negative for nothing.
        gate_TK: the gates.

    Returns:
        The numbers, -1 for slots that another one runs for, and the gates, [T, K] each.
    """
    same_TKK = number_TK[:, :, None] == number_TK[:, None, :]
    first_TK = same_TKK.int().argmax(2) == torch.arange(number_TK.shape[1], device=number_TK.device)
    return number_TK.masked_fill(~first_TK, -1), (same_TKK * gate_TK[:, None, :]).sum(2)
