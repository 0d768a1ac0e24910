"""What a comparison found, as JSON: a cell, the usage of the experts by domain, and how well errors foretell the KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr

from moetailor._version import __version__
from moetailor.calibration.effects import Prices
from moetailor.calibration.folder import Calibration
from moetailor.calibration.text import TextOptions
from moetailor.comparison.cells import Cell
from moetailor.comparison.frontier import front, kl_of, recommendation
from moetailor.comparison.probe import LayerError
from moetailor.comparison.stored import VERSION
from moetailor.evaluation.fidelity import Fidelity
from moetailor.evaluation.speed import Speed
from moetailor.planning.budget import Budget
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.plan import Plan
from moetailor.transform.formats import resolve_format
from moetailor.words import nbytes

if TYPE_CHECKING:
    from moetailor.comparison.bench import Bench

MEASURED = "nbytes seconds native fidelity speed resident expected_kl layers".split()


def cell_result(
    cell: Cell,
    plan: Plan,
    *,
    seconds: Mapping[str, float],
    fidelity: Mapping[str, Fidelity],
    speed: Speed | None,
    resident: int | None,
    errors: Mapping[int, LayerError] | None,
    prices: Prices | None,
) -> dict:
    """Return a measured cell.

    Args:
        cell: what it is.
        plan: its plan.
        seconds: of its stages.
        fidelity: on all text and on each domain.
        speed: of the compressed model; None where it was not measured, as with the next two.
        resident: bytes of its weights in memory.
        errors: of its layers.
        prices: what errors cost the predictions; None where it was not measured.
    """
    layers = {}
    for stack in plan.model.stacks:
        if stack.index is not None:
            error = None if errors is None else errors[stack.index]
            layer = plan.by_layer[stack.index] if stack.index in plan.by_layer else untouched(stack.num_experts)
            layers[str(stack.index)] = _relative(error) | {"slots": letters(layer)}
    return cell.to_json() | {
        "error": None,
        "nbytes": plan.nbytes,
        "seconds": dict(seconds),
        "native": resolve_format(plan, "auto").name != "moetailor",
        "fidelity": {name: found.to_json() for name, found in fidelity.items()},
        "speed": None if speed is None else asdict(speed),
        "resident": resident,
        "expected_kl": _expected(plan, errors, prices),
        "layers": layers,
    }


def _relative(error: LayerError | None) -> dict[str, float | None]:
    """Return the errors of a layer as shares of the original output's square."""
    if error is None:
        return {"expected": None, "measured": None}
    before, after = (max(energy, 1e-300) for energy in error.energy)
    return {"expected": error.expected / before, "measured": error.measured / after}


def _expected(plan: Plan, errors: Mapping[int, LayerError] | None, prices: Prices | None) -> float | None:
    """Return the KL that the errors of layers let expect; what the method expected, if it did, where they are unknown.

    Rounding makes errors of another kind than the loss of experts. In layers that have both they cannot be told apart
    afterwards: there it is what the method expected, if it priced both.
    """
    if errors is None:
        return plan.expected
    if prices is None:
        return None
    rounded = {index: bool(layer.widths) for index, layer in plan.by_layer.items()}
    whole = {index: replace(layer, widths={}).untouched for index, layer in plan.by_layer.items()}
    if plan.expected is not None and any(rounded[index] and not whole[index] for index in rounded):
        return plan.expected
    noisy = {index for index in rounded if rounded[index] and whole[index]}
    parts = {i: (0.0, each.expected) if i in noisy else (each.expected, 0.0) for i, each in errors.items()}
    return sum(prices.expected(parts).values())


def layers_of(calibration: Calibration) -> dict[str, int]:
    """Return the experts of each calibrated layer, as results.json names layers."""
    return {str(stack.index): stack.num_experts for stack in calibration.model.stacks if stack.index is not None}


