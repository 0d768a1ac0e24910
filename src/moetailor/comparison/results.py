"""What a comparison found, as JSON: a cell, the usage of the experts by domain, and how well errors foretell the KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from scipy.stats import spearmanr

from moetailor.calibration.folder import Calibration
from moetailor.comparison.cells import Cell
from moetailor.comparison.probe import LayerError
from moetailor.evaluation.fidelity import Fidelity
from moetailor.evaluation.speed import Speed
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.plan import Plan

MEASURED = "nbytes seconds native fidelity speed resident expected_kl layers".split()


def cell_result(
    cell: Cell,
    plan: Plan,
    *,
    seconds: Mapping[str, float],
    fidelity: Mapping[str, Fidelity],
    speed: Speed,
    resident: int,
    errors: Mapping[int, LayerError],
    sensitivities: Mapping[str, float] | None,
) -> dict:
    """Return a measured cell.

    Args:
        cell: what it is.
        plan: its plan.
        seconds: of its stages.
        fidelity: on all text and on each domain.
        speed: of the compressed model.
        resident: bytes of its weights in memory.
        errors: of its layers.
        sensitivities: nats a token for each unit of squared error a token, by layer.
    """
    experts = {stack.index: stack.num_experts for stack in plan.model.stacks}
    layers = {
        str(index): {
            "expected": error.expected / max(error.energy[0], 1e-300),
            "measured": error.measured / max(error.energy[1], 1e-300),
            "slots": letters(plan.by_layer[index] if index in plan.by_layer else untouched(experts[index])),
        }
        for index, error in errors.items()
    }
    expected = None
    if sensitivities is not None:
        expected = sum(sensitivities[str(index)] * error.expected for index, error in errors.items())
    return cell.to_json() | {
        "error": None,
        "nbytes": plan.nbytes,
        "seconds": dict(seconds),
        "native": plan.native,
        "fidelity": {name: found.to_json() for name, found in fidelity.items()},
        "speed": asdict(speed),
        "resident": resident,
        "expected_kl": expected,
        "layers": layers,
    }


def layers_of(calibration: Calibration) -> dict[str, int]:
    """Return the experts of each calibrated layer, as results.json names layers."""
    return {str(stack.index): stack.num_experts for stack in calibration.model.stacks if stack.index is not None}


def failed(cell: Cell, error: Exception) -> dict:
    """Return a cell that could not be measured: why, and nothing else."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return cell.to_json() | {"error": reason[0]} | dict.fromkeys(MEASURED)


def letters(plan: LayerPlan) -> str:
    """Return one letter a slot, see `Answer.letter`."""
    return "".join(answer.letter for answer in plan.answers)


def usage(calibration: Calibration) -> dict[str, dict[str, list[float]]]:
    """Return which share of a layer's routed pairs each expert gets, over the sampled tokens: of all (``""``) and of
    each domain, by layer.
    """
    names, domain = calibration.domains
    found: dict[str, dict[str, list[float]]] = {}
    for layer in calibration.layers:
        index, experts = calibration.sample(layer).index, len(calibration.sums(layer).count)
        parts = {"": index} | {name: index[domain == number] for number, name in enumerate(names) if name}
        found[str(layer)] = {
            name: (torch.bincount(part.flatten(), minlength=experts) / max(part.numel(), 1)).tolist()
            for name, part in parts.items()
        }
    return found


def ranked(cells: Sequence[dict]) -> list[dict]:
    """Return cells ratio by ratio as they come, the lowest KL of each first, failed ones last."""
    ratios = list(dict.fromkeys(cell["ratio"] for cell in cells))
    return sorted(cells, key=lambda cell: (ratios.index(cell["ratio"]), cell["error"] is not None, kl_of(cell)))


def kl_of(cell: dict) -> float:
    """Return the KL of a cell on all text; infinite for a failed one."""
    return float("inf") if cell["error"] else cell["fidelity"][""]["kl"]["mean"]


def spearman(cells: Sequence[dict]) -> dict[str, float] | None:
    """Return the rank correlation of expected and measured KL, over all cells (``""``) and inside each ratio.

    It says something of three cells or more that are not all alike; None when that is nowhere so.
    """
    known = [cell for cell in cells if cell["expected_kl"] is not None]
    groups = {"": known} | {
        ratio: [cell for cell in known if cell["ratio"] == ratio] for ratio in dict.fromkeys(c["ratio"] for c in known)
    }
    found = {}
    for name, group in groups.items():
        expected, measured = [cell["expected_kl"] for cell in group], [kl_of(cell) for cell in group]
        if len(group) >= 3 and len(set(expected)) > 1 and len(set(measured)) > 1:
            correlation: Any = spearmanr(expected, measured)
            found[name] = float(correlation.statistic)
    return found or None
