"""The page: what of a comparison is shown, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moetailor.answers import ANSWERS
from moetailor.checkpoint.artifact import write_text
from moetailor.checkpoint.place import check_file
from moetailor.report import figures, maps
from moetailor.report.drawing import style
from moetailor.report.words import digits, named, verdict
from moetailor.words import nbytes

# Cells of a ratio that are drawn where all would be too many.
BEST = 3


def write_report(results: Mapping[str, Any], file: str | Path) -> None:
    """Write a comparison as one HTML file that needs nothing else; the same results give the same bytes.

    Args:
        results: as in results.json.
        file: where the page goes.
    """
    environment = Environment(
        loader=PackageLoader("moetailor.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"digits": digits, "nbytes": nbytes}
    with style():
        page = environment.get_template("page.html").render(_shown(results))
    check_file(Path(file), "report")
    write_text(Path(file), page)


def _shown(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template takes: the results themselves, and what is made of them."""
    cells = named(results["cells"])
    measured = [cell for cell in cells if cell["error"] is None]
    original = results["model"]["nbytes"]
    names = list(results["heldout"]["domains"])
    ratios = []
    for ratio in dict.fromkeys(cell["ratio"] for cell in measured):
        ranked = [cell for cell in measured if cell["ratio"] == ratio]
        best, others = ranked[:BEST], ranked[BEST:]
        ratios.append(
            {
                "name": ratio,
                "cells": ranked,
                "verdict": verdict(ranked, original),
                "slots": maps.slots(best, results["usage"], f"What became of every slot, best methods at {ratio}"),
                "other_slots": others
                and maps.slots(others, results["usage"], f"What became of every slot, other methods at {ratio}"),
                "domains": names and figures.domains(best, names, f"KL by domain, best methods at {ratio}"),
            }
        )
    found = {letter for cell in measured for layer in cell["layers"].values() for letter in layer["slots"]}
    return {
        **results,
        "measured": measured,
        "failed": [cell for cell in cells if cell["error"] is not None],
        "ratios": ratios,
        "answers": [(kind.label, kind.color) for kind in ANSWERS.values() if kind.letter in found],
        "quality": measured and figures.quality(measured, original),
        "maps": results["usage"] and maps.usage(results["usage"]),
        "layer_errors": figures.layer_errors(measured),
        "expected_kl": figures.expected_kl(measured),
    }