def failed(cell: Cell, error: Exception) -> dict:
    """Return a cell that could not be measured: why, and nothing else."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return cell.to_json() | {"error": reason[0]} | dict.fromkeys(MEASURED)


def letters(plan: LayerPlan) -> str:
    """Return one letter a slot, see `Answer.marks`."""
    return "".join(answer.mark for answer in plan.answers)


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


def grouped(cells: Sequence[tuple[Cell, dict]], whole: int) -> dict[str, list[dict]]:
    """Return results under what was asked for, from the mildest down, the lowest KL of each first, failed ones last.

    What was planned to a size stands under that size; a row that has its own bytes under the smallest size that it
    fits.

    Args:
        cells: each cell with its result.
        whole: bytes of the original.
    """
    asked = {cell.budget.in_bytes(whole).size: _title(cell.budget, whole) for cell, _ in cells}
    sizes = sorted((size for size in asked if size is not None), reverse=True)
    larger = "more bytes than asked for"
    found: dict[str, list[dict]] = {title: [] for title in [larger, *(asked[size] for size in sizes)]}
    for cell, result in cells:
        title = _title(cell.budget, whole)
        if sizes and not cell.method.removes:
            title = next((asked[size] for size in reversed(sizes) if size >= (result["nbytes"] or whole)), larger)
        found.setdefault(title, []).append(result)
    return {
        title: sorted(group, key=lambda c: (c["error"] is not None, kl_of(c)))
        for title, group in found.items()
        if group
    }


def _title(budget: Budget, whole: int) -> str:
    """Return what stands above the rows of a budget."""
    size = budget.in_bytes(whole).size
    if size is None:
        return str(budget).removeprefix("remove ") + " removed"
    part = f"{100 * size / whole:.4g}% of the bytes"
    return f"at most {part}" if budget.share is not None else f"at most {nbytes(size)}, {part}"


def spearman(groups: Mapping[str, Sequence[dict]]) -> dict[str, float] | None:
    """Return the rank correlation of expected and measured KL, over all cells (``""``) and inside each group.

    It says something of three cells or more that are not all alike; None when that is nowhere so.
    """
    found = {}
    for name, group in {"": [cell for cells in groups.values() for cell in cells], **groups}.items():
        known = [cell for cell in group if cell["expected_kl"] is not None]
        expected, measured = [cell["expected_kl"] for cell in known], [kl_of(cell) for cell in known]
        if len(known) >= 3 and len(set(expected)) > 1 and len(set(measured)) > 1:
            correlation: Any = spearmanr(expected, measured)
            found[name] = float(correlation.statistic)
    return found or None


def sensitivities_of(calibration: Calibration) -> dict[str, float] | None:
    """Return the sensitivity of each layer by its name in JSON; None where it was not measured."""
    found = calibration.sensitivities()
    return None if found is None else {str(layer): sensitivity for layer, sensitivity in found.items()}


def results_of(
    bench: Bench, held_out: TextOptions, asked: Sequence[Cell], found: Sequence[dict], device: str, calibrated: float
) -> dict:
    """Return what stands in results.json.

    Args:
        bench: where it was measured.
        held_out: the text.
        asked: the cells.
        found: their results.
        device: where models ran.
        calibrated: seconds.
    """
    import transformers

    calibration, original = bench.calibration, bench.original
    facts, text = calibration.model, calibration.fingerprint["text"]
    groups = grouped(list(zip(asked, found, strict=True)), facts.nbytes)
    cells = [cell for group in groups.values() for cell in group]
    numbers = iter(range(len(cells)))
    limits = [cell.budget.in_bytes(facts.nbytes).size for cell in asked]
    sizes = sorted({size for size in limits if size is not None})
    fidelity = next((cell["fidelity"] for cell in cells if not cell["error"]), {})
    return {
        "format": "moetailor-comparison",
        "version": VERSION,
        "model": {
            "source": bench.source.source,
            "model_type": facts.model_type,
            "nbytes": facts.nbytes,
            "top_k": facts.top_k,
            "layers": layers_of(calibration),
        },
        "about": {
            "moetailor": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "device": device,
            "seconds": {"calibrate": calibrated, "reference": original["seconds"]},
        },
        "calibration": {
            "data": calibration.fingerprint.get("options", {}).get("data", []),
            "tokens": text["tokens"],
            "folder": str(calibration.folder),
        },
        "heldout": {
            "data": list(held_out.data),
            "tokens": sum(batch.input_ids.numel() for batch in bench.batches),
            "domains": {name: part["tokens"] for name, part in fidelity.items() if name},
        },
        "original": {
            "perplexity": {name: part["original"]["perplexity"] for name, part in fidelity.items()},
            **{name: original[name] for name in (*(each.name for each in fields(Speed)), "resident")},
        },
        "usage": usage(calibration),
        "sensitivities": sensitivities_of(calibration),
        "cells": cells,
        "groups": {title: [next(numbers) for _ in group] for title, group in groups.items()},
        "front": front(cells),
        "recommendation": recommendation(cells, sizes, facts.nbytes) if sizes else None,
        "spearman": spearman(groups),
    }
