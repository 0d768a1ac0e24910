"""The experts module of a compressed layer: slots in, pool rows, guests and stand-ins out.

It is the family's own class with a slot map in front, so the family's activation, layout and every experts
implementation (eager, grouped, batched) keep working. Shapes: T tokens, K slots of a token, D model width, N stand-ins,
R rows of their linear maps, m main slots of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moetailor.checkpoint.experts import Experts
from moetailor.planning.slot_map import SlotMap
from moetailor.runtime.pairs import low_rank, modulated, row_table

MATRICES = ("gate", "up", "down")
# What moetailor adds to an experts module: constants and linear maps, bases and own parts, vectors and their constants.
STAND_IN_TENSORS = (
    "constant",
    "linear_in",
    "linear_out",
    *(f"base_{part}{suffix}" for part in MATRICES for suffix in ("", "_bias")),
    *(f"low_{part}_{side}" for part in MATRICES for side in ("in", "out")),
    *(f"vector_{part}" for part in MATRICES),
    "vector_constant",
)


class CompressedExperts(nn.Module):
    """What a compressed layer adds to its family's experts class; see `reshape.compressed_class`.

    Attributes:
        slots: the map, as config.json has it.
        hosts: experts modules of the layers whose experts are guests here, by decoder layer; not submodules.
        instead: runs in place of everything here when it is set: annealing, while the originals are still mixed in.
        slot_map: pool row of each slot, or what else `SlotMap.slots` says, int32 [slots].
        slot_scale: factor on each slot's gate, float32 [slots]; absent when all are 1.
        constant: constants of the stand-ins, [N, D]; absent when there are none.
        linear_in: input factors of their linear maps, a row for each rank, [rows, D]; absent when there are none.
        linear_out: output factors, [R, D].
        linear_rank: rank of each stand-in, [N].
        linear_start: its first row in `linear_out`, [N].
        linear_owner: stand-in of each row, [R].
        linear_input: row of `linear_in` that belongs to each row, [R].
        base_gate: bases of the low-rank experts, as `Experts` names matrices; also ``base_up``, ``base_down``, biases.
        low_gate_in: input factors of their own parts, a row for each rank; also ``low_gate_out``, ``low_up_in``, ...
        low_base: base of each low-rank expert.
        low_row: rows of its own part, see `pairs.row_table`.
        vector_gate: what an auxiliary slot adds to 1 in the factor on a matrix's input; also ``up`` and ``down``.
        vector_constant: what it gives itself, [slots, D].
    """

    slots: SlotMap
    hosts: Mapping[int, Any]
    instead: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    down_proj: nn.Parameter
    slot_map: torch.Tensor
    slot_scale: torch.Tensor | None
    constant: nn.Parameter | None
    linear_in: nn.Parameter | None
    linear_out: nn.Parameter | None
    linear_rank: torch.Tensor
    linear_start: torch.Tensor
    linear_owner: torch.Tensor
    linear_input: torch.Tensor
    low_base: torch.Tensor
    low_row: torch.Tensor
    vector_constant: nn.Parameter | None

    def forward(self, hidden_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Return the layer's routed output, [T, D].

        Args:
            hidden_TD: input of the experts.
            slot_TK: slots that the router chose.
            gate_TK: their gates.
        """
        if self.instead is not None:
            return self.instead(hidden_TD, slot_TK, gate_TK)
        row_TK = self.slot_map[slot_TK].long()
        if self.slot_scale is not None:
            gate_TK = gate_TK * self.slot_scale[slot_TK].to(gate_TK.dtype)
        if self.slots.auxiliary is not None:
            return self._split(hidden_TD, slot_TK, row_TK, gate_TK)
        if self.slots.plain:
            return super().forward(hidden_TD, row_TK, gate_TK)
        summed_TK, run_TK = gate_TK, row_TK >= 0
        if self.slots.shared:
            # Slots of a token that share a row: the first of them runs it, with the sum of their gates.
            same_TKK = row_TK[:, :, None] == row_TK[:, None, :]
            summed_TK = (same_TKK * gate_TK[:, None, :]).sum(2)
            run_TK = run_TK & (same_TKK.int().argmax(2) == torch.arange(row_TK.shape[1], device=row_TK.device))
        # Sums are kept in float32 at least, as the grouped and batched implementations do.
        out_TD = torch.zeros_like(hidden_TD, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        # Only live pairs reach a matrix product: each becomes a token of its own with one expert.
        token, place = (run_TK & (row_TK < self.slots.experts)).nonzero().unbind(1)
        if len(token):
            pairs = super().forward(hidden_TD[token], row_TK[token, place, None], summed_TK[token, place, None])
            out_TD = out_TD.index_add(0, token, pairs.to(out_TD.dtype))
        for number, (layer, slot) in enumerate(self.slots.guests):
            token, place = (run_TK & (row_TK == self.slots.experts + number)).nonzero().unbind(1)
            if len(token):
                pairs = _visit(self.hosts[layer], hidden_TD[token], slot, summed_TK[token, place, None])
                out_TD = out_TD.index_add(0, token, pairs.to(out_TD))
        if self.slots.low:
            first = self.slots.experts + len(self.slots.guests)
            token, place = (row_TK >= first).nonzero().unbind(1)
            number, order = (row_TK[token, place] - first).sort(stable=True)
            token, place = token[order], place[order]
            if len(token):
                pairs = low_rank(self, hidden_TD, token, number) * gate_TK[token, place, None]
                out_TD = out_TD.index_add(0, token, pairs.to(out_TD))
        out_TD = self._stand_ins(out_TD, hidden_TD, row_TK, gate_TK)
        return out_TD.to(hidden_TD.dtype)

    def _stand_ins(
        self, out_TD: torch.Tensor, hidden_TD: torch.Tensor, row_TK: torch.Tensor, gate_TK: torch.Tensor
    ) -> torch.Tensor:
        """Return the output with what constants and linear maps give."""
        if self.constant is not None:
            number_TK = (-1 - row_TK).clamp_min(0)
            weight_TK = gate_TK.masked_fill(row_TK >= 0, 0).to(self.constant.dtype)
            # Constants are gathered and added: no matrix product.
            given_TD = F.embedding_bag(number_TK, self.constant, per_sample_weights=weight_TK, mode="sum")
            if self.slots.ranks is not None:
                given_TD = given_TD + self._linear(hidden_TD, number_TK, weight_TK)
            out_TD = out_TD + given_TD.to(out_TD.dtype)
        return out_TD

    def _split(
        self, hidden_TD: torch.Tensor, slot_TK: torch.Tensor, row_TK: torch.Tensor, gate_TK: torch.Tensor
    ) -> torch.Tensor:
        """Return the output when only the main slots run and the others modulate them (arXiv:2503.00634), [T, D]."""
        spec = self.slots.auxiliary
        assert spec is not None
        gate_TK, order = gate_TK.sort(dim=1, descending=True, stable=True)
        slot_TK, row_TK = slot_TK.gather(1, order), row_TK.gather(1, order)
        # Main are the first m slots that have an expert, as long as those before have less than the share of all gates.
        able_TK, total_T1 = row_TK >= 0, gate_TK.sum(1, keepdim=True)
        main_TK = able_TK & (able_TK.cumsum(1) <= spec.main)
        if spec.share < 1:
            main_TK &= gate_TK.cumsum(1) - gate_TK < spec.share * total_T1
        aside_TK = gate_TK.masked_fill(main_TK, 0)
        gate_Tm = gate_TK.masked_fill(~main_TK, 0)
        if spec.renormalise:
            gate_Tm = gate_Tm * (total_T1 / gate_Tm.sum(1, keepdim=True).clamp_min(1e-20))
        out_TD = torch.zeros_like(hidden_TD, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        token, place = main_TK.nonzero().unbind(1)
        row, order = row_TK[token, place].sort(stable=True)
        token, place = token[order], place[order]
        if len(token) and spec.vectors == "none":
            pairs = super().forward(hidden_TD[token], row[:, None], gate_Tm[token, place, None])
            out_TD = out_TD.index_add(0, token, pairs.to(out_TD))
        elif len(token):
            vectors = self._vectors(slot_TK, aside_TK)
            pairs = modulated(self, hidden_TD, token, row, vectors) * gate_Tm[token, place, None]
            out_TD = out_TD.index_add(0, token, pairs.to(out_TD))
        if self.vector_constant is not None:
            weight_TK = aside_TK.masked_fill(~able_TK, 0).to(self.vector_constant.dtype)
            given_TD = F.embedding_bag(slot_TK, self.vector_constant, per_sample_weights=weight_TK, mode="sum")
            out_TD = out_TD + given_TD.to(out_TD)
        return self._stand_ins(out_TD, hidden_TD, row_TK, gate_TK).to(hidden_TD.dtype)

    def _vectors(self, slot_TK: torch.Tensor, aside_TK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return theta = 1 + sum_j alpha'_j delta_j over a token's auxiliary slots, once for each matrix's input."""
        assert self.slots.auxiliary is not None
        # alpha'_j = alpha_j / sum of the auxiliary ones; a token without any is not modulated
        share_TK = aside_TK / aside_TK.sum(1, keepdim=True).clamp_min(1e-20)
        which_TK = slot_TK if self.slots.auxiliary.vectors == "expert" else torch.zeros_like(slot_TK)
        found = {}
        for part in (*Experts(self).inputs, "down"):
            delta = getattr(self, f"vector_{part}")
            mixed = F.embedding_bag(which_TK, delta, per_sample_weights=share_TK.to(delta.dtype), mode="sum")
            found[part] = 1 + mixed
        return found

    def _linear(self, hidden_TD: torch.Tensor, number_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return the gated sum of the linear maps of the stand-ins of each token, [T, D]."""
        assert self.linear_in is not None
        assert self.linear_out is not None
        assert self.slots.ranks is not None
        if number_TK.numel() > len(self.slots.ranks):
            # y_t = sum_R g_(t, owner of R) <x_t, in_R> out_R: two thin products over all maps of the layer.
            gate_TN = weight_TK.new_zeros(len(hidden_TD), len(self.slots.ranks)).scatter_add(1, number_TK, weight_TK)
            inner_TR = F.linear(hidden_TD, self.linear_in)[:, self.linear_input]
            return (inner_TR * gate_TN[:, self.linear_owner]) @ self.linear_out
        # Few tokens, as in decoding: only the rows of the maps that they chose are read.
        step_r = torch.arange(max(self.slots.ranks), device=number_TK.device)
        live_TKr = step_r < self.linear_rank[number_TK][..., None]
        row_TKr = (self.linear_start[number_TK][..., None] + step_r).where(live_TKr, 0)
        inner_TKr = (self.linear_in[self.linear_input[row_TKr]] @ hidden_TD[:, None, :, None])[..., 0]
        weight_TKr = inner_TKr * live_TKr * weight_TK[..., None]
        return F.embedding_bag(
            row_TKr.flatten(1), self.linear_out, per_sample_weights=weight_TKr.flatten(1), mode="sum"
        )

    def stacked(self, name: str, number: torch.Tensor | None = None) -> torch.Tensor:
        """Return a factor of the own parts with the rows of each low-rank expert, zeros where its rank is lower than
        others', [N, r, D or F].

        Args:
            name: ``low_gate_in`` or another one.
            number: which low-rank experts, all when None; only their rows are read.
        """
        rows = getattr(self, name)
        if self.low_row.numel() == len(rows):  # all of one rank: as they lie
            whole = rows.view(*self.low_row.shape, -1)
            return whole if number is None else whole[number]
        row = self.low_row if number is None else self.low_row[number]
        return rows[row.clamp_max(len(rows) - 1)].masked_fill((row == len(rows))[..., None], 0)

    def fill_map(self) -> None:
        """Fill the buffers from the map, on the device of the weights."""
        device, ranks = self.down_proj.device, self.slots.ranks
        self.slot_map = torch.tensor(self.slots.slots, dtype=torch.int32, device=device)
        if self.slots.scales is not None:
            self.slot_scale = torch.tensor(self.slots.scales, device=device)
        if ranks is not None:
            rank_N = torch.tensor(ranks, device=device)
            self.linear_rank, self.linear_start = rank_N, rank_N.cumsum(0) - rank_N
            self.linear_owner = torch.arange(len(ranks), device=device).repeat_interleave(rank_N)
            # A shared input factor serves every map with its first rows.
            row_R = torch.arange(sum(ranks), device=device)
            shared = self.slots.shared_input
            self.linear_input = row_R - self.linear_start[self.linear_owner] if shared else row_R
        if self.slots.low:
            self.low_base = torch.tensor([base for base, _ in self.slots.low], device=device)
            self.low_row = row_table([rank for _, rank in self.slots.low], device)


def _visit(host: Any, hidden_PD: torch.Tensor, slot: int, gate_P1: torch.Tensor) -> torch.Tensor:
    """Run an expert of another layer: that layer's experts module is asked for one of its own slots."""
    device = next(host.parameters()).device  # adapters may be around it
    if device.type != "meta":  # weights that accelerate has put elsewhere: its hooks move the inputs
        hidden_PD, gate_P1 = hidden_PD.to(device), gate_P1.to(device)
    return host(hidden_PD, torch.full_like(gate_P1, slot, dtype=torch.long), gate_P1)
