"""Redundancy in a terminal: two tables, the experts that need not be stored, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetailor_cli import output
from moetailor_cli.show import paragraph

if TYPE_CHECKING:
    from moetailor.inspection.redundancy import Finding, Redundancy

LEGEND = (
    "bits: entropy of usage; used: so many equally used experts have as much; together: share of an expert's tokens "
    "that its most frequent companion runs on too, mean and most; apart: energy that an expert loses when the nearest "
    "other one, scaled, answers for it, mean and least; then the energy that constants and linear maps explain"
)


def show(found: Redundancy) -> None:
    """Print what was found.

    Args:
        found: the redundancy of a model.
    """
    from moetailor.words import spans

    _usage(found)
    _losses(found)
    output.result("")
    nothing = [layer.layer for layer in found.layers if not layer.findings]
    for layer in found.layers:
        if layer.findings:
            paragraph(f"layer {layer.layer}", _told(layer.findings))
    if nothing:
        paragraph("layers", [f"{spans(nothing)}: no expert is dead, constant, linear or a copy"])
    output.result("")
    output.text(found.verdict)


def _usage(found: Redundancy) -> None:
    """Print how the experts of each layer are used and how they differ."""
    stand_ins = list(found.layers[0].explained)
    names = [name.replace("rank ", "r").replace("constant", "const") for name in stand_ins]
    rows = []
    for layer in found.layers:
        shares = [layer.together, layer.most_together, layer.mean_distance, layer.least_distance]
        shares += [layer.explained[name] for name in stand_ins]
        counts = [str(layer.layer), f"{layer.entropy:.2f}", f"{layer.used:.1f}", str(len(layer.experts))]
        rows.append([*counts, *(f"{share:.0%}" for share in shares)])
    output.result("")
    output.table(["layer", "bits", "used", "of", "together", "most", "apart", "least", *names], rows)
    output.text(LEGEND, "dim")


def _losses(found: Redundancy) -> None:
    """Print what removing loses."""
    from moetailor.inspection.verdict import FITTED, PLAIN

    pairs = [(share, name) for share in found.lost for name in (PLAIN, FITTED)]
    rows = [(str(layer.layer), layer.lost) for layer in found.layers] + [("mean", found.lost)]
    shown = [[label, *(f"{lost[share][name]:.2%}" for share, name in pairs)] for label, lost in rows]
    if found.kl is not None:
        shown.append(["KL, nats", *(f"{found.kl[share][name]:.4f}" for share, name in pairs)])
    output.result("")
    output.table(["lost in layer", *(f"{share} {name.replace('rank ', 'r')}" for share, name in pairs)], shown)


def _told(findings: tuple[Finding, ...]) -> list[str]:
    """Return which experts need not be stored, in words."""
    from moetailor.words import spans

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
    return told
