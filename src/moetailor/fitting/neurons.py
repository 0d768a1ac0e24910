"""The neurons of an expert: how much each gives, and a down projection fitted to those that stay.

Shapes: T tokens, F neurons, n of them that stay, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moetailor.fitting.held_out import held_out_masks
from moetailor.fitting.least_squares import SCARCE, NormalEquations, chosen_ridge
from moetailor.fitting.tokens import Tokens
from moetailor.planning.view import LayerView

# Of the mean of the moments' diagonal, added to it where neurons are chosen.
RIDGE = 0.01
Matrices = Mapping[str, torch.Tensor]


def energies(hidden_TF: torch.Tensor, weight_T: torch.Tensor, down_DF: torch.Tensor, peak: float) -> torch.Tensor:
    """Return |w_j|^2 ((1 - a) sum_t q_t h_tj^2 + a max_t q_t h_tj^2) of each neuron j, float64 [F].

    Args:
        hidden_TF: h, what the down projection is applied to.
        weight_T: q, squared gates.
        down_DF: the down projection, with columns w_j.
        peak: a.
    """
    given_TF = weight_T[:, None].to(hidden_TF.device) * hidden_TF.double().square()
    most = given_TF.amax(0) if len(given_TF) else torch.zeros_like(given_TF.sum(0))
    return down_DF.double().square().sum(0) * ((1 - peak) * given_TF.sum(0) + peak * most)


def least_missed(hidden_TF: torch.Tensor, weight_T: torch.Tensor, down_DF: torch.Tensor, count: int) -> torch.Tensor:
    """Return the neurons that stay when one goes after the other, always the one whose absence costs least once all
    others make up for it (Optimal Brain Surgeon), ascending [n].

    Args:
        hidden_TF: what the down projection is applied to.
        weight_T: squared gates.
        down_DF: the down projection.
        count: n.
    """
    wide_TF = hidden_TF * weight_T[:, None].sqrt().to(hidden_TF)
    gram = (wide_TF.T @ wide_TF).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-300)
    inverse, down = torch.cholesky_inverse(torch.linalg.cholesky(gram)), down_DF.double().clone()
    stays = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(len(gram) - count):
        # |w_j|^2 / C^-1_jj, and what the others become: W - w_j C^-1_j / C^-1_jj
        cost = (down.square().sum(0) / inverse.diagonal()).masked_fill(~stays, torch.inf)
        gone = int(cost.argmin())
        row = inverse[gone] / inverse[gone, gone]
        down -= down[:, gone, None] * row
        inverse -= inverse[:, gone, None] * row
        stays[gone] = False
        # kept apart from rounding, which would make a pivot of what is gone
        inverse[gone], inverse[:, gone], inverse[gone, gone] = 0, 0, 1
        down[:, gone] = 0
    return stays.nonzero().flatten()


def fitted_down(
    layer: LayerView, expert: int, tokens: Tokens, matrices: Matrices, hidden_TF: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return the down projection [D, n] with which some neurons give best what all gave:

        min over W of sum_t q_t |f(x_t) - b - W h_t|^2 + lambda |(W - W0) S|^2

    as strong as loses least on tokens that were held out; W0, their columns as they are, where no fit helps these.

    Args:
        layer: the layer.
        expert: the expert.
        tokens: that say what it does.
        matrices: its own.
        hidden_TF: what its down projection is applied to there.
        kept: the neurons that stay, [n].
    """
    p_Tn, prior = hidden_TF[:, kept], matrices["down"][:, kept]
    y_TD = layer.outputs(expert, tokens.place).to(p_Tn) - matrices.get("down_bias", torch.zeros(1)).to(p_Tn)
    weight_T = tokens.weight.to(p_Tn.device)
    every = NormalEquations.zeros(len(prior), len(kept), p_Tn.device)
    every.add(p_Tn, y_TD, weight_T)
    parts = []
    for mask in held_out_masks(tokens.place[: tokens.own], SCARCE * len(kept)):
        part, held = NormalEquations.zeros(len(prior), len(kept), p_Tn.device), mask.nonzero().flatten().to(p_Tn.device)
        part.add(p_Tn[held], y_TD[held], weight_T[held])
        parts.append(part)
    return chosen_ridge(every, parts, prior).to(prior)
