"""The page: what of a comparison is shown, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moetailor.answers import all_marks
from moetailor.checkpoint.artifact import write_text
from moetailor.checkpoint.place import check_file
from moetailor.report import figures, maps
from moetailor.report.colors import looks
from moetailor.report.drawing import style
from moetailor.report.words import commands, digits, reasons, verdict
from moetailor.words import GRADES, grade, nbytes, pieces

# Cells of a group that are drawn where all would be too many.
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
    environment.filters |= {"digits": digits, "nbytes": nbytes, "sentence": lambda text: text[:1].upper() + text[1:]}
    environment.filters |= {"pieces": pieces, "grade": grade, "level": lambda kl: [*GRADES.values()].index(grade(kl))}
    with style():
        page = environment.get_template("page.html").render(_shown(results))
    check_file(Path(file), "report")
    write_text(Path(file), page)


def _shown(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template takes: the results themselves, and what is made of them."""
    front, titles = set(results["front"]), {n: title for title, group in results["groups"].items() for n in group}
    cells = [
        dict(cell) | {"group": titles[number], "best": number in front} for number, cell in enumerate(results["cells"])
    ]
    measured = [cell for cell in cells if cell["error"] is None]
    original = results["model"]["nbytes"]
    names, drawn = list(results["heldout"]["domains"]), looks(cells)
    groups = []
    for title in results["groups"]:
        ranked = [cell for cell in measured if cell["group"] == title]
        if not ranked:
            continue
        best, others = ranked[:BEST], ranked[BEST:]
        groups.append(
            {
                "name": title,
                "cells": ranked,
                "verdict": verdict(ranked, original),
                "commands": commands(ranked[0], results["model"]["source"], results["calibration"]["folder"]),
                "slots": maps.slots(best, results["usage"], f"What became of every slot, best methods, {title}"),
                "other_slots": others
                and maps.slots(others, results["usage"], f"What became of every slot, other methods, {title}"),
                "domains": names and figures.domains(best, names, f"KL by domain, best methods, {title}", drawn),
            }
        )
    found = {letter for cell in measured for layer in cell["layers"].values() for letter in layer["slots"]}
    first, _, rest = (results["recommendation"] or "").partition(". ")
    return {
        **results,
        "first": f"{first}." if rest else first,
        "rest": rest,
        "colors": {name: color for name, (color, _) in drawn.items()},
        "limits": [f"{words} below {limit:g}" for limit, words in GRADES.items()][:-1],
        "measured": measured,
        "plain": any(not cell["removes"] for cell in measured),
        "failed": [cell for cell in cells if cell["error"] is not None],
        "reasons": reasons([cell for cell in cells if cell["error"] is not None]),
        "groups": groups,
        "answers": [shown for mark, shown in all_marks().items() if mark in found],
        "quality": measured and figures.quality(measured, original, drawn),
        "maps": results["usage"] and maps.usage(results["usage"]),
        "layer_errors": figures.layer_errors(measured),
        "expected_kl": figures.expected_kl(measured, drawn),
    }
