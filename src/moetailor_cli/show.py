"""Plans in a terminal: what became of each slot, and where two plans differ."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.text import Text

from moetailor_cli import output

if TYPE_CHECKING:
    from moetailor import Plan
    from moetailor.planning.slots import LayerPlan

# One character for each slot, with its name and colour; plain characters, so that pipes and NO_COLOR lose nothing.
MARKS = {
    "#": ("kept", "green"),
    "f": ("fitted", "bright_green"),
    ".": ("dropped", "red"),
    "c": ("constant", "yellow"),
    "l": ("linear", "cyan"),
    "m": ("merged", "magenta"),
    ">": ("remapped", "blue"),
    "b": ("low rank over a base", "bright_blue"),
}
KINDS = {"drop": ".", "constant": "c", "linear": "l", "merged": "m", "lowrank": "b"}
# Slots in a block, and the columns before them.
BLOCK, LABEL = 8, 9


def show(name: str, plan: Plan, *, scores: bool = False) -> None:
    """Print what becomes of every slot, a grid for each layer that changes.

    Args:
        name: what the plan is called.
        plan: the plan.
        scores: also print what the method ranked the experts by.
    """
    _header(name, plan)
    layers = _layers(plan)
    found = Counter(_mark(layer, number) for layer in layers.values() for number in range(len(layer.slots)))
    legend = [
        Text.assemble((mark, MARKS[mark][1]), f" {MARKS[mark][0]} {found[mark]:,}") for mark in MARKS if found[mark]
    ]
    output.result(Text("   ").join(legend))
    output.result(Text("layer, experts that stay, slots:", "dim"))
    for label, layer in layers.items():
        if layer.untouched:
            continue
        _grid(f"{label:>4} {layer.stored:>3}", layer)
        paragraph("", _answers(layer))
        if scores:
            ranked = sorted(enumerate(layer.scores), key=lambda at: (-at[1], at[0]))
            listed = [f"{number}{_mark(layer, number)} {score:.4g}" for number, score in ranked]
            paragraph("", listed or ["the method gave no scores"], ", ")
    if whole := [label for label, layer in layers.items() if layer.untouched]:
        paragraph("whole", [f"layers {', '.join(whole)}"])


def diff(names: Sequence[str], plans: Sequence[Plan]) -> None:
    """Print which slots two plans of one model answer differently.

    Args:
        names: what the two are called.
        plans: the two.

    Raises:
        PlanError: they are for different models.
    """
    from moetailor.errors import PlanError

    facts, others = (plan.model.shapes() for plan in plans)
    if differs := [fact for fact in facts if facts[fact] != others[fact]]:
        raise PlanError(f"{names[0]} and {names[1]} are for different models: their {differs[0]} is not the same")
    for name, plan in zip(names, plans, strict=True):
        _header(name, plan)
    output.result("")
    one, other = (_layers(plan) for plan in plans)
    same: list[str] = []
    alike = 0
    for label, before in one.items():
        agree, told = _changes(before, other[label])
        alike += agree
        if told:
            paragraph(f"{label:>4}", [f"{agree} of {len(before.slots)} alike", *told])
        else:
            same.append(label)
    if same:
        paragraph("alike", [f"layers {', '.join(same)}"])
    total = sum(len(layer.slots) for layer in one.values())
    output.result(f"{alike:,} of {total:,} slots have the same answer in both ({alike / total:.1%})")


def _changes(before: LayerPlan, after: LayerPlan) -> tuple[int, list[str]]:
    """Return how many slots of a layer agree, and what changes of the others and of the layer as a whole."""
    changed: dict[str, list[int]] = {}
    for number in range(len(before.slots)):
        was, becomes = (_answer(layer, number) for layer in (before, after))
        if was != becomes:
            changed.setdefault(f"{was} -> {becomes}", []).append(number)
    told = [f"{what}: {spans(numbers)}" for what, numbers in changed.items()]
    was, becomes = (", ".join(_whole(layer)) or "none" for layer in (before, after))
    agree = len(before.slots) - sum(map(len, changed.values()))
    return agree, told + ([f"{was} -> {becomes}"] if was != becomes else [])


def _header(name: str, plan: Plan) -> None:
    before, after, where = plan.model.nbytes, plan.nbytes, "native" if plan.native else "moetailor"
    output.result(Text(name, "bold"))
    sizes = f"{output.nbytes(before)} becomes {output.nbytes(after)} ({after / before:.1%}, {where} format)"
    paragraph("", [f"{plan.method}, {plan.budget}: {sizes}"])
    paragraph("", [f"{key}={value}" for key, value in plan.parameters.items()], ", ")


def _layers(plan: Plan) -> dict[str, LayerPlan]:
    """Return every MoE layer's plan by its number, untouched ones too; multi-token prediction as ``mtp``."""
    from moetailor.planning.slots import Slot, keep_only

    return {
        f"mtp{stack.prefix.rpartition('.')[2]}" if stack.index is None else str(stack.index): plan.layers.get(
            stack.prefix, keep_only(stack.num_experts, range(stack.num_experts), Slot("drop"))
        )
        for stack in plan.model.stacks
    }


