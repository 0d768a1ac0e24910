"""Numbers as the page writes them, and the verdict in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from moetailor.methods.registry import METHODS
from moetailor.words import nbytes

Cell = Mapping[str, Any]


def digits(number: float | None) -> str:
    """Return a number with three digits; from a thousand on whole, under a thousandth with a power of ten."""
    if number is None:
        return "–"
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    if 0 < abs(number) < 0.001:
        return f"{number:.2e}".replace("e-0", "e-")
    return f"{number:#.3g}".rstrip(".")


def reasons(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    """Return why cells failed: their names, what was asked for, and the reason, like ones in one row.

    Args:
        cells: those that failed, each with its ``group``.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        names.setdefault((cell["error"], cell["group"]), []).append(cell["name"])
    groups: dict[tuple[str, str], list[str]] = {}
    for (reason, group), found in names.items():
        groups.setdefault((reason, ", ".join(sorted(found))), []).append(group)
    return [
        (found, "; ".join(group.removeprefix("at most ").removesuffix(" of the bytes") for group in asked), reason)
        for (reason, found), asked in groups.items()
    ]


def verdict(cells: Sequence[Cell], original: int) -> str:
    """Say what the best of a ratio's cells costs, and by how much the next one is worse; its name goes before.

    Args:
        cells: those that were measured, the best first; at least one.
        original: bytes of the original.
    """
    best, rest = cells[0], cells[1:]
    found = best["fidelity"][""]
    kl, before, after = found["kl"], found["original"]["perplexity"], found["compressed"]["perplexity"]
    said = (
        f"stays closest to the original: KL {digits(kl['mean'])} nats a token (95% interval {digits(kl['low'])} to "
        f"{digits(kl['high'])}), perplexity {after:.2f} against {before:.2f} ({after / before - 1:+.1%}), in "
        f"{nbytes(best['nbytes'])}, {best['nbytes'] / original:.0%} of the original."
    )
    if rest:
        other = rest[0]["fidelity"][""]["kl"]
        said += f" Next is {rest[0]['name']} with KL {digits(other['mean'])}"
        if kl["mean"] > 0:
            said += f", {other['mean'] / kl['mean']:,.1f} times as much"
        said += "; their intervals overlap." if other["low"] <= kl["high"] else "."
    native = next((cell for cell in cells if cell["native"]), None)
    if native is best:
        said += " It loads in stock engines."
    elif native is not None:
        said += f" Best of those that load in stock engines is {native['name']}, KL {digits(_kl(native))}."
    return said


def commands(cell: Cell, model: str, calibration: str) -> list[str]:
    """Return what is typed to make a checkpoint of a cell.

    Args:
        cell: of the comparison.
        model: the original, as it was named.
        calibration: the folder of the calibration.
    """
    method = METHODS.get(cell["method"])
    usual = {} if method is None else dict(method().parameters)
    plan = ["moetailor", "plan", calibration, "-o", "plan.json", "--method", cell["method"]]
    for name, value in cell["parameters"].items():
        if name not in usual or usual[name] != value:
            plan += ["-p", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    plan += ["--bits", cell["bits"]] if cell["bits"] else []
    if cell["removes"]:
        asked, _, amount = cell["budget"].partition(" ")
        plan += [f"--{asked}", amount]
    apply = ["moetailor", "apply", model, "plan.json", "-o", "OUT", "--calibration", calibration]
    return [shlex.join(plan), shlex.join(apply)]


def _kl(cell: Cell) -> float:
    return cell["fidelity"][""]["kl"]["mean"]
