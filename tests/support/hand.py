"""A layer small enough to work out by hand."""

from contextlib import nullcontext

import torch
from torch import nn

from moetailor.calibration.effects import Prices
from moetailor.calibration.statistics import Sample, Sums
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.planning.view import LayerView


def sums_of(pairs: list[tuple[int, float, list[float]]], experts: int, tokens: int) -> Sums:
    """Add up (expert, gate, output) triples, one for each routed pair."""
    width = len(pairs[0][2])
    sums = Sums.zeros(experts, width)
    sums.tokens += tokens
    for expert, g, output in pairs:
        y = torch.tensor(output, dtype=torch.float64)
        norm = float(y.norm())
        for name, value in {
            "count": 1,
            "gate": g,
            "gate_sq": g * g,
            "norm": norm,
            "gated_norm": g * norm,
            "gate_sq_norm": g * g * norm,
            "norm_sq": norm**2,
            "gate_sq_norm_sq": (g * norm) ** 2,
        }.items():
            getattr(sums, name)[expert] += value
        sums.output[expert] += y
        sums.gated_output[expert] += g * y
        sums.gate_sq_output[expert] += g * g * y
        sums.norm_max[expert] = max(float(sums.norm_max[expert]), norm)
    return sums


def prices_of(*coarse: float, noise: float = 1.0, flips: float = 0.0) -> Prices:
    """Return prices of errors of layers 0, 1, ..."""
    every = range(len(coarse))
    return Prices(
        coarse=dict(enumerate(coarse)),
        noise=dict.fromkeys(every, noise),
        flips=dict.fromkeys(every, flips),
        together=(),
    )


def layer_of(
    sums: Sums, *, sample: Sample | None = None, module: nn.Module | None = None, **fields: object
) -> LayerView:
    """Make the view a method sees."""

    def missing() -> None:
        raise AssertionError("this method should not need that")

    shape = ExpertShape(width=sums.output.shape[1], intermediate=1) if module is None else Experts(module).shape
    options = {"index": 0, "num_experts": len(sums.count), "top_k": 1, "groups": 1, "shape": shape} | fields
    return LayerView(
        **options,
        read_sums=lambda: sums,
        read_sample=missing if sample is None else lambda: sample,
        read_correction=missing,
        open_experts=missing if module is None else lambda: nullcontext(Experts(module)),
    )


class TinyExperts(nn.Module):
    """Experts whose output is their down matrix times silu(gate x) * (up x), one expert a call of `outputs`."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.cat([gate, up], 1))
        self.down_proj = nn.Parameter(down)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate) * up

    def forward(self, x_TD: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        rows = []
        for x, index, weight in zip(x_TD, index_TK[:, 0], gate_TK[:, 0], strict=True):
            gate, up = (self.gate_up_proj[index] @ x).chunk(2)
            rows.append(weight * (self.down_proj[index] @ (nn.functional.silu(gate) * up)))
        return torch.stack(rows)
