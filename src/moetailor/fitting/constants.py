"""Constants in place of experts, from what calibration summed. Shapes: E experts, D model width."""

from __future__ import annotations

from typing import Literal

import torch

from moetailor.calibration.statistics import Sums

Mean = Literal["mean", "gate_mean", "optimal", "zero"]


def constants(sums: Sums, mean: Mean = "optimal", shrinkage: float = 0.0) -> torch.Tensor:
    """Return a constant for every expert of a layer, float64 [E, D]; zero for one that no token reached.

    Args:
        sums: the layer's.
        mean: ``mean`` = sum y / n, ``gate_mean`` = sum g y / sum g, ``optimal`` = sum g^2 y / sum g^2, or ``zero``.
        shrinkage: c = (n c_e + kappa c_layer) / (n + kappa), with kappa this number and c_layer the same mean over all
            experts.
    """
    output, weight = {
        "mean": (sums.output, sums.count),
        "gate_mean": (sums.gated_output, sums.gate),
        "optimal": (sums.gate_sq_output, sums.gate_sq),
        "zero": (torch.zeros_like(sums.output), sums.count),
    }[mean]
    constant = output / torch.where(weight > 0, weight, torch.ones_like(weight))[:, None]
    if shrinkage:
        everyone = output.sum(0) / weight.sum().clamp_min(1e-300)
        share = (sums.count / (sums.count + shrinkage))[:, None]
        constant = share * constant + (1 - share) * everyone
    return constant


def constant_errors(sums: Sums) -> torch.Tensor:
    """Return the squared error of the layer's output when an expert becomes its optimal constant, float64 [E].

    L_e = (sum g^2 |y|^2 - |sum g^2 y|^2 / sum g^2) / T

    Args:
        sums: the layer's.
    """
    error = sums.gate_sq_norm_sq - sums.gate_sq_output.square().sum(1) / sums.gate_sq.clamp_min(1e-300)
    return error.clamp_min(0) / sums.tokens


def on_new_text(sums: Sums, errors: torch.Tensor) -> torch.Tensor:
    """Return what errors of experts should be on other text, float64 [E, answers].

    Most of what an expert puts out comes from few tokens. One that few tokens reached may have met none of those, and a
    choice among many experts takes those of which too little was seen. So each counts as if one more token had reached
    it, with an output as large as the largest of the layer's experts typically are. One that no token reached errs in
    proportion to that as the layer's other experts do to what they put out.

    Args:
        sums: the layer's.
        errors: squared errors a token that answers add to the layer's output, on the text of the calibration.
    """
    energy = sums.gate_sq_norm_sq / sums.tokens
    live = energy > 0
    if not bool(live.any()):
        return errors
    # max |y|^2 mean g^2 / T, in the middle of the experts
    more = (sums.norm_max.double().square() * sums.gate_sq / sums.count)[live].median() / sums.tokens
    shares = (errors[live].sum(0) / energy[live].sum()).repeat(len(errors), 1)
    shares[live] = errors[live] / energy[live, None]
    return errors + more * shares
