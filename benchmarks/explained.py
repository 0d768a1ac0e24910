"""How linear the experts of the reference model are: the share of their gated output energy that stand-ins explain.

For each layer, sum g^2 |y|^2 over routed tokens and experts, and what is left of it when each expert becomes its
optimal constant, a linear map of some rank, the best other expert (scaled), or that plus a constant. Everything is
fitted on calibration tokens and measured on them and on held-out text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import moetailor
from measure import REFERENCE, provenance
from moetailor.fitting.reduced_rank import Moments, Regression
from moetailor.methods.run import view_of
from moetailor.planning.view import LayerView

RANKS = (0, 2, 4, 8, 16)


def tokens_of(layer: LayerView, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sampled inputs that chose an expert and the squares of its gates there."""
    token, gate = layer.routed(expert)
    return layer.sample.hidden[token], gate.double().square()


def left_by_maps(fit: LayerView, text: LayerView, expert: int, ridge: float) -> torch.Tensor:
    """Return the energy of an expert on some text and what maps of each rank leave of it, [1 + ranks]."""
    x, q = tokens_of(fit, expert)
    found = Regression(Moments.of(x, fit.experts.outputs(expert, x), q)).solve(max(RANKS), ridge)
    x, q = tokens_of(text, expert)
    y = text.experts.outputs(expert, x)
    errors = found.errors(x, y, q)
    energy = (q * y.double().square().sum(1)).sum()
    return torch.stack([energy, *(errors[min(rank, len(errors) - 1)] for rank in RANKS)])


def left_by_others(fit: LayerView, text: LayerView, expert: int) -> torch.Tensor:
    """Return what the best other expert leaves, scaled, and scaled plus a constant; both are chosen on `fit`, [2]."""
    (x, q), (x_text, q_text) = tokens_of(fit, expert), tokens_of(text, expert)
    y, y_text = fit.experts.outputs(expert, x).double(), text.experts.outputs(expert, x_text).double()
    best = [(torch.inf, torch.zeros(())), (torch.inf, torch.zeros(()))]
    for other in set(range(fit.num_experts)) - {expert}:
        z, z_text = fit.experts.outputs(other, x).double(), text.experts.outputs(other, x_text).double()
        for number, centred in enumerate((False, True)):
            share = (q / q.sum())[:, None]
            my, mz = ((share * part).sum(0) if centred else part.new_zeros(part.shape[1]) for part in (y, z))
            scale = (share * (y - my) * (z - mz)).sum() / (share * (z - mz).square()).sum()
            seen = (q * (y - my - scale * (z - mz)).square().sum(1)).sum()
            left = (q_text * (y_text - my - scale * (z_text - mz)).square().sum(1)).sum()
            best[number] = min(best[number], (float(seen), left), key=lambda pair: pair[0])
    return torch.stack([left for _, left in best])


def explained(
    calibration: moetailor.Calibration, heldout: moetailor.Calibration, layer: int, ridge: float
) -> list[list[float]]:
    """Return the shares explained on calibration tokens and on held-out ones."""
    weights = moetailor.ExpertWeights(calibration.model.source)
    fit = view_of(calibration, layer, weights)
    rows = []
    for text in (fit, view_of(heldout, layer, weights)):
        total: Any = 0
        for expert in range(fit.num_experts):
            if all(len(tokens_of(view, expert)[0]) > 1 for view in (fit, text)):
                parts = left_by_maps(fit, text, expert, ridge), left_by_others(fit, text, expert)
                total = total + torch.cat([part.double() for part in parts])
        rows.append([float(1 - left / total[0]) for left in total[1:]])
    return rows


def main() -> None:
    """Print one table for calibration tokens and one for held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REFERENCE), help="folder or hub name (default: the reference model)")
    parser.add_argument("--ridge", type=float, default=0.03, help="of the regression (default %(default)s)")
    options = parser.parse_args()
    print(" ".join(f"{name} {value}" for name, value in provenance().items()))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        made = []
        for name in ("calibration", "heldout"):
            text = moetailor.TextOptions(
                data=(str(REFERENCE / f"{name}.jsonl"),), sequences=128, length=256, batch_size=16
            )
            sample = moetailor.SampleOptions(tokens=128 * 256)
            made.append(moetailor.calibrate(options.model, Path(scratch) / name, text=text, sample=sample))
        rows = {layer: explained(*made, layer, options.ridge) for layer in made[0].layers}
    names = ["constant", *(f"rank {rank}" for rank in RANKS[1:]), "other expert", "other and constant"]
    for number, what in enumerate(("calibration tokens", "held-out tokens")):
        print(f"\n| layer, {what} | {' | '.join(names)} |")
        print("|---" * (len(names) + 1) + "|")
        for layer, both in rows.items():
            print(f"| {layer} | {' | '.join(f'{share:.3f}' for share in both[number])} |")


if __name__ == "__main__":
    main()
