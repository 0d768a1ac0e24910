"""A comparison in a terminal: what is advised, what loses least within each ratio or size, what failed and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from moetailor_cli import output

COLUMNS = ("method", "KL, nats", "95%", "perplexity", "top-1", "size", "plan, s")


def show(results: Mapping[str, Any]) -> None:
    """Print what a comparison found.

    Args:
        results: as in results.json.
    """
    from moetailor.report.words import reasons
    from moetailor.words import nbytes

    original, whole = results["original"], results["model"]["nbytes"]
    front = set(results["front"])
    failed = []
    for title, numbers in results["groups"].items():
        cells = {number: results["cells"][number] for number in numbers}
        failed += [dict(cell) | {"group": title} for cell in cells.values() if cell["error"] is not None]
        measured = {number: cell for number, cell in cells.items() if cell["error"] is None}
        if measured:
            output.result(Text(title, "bold"))
            rows = [_row(cell, whole, number in front) for number, cell in measured.items()]
            output.table(COLUMNS, rows)
            output.result("")
    for names, asked, reason in reasons(failed):
        output.text(f"{names} ({asked}): {reason}")
    if failed:
        output.result("")
    perplexity = f"perplexity {original['perplexity']['']:.2f}, " if original["perplexity"] else ""
    output.result(f"original: {perplexity}{nbytes(whole)}")
    if front:
        output.result("* no other row is as small and as close to the original")
    if found := results["spearman"]:
        told = ", ".join(
            f"{name.removesuffix(' of the bytes') or 'all cells'} {rho:.2f}" for name, rho in found.items()
        )
        output.text(f"expected against measured KL, Spearman: {told}")
    if results["recommendation"]:
        output.result("")
        output.text(results["recommendation"])


def _row(cell: Mapping[str, Any], whole: int, best: bool) -> list[str]:
    found = cell["fidelity"][""]
    kl = found["kl"]
    return [
        f"{'*' if best else ' '}{cell['name']}",
        f"{kl['mean']:.3g}",
        f"± {(kl['high'] - kl['low']) / 2:.1g}",
        f"{found['compressed']['perplexity']:.2f}",
        f"{found['top1_agreement']['mean']:.1%}",
        f"{cell['nbytes'] / whole:.1%}",
        f"{cell['seconds']['plan'] + cell['seconds']['apply']:.1f}",
    ]
