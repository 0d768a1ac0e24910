"""What `moetailor inspect --calibration` predicts against what is measured: safe losses, and how well they rank.

One calibration of the reference model says what each layer loses when constants or linear maps answer for a share of
its experts. Then some layers are compressed that way at a time (`mone` with its exact error and optimal constants, and
`linear`) and the predictions compared with the original's on held-out text. Writes every cell, Spearman's correlation
between predicted and measured KL, and the highest KL below the thresholds that the verdict calls safe.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moetailor
from measure import REFERENCE, provenance
from moetailor.evaluation.fidelity import Reference
from moetailor.inspection.redundancy import REMOVE
from moetailor.inspection.verdict import SAFE_KL, SAFE_LOST

# What answers for removed experts, and the method and parameters that do it.
ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("mone", {"score": "exact", "novice": "optimal"}),
    "rank 2": ("linear", {"rank": 2}),
    "rank 8": ("linear", {"rank": 8}),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One compression: what was expected, and what was measured on held-out text.

    Attributes:
        layers: layers that were compressed.
        remove: share of their experts that went.
        answer: what answers for them.
        lost: mean over all layers of the share of energy that was expected to be lost.
        expected: KL that was expected, nats a token.
        kl: KL that was measured.
        perplexity: the compressed model's, as a factor of the original's.
        top1: share of tokens for which both rank the same word first.
    """

    layers: tuple[int, ...]
    remove: str
    answer: str
    lost: float
    expected: float
    kl: float
    perplexity: float
    top1: float


def measure(
    found: moetailor.Redundancy,
    calibration: moetailor.Calibration,
    reference: Reference,
    layers: tuple[int, ...],
    remove: str,
    answer: str,
) -> Cell:
    """Compress some layers in memory and compare."""
    method, parameters = ANSWERS[answer]
    plan = moetailor.make_plan(
        calibration, method, moetailor.Budget.parse(remove=remove), parameters=parameters, layers=layers
    )
    model, original = (
        AutoModelForCausalLM.from_pretrained(calibration.model.source, dtype="float32").eval() for _ in range(2)
    )
    fidelity = reference.compare(moetailor.apply(plan, model, calibration=calibration), original)[""]
    parts = [(layer, layer.lost[remove][answer]) for layer in found.layers if layer.layer in layers]
    return Cell(
        layers=layers,
        remove=remove,
        answer=answer,
        lost=sum(lost for _, lost in parts) / len(found.layers),
        expected=sum((layer.sensitivity or 0) * layer.energy * lost for layer, lost in parts),
        kl=fidelity.kl.mean,
        perplexity=fidelity.compressed_perplexity.mean / fidelity.original_perplexity.mean,
        top1=fidelity.top1_agreement.mean,
    )


def line(cell: Cell) -> str:
    """Return a cell as a row of a table."""
    where = ",".join(map(str, cell.layers))
    return (
        f"| {where} | {cell.remove} | {cell.answer} | {cell.lost:.3%} | {cell.expected:.5f} | {cell.kl:.5f} "
        f"| {cell.perplexity:.4f} | {cell.top1:.1%} |"
    )


def correlations(cells: list[Cell]) -> list[str]:
    """Return Spearman's correlations with the measured KL, over all cells and inside each ratio."""
    lines = []
    for name in ("lost", "expected"):
        for ratio in ("", *REMOVE):
            some = [cell for cell in cells if ratio in ("", cell.remove)]
            rho = spearmanr([getattr(cell, name) for cell in some], [cell.kl for cell in some]).statistic
            lines.append(f"Spearman of {name} and KL, {ratio or 'all'}, {len(some)} cells: {rho:.3f}")
    return lines


def thresholds(cells: list[Cell]) -> list[str]:
    """Return what was measured on either side of what the verdict calls safe."""
    lines = []
    for name, limit in (("lost", SAFE_LOST), ("expected", SAFE_KL)):
        for side, some in (
            ("safe", [cell for cell in cells if getattr(cell, name) <= limit]),
            ("not safe", [cell for cell in cells if getattr(cell, name) > limit]),
        ):
            if some:
                low, high = min(cell.kl for cell in some), max(cell.kl for cell in some)
                worst = max(cell.perplexity for cell in some)
                agree = min(cell.top1 for cell in some)
                lines.append(
                    f"{side} by {name} {limit}: {len(some)} cells, KL {low:.5f} to {high:.5f}, perplexity up to x "
                    f"{worst:.4f}, same top word at least {agree:.1%}"
                )
    return lines


@torch.no_grad()
def main() -> None:
    """Measure every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REFERENCE), help="folder or hub name (default: the reference model)")
    parser.add_argument("--calibration-data", default=str(REFERENCE / "calibration.jsonl"))
    parser.add_argument("--heldout-data", default=str(REFERENCE / "heldout.jsonl"))
    parser.add_argument("--sequences", type=int, default=64, help="held-out blocks of 256 (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write every cell to this file")
    options = parser.parse_args()
    logging.disable_progress_bar()
    print(" ".join(f"{name} {value}" for name, value in provenance().items()))
    with tempfile.TemporaryDirectory() as scratch:
        text = moetailor.TextOptions(data=(options.calibration_data,), sequences=128, length=256, batch_size=16)
        sample = moetailor.SampleOptions(tokens=128 * 256)
        calibration = moetailor.calibrate(
            options.model, Path(scratch) / "calibration", text=text, sample=sample, sensitivity=True
        )
        heldout = moetailor.TextOptions(
            data=(options.heldout_data,), sequences=options.sequences, length=256, batch_size=8
        )
        batches = moetailor.read_batches(heldout, AutoTokenizer.from_pretrained(options.model))
        reference = Reference(Path(scratch) / "reference", batches)
        reference.record(AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval())
        found = moetailor.find_redundancy(calibration)
        every = tuple(calibration.layers)
        half = len(every) // 2
        groups = [*((layer,) for layer in every), every[:half], every[half:], every]
        cells = []
        for layers in groups:
            for remove in REMOVE:
                for answer in ANSWERS:
                    cells.append(measure(found, calibration, reference, layers, remove, answer))
                    print(line(cells[-1]), flush=True)
    print("\n".join([*correlations(cells), *thresholds(cells)]))
    if options.json is not None:
        rows = [cell.__dict__ for cell in cells]
        options.json.write_text(json.dumps({"about": provenance(), "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
