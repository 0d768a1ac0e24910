"""Redundancy in a terminal: two tables, the experts that need not be stored, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from moefit_cli import output
from moefit_cli.show import paragraph, spans

if TYPE_CHECKING:
    from moefit.inspection.redundancy import Finding, Redundancy

LEGEND = (
    "used: equally used experts with the same entropy; together: share of an expert's tokens that its most frequent "
    "companion runs on too, mean and most; apart: energy that an expert loses when the nearest other one, scaled, "
    "answers for it, mean and least; then the energy that constants and linear maps explain"
)


def show(found: Redundancy) -> None:
    """Print what was found.

    Args:
        found: the redundancy of a model.
    """
    stand_ins = list(found.layers[0].explained)
    short = [name.replace("rank ", "r") for name in stand_ins]
    output.result("")
    output.table(
        ["layer", "experts", "used", "together", "most", "apart", "least", *short],
        [
            [
                str(layer.layer),
                str(len(layer.experts)),
                f"{layer.used:.1f}",
                *map(_percent, (layer.together, layer.most_together, layer.mean_distance, layer.least_distance)),
                *(_percent(layer.explained[name]) for name in stand_ins),
            ]
            for layer in found.layers
        ],
    )
    for line in output.wrapped(LEGEND):
        output.result(Text(line, "dim"))
    _losses(found)
    output.result("")
    for layer in found.layers:
        paragraph(f"layer {layer.layer}", _told(layer.findings))
    output.result("")
    for line in output.wrapped(found.verdict):
        output.result(line)


def _losses(found: Redundancy) -> None:
    """Print what removing loses."""
    from moefit.inspection.verdict import FITTED, PLAIN

    pairs = [(share, name) for share in found.lost for name in (PLAIN, FITTED)]
    rows = [(str(layer.layer), layer.lost) for layer in found.layers] + [("mean", found.lost)]
    shown = [[label, *(f"{lost[share][name]:.2%}" for share, name in pairs)] for label, lost in rows]
    if found.kl is not None:
        shown.append(["KL, nats", *(f"{found.kl[share][name]:.4f}" for share, name in pairs)])
    output.result("")
    output.table(["lost in layer", *(f"{share} {name.replace('rank ', 'r')}" for share, name in pairs)], shown)


def _told(findings: tuple[Finding, ...]) -> list[str]:
    """Return which experts need not be stored, in words."""
    told = []
    for kind in ("dead", "constant"):
        if numbers := [finding.expert for finding in findings if finding.kind == kind]:
            told.append(f"{kind}: {spans(numbers)}")
    for rank in sorted({finding.rank for finding in findings if finding.kind == "linear"}):
        numbers = [finding.expert for finding in findings if finding.kind == "linear" and finding.rank == rank]
        told.append(f"linear of rank {rank}: {spans(numbers)}")
    for finding in findings:
        if finding.of is not None:
            factor = "" if finding.kind == "duplicate" else f"{finding.factor:.3g} x "
            told.append(f"{finding.expert} = {factor}{finding.of}")
    return told or ["no expert is dead, constant, linear or a copy"]


def _percent(share: float) -> str:
    return f"{share:.0%}"
