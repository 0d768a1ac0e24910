"""Pairs of a token and what runs for it, sorted, and products grouped by that. Shapes follow from the call's alone,
but where pairs for which nothing runs are left out.

Shapes: T tokens, K slots of a token, P = T K pairs, n things that run, I inputs, O outputs, D model width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Pairs:
    """The pairs of a call by the number of what runs for them; those for which nothing runs are last, or left out.

    Args:
        x_TD: tokens.
        number_TK: what runs for each slot, negative for nothing.
        count: how many different things there are, n.
        live: whether pairs for which nothing runs are left out, so that shapes follow from what the router chose.

    Attributes:
        x_PD: input of each pair.
        number_P: what runs for it; n for nothing.
        ends_n: number of pairs up to the last one of each thing, int32.
    """

    def __init__(self, x_TD: torch.Tensor, number_TK: torch.Tensor, count: int, *, live: bool = False) -> None:
        self.count, self.shape, self.live = count, number_TK.shape, live
        self.number_P, self._order_P = number_TK.where(number_TK >= 0, count).flatten().sort(stable=True)
        self.ends_n = ends(self.number_P, count)
        if live:
            many = int(self.ends_n[-1])
            self.number_P, self._order_P = self.number_P[:many], self._order_P[:many]
        self._token_P = self._order_P // number_TK.shape[1]
        self.x_PD = x_TD[self._token_P]

    def summed(self, y_PD: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of what the pairs of each token gave, float32 [T, D].

        Args:
            y_PD: what they gave; anything at all where nothing runs.
            weight_TK: their weights.
        """
        if self.live:
            gated_PD = y_PD * weight_TK.flatten()[self._order_P, None]
            return gated_PD.new_zeros(self.shape[0], y_PD.shape[1]).index_add_(0, self._token_P, gated_PD)
        y_PD = y_PD.float().masked_fill((self.number_P == self.count)[:, None], 0)
        y_TKD = y_PD[self._order_P.argsort()].view(*self.shape, -1)
        return (y_TKD * weight_TK[..., None]).sum(1)


def ends(number_P: torch.Tensor, count: int) -> torch.Tensor:
    """Return how many ascending numbers there are up to each of 0 .. count - 1, int32."""
    every = torch.arange(count, device=number_P.device)
    return torch.searchsorted(number_P, every, right=True, out_int32=True)


@torch.library.custom_op("moetailor_vllm::grouped", mutates_args=())
def grouped(x_PI: torch.Tensor, weight_nIO: torch.Tensor, ends_n: torch.Tensor) -> torch.Tensor:
    """Return x W of each pair with the matrix of its number, [P, O]; anything at all behind the last end.

    An operator of its own, as torch traces its own in bfloat16 only, though it runs in float32, too.

    Args:
        x_PI: inputs, sorted by number.
        weight_nIO: a matrix for each number.
        ends_n: where the pairs of each number end.
    """
    return F.grouped_mm(x_PI, weight_nIO, offs=ends_n)


@grouped.register_fake
def _(x_PI: torch.Tensor, weight_nIO: torch.Tensor, ends_n: torch.Tensor) -> torch.Tensor:
    return x_PI.new_empty(x_PI.shape[0], weight_nIO.shape[2])