def _grid(label: str, layer: LayerPlan) -> None:
    """Print a character for each slot, in blocks of eight and as many lines as the terminal needs."""
    marks = [_mark(layer, number) for number in range(len(layer.slots))]
    blocks = [
        Text.assemble(*((mark, MARKS[mark][1]) for mark in marks[start : start + BLOCK]))
        for start in range(0, len(marks), BLOCK)
    ]
    row = max(1, (output.width() - LABEL + 1) // (BLOCK + 1))
    for start in range(0, len(blocks), row):
        output.result(Text(f"{label if start == 0 else '':<{LABEL}}") + Text(" ").join(blocks[start : start + row]))


def _answers(layer: LayerPlan) -> list[str]:
    """Return what must be said beyond the marks: who answers, at which rank, merged with whom."""
    found: dict[str, list[int]] = {}
    for number, slot in sorted(enumerate(layer.slots), key=lambda at: (at[1].expert or 0, at[1].rank, at[0])):
        if slot.kind in ("linear", "lowrank") or _mark(layer, number) == ">":
            found.setdefault(_answer(layer, number), []).append(number)
    merged = {f"merged into {centre}": members for centre, members in layer.merged.items()}
    found |= {what: members for what, members in merged.items() if len(members) > 1}
    return [f"{answer}: {spans(numbers)}" for answer, numbers in found.items()] + _whole(layer)


def _whole(layer: LayerPlan) -> list[str]:
    """Return what a plan says of a layer as a whole."""
    split = asdict(layer.auxiliary) if layer.auxiliary else {}
    told = ["linear maps share their input"] if layer.shared_input else []
    return told + (["auxiliary slots: " + ", ".join(f"{key}={value}" for key, value in split.items())] if split else [])


def _mark(layer: LayerPlan, number: int) -> str:
    slot, answer = layer.slots[number], _answer(layer, number)
    if answer == "fitted":
        return "f"
    if slot.kind != "expert":
        return KINDS[slot.kind]
    return "#" if answer == "kept" else ">"


def _answer(layer: LayerPlan, number: int) -> str:
    """Return what stands behind a slot, in words."""
    slot = layer.slots[number]
    if layer.is_fitted(number):
        return "fitted"
    if slot.kind == "expert":
        where = "" if slot.layer is None else f" of layer {slot.layer}"
        scale = "" if slot.scale == 1.0 else f" x {slot.scale:.3g}"
        return f"expert {slot.expert}{where}{scale}" if slot.expert != number or where or scale else "kept"
    return {
        "drop": "dropped" if slot.expert is None else f"dropped, merged into {slot.expert}",
        "constant": "constant",
        "linear": f"linear of rank {slot.rank}",
        "merged": f"merged into {slot.expert}",
        "lowrank": f"rank {slot.rank} over base {slot.expert}",
    }[slot.kind]


def spans(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs drawn together, such as ``1 4-7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def paragraph(label: str, parts: Sequence[str], between: str = "; ") -> None:
    """Print parts beside a label, wrapped to the terminal."""
    wrapped = textwrap.wrap(between.join(parts), max(output.width() - LABEL, 20), break_on_hyphens=False)
    for number, line in enumerate(wrapped):
        output.result(f"{label if number == 0 else '':<{LABEL}}{line}")
