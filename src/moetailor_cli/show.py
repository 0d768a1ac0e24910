"""Plans in a terminal: what became of each slot, and where two plans differ."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from moetailor_cli import output

if TYPE_CHECKING:
    from moetailor import Plan
    from moetailor.planning.layer_plan import LayerPlan

# Slots in a block, and the columns before them.
BLOCK, LABEL = 8, 9


def show(name: str, plan: Plan, *, scores: bool = False) -> None:
    """Print what becomes of every slot, a grid for each layer that changes.

    Args:
        name: what the plan is called.
        plan: the plan.
        scores: also print what the method ranked the experts by.
    """
    from moetailor.answers import all_marks

    _header(name, plan)
    layers = _layers(plan)
    found = Counter(answer.mark for layer in layers.values() for answer in layer.answers)
    legend = [
        Text.assemble((mark, color), f" {label} {found[mark]:,}")
        for mark, (label, color) in all_marks().items()
        if found[mark]
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
            listed = [f"{number}{layer.answers[number].mark} {score:.4g}" for number, score in ranked]
            paragraph("", listed or ["the method gave no scores"], ", ")
    if whole := [label for label, layer in layers.items() if layer.untouched]:
        paragraph("whole", [f"layers {', '.join(whole)}"])


def ranking(name: str, plan: Plan) -> None:
    """Print how the experts of each layer rank, a line of JSON each, the first to go first.

    Args:
        name: what the plan is called.
        plan: the plan.

    Raises:
        PlanError: its method gave no scores.
    """
    from moetailor.errors import PlanError

    layers = {stack.index: plan.layers[stack.prefix] for stack in plan.model.stacks if stack.prefix in plan.layers}
    if not all(layer.scores for layer in layers.values()):
        raise PlanError(f"{name}: {plan.method} gave no scores; plan by a method that ranks, such as reap")
    for index, layer in layers.items():
        # Those that stay are last, protected ones too.
        stay = set(layer.kept_slots)
        order = sorted(range(len(layer.scores)), key=lambda slot: (slot in stay, layer.scores[slot], slot))
        scores = [layer.scores[slot] for slot in order]
        print(json.dumps({"layer": index, "experts": order, "scores": scores, "stay": len(stay)}))


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
    from moetailor.words import spans

    changed: dict[str, list[int]] = {}
    for number in range(len(before.slots)):
        was, becomes = (layer.answers[number].describe() for layer in (before, after))
        if was != becomes:
            changed.setdefault(f"{was} -> {becomes}", []).append(number)
    told = [f"{what}: {spans(numbers)}" for what, numbers in changed.items()]
    return len(before.slots) - sum(map(len, changed.values())), told


def _header(name: str, plan: Plan) -> None:
    from moetailor.transform.formats import resolve_format
    from moetailor.words import nbytes

    before, after, where = plan.model.nbytes, plan.nbytes, resolve_format(plan, "auto").name
    output.result(Text(name, "bold"))
    sizes = f"{nbytes(before)} becomes {nbytes(after)} ({after / before:.1%}, {where})"
    paragraph("", [f"{plan.method}, {plan.budget}: {sizes}"])
    paragraph("", [f"{key}={value}" for key, value in plan.parameters.items()], ", ")


def _layers(plan: Plan) -> dict[str, LayerPlan]:
    """Return every MoE layer's plan by its number, untouched ones too; multi-token prediction as ``mtp``."""
    from moetailor.planning.layer_plan import untouched

    return {
        f"mtp{stack.prefix.rpartition('.')[2]}" if stack.index is None else str(stack.index): plan.layers.get(
            stack.prefix, untouched(stack.num_experts)
        )
        for stack in plan.model.stacks
    }


def _grid(label: str, layer: LayerPlan) -> None:
    """Print a character for each slot, in blocks of eight and as many lines as the terminal needs."""
    slots = layer.answers
    blocks = [
        Text.assemble(*((answer.mark, answer.marks()[answer.mark][1]) for answer in slots[start : start + BLOCK]))
        for start in range(0, len(slots), BLOCK)
    ]
    row = max(1, (output.width() - LABEL + 1) // (BLOCK + 1))
    for start in range(0, len(blocks), row):
        output.result(Text(f"{label if start == 0 else '':<{LABEL}}") + Text(" ").join(blocks[start : start + row]))


def _answers(layer: LayerPlan) -> list[str]:
    """Return what must be said beyond the letters: which answers have fields, and in which slots."""
    from moetailor.words import spans

    found: dict[str, list[int]] = {}
    for number, answer in enumerate(layer.answers):
        if answer.describe() != answer.label:
            found.setdefault(answer.describe(), []).append(number)
    return [f"{said}: {spans(numbers)}" for said, numbers in sorted(found.items(), key=lambda item: item[1][0])]


def paragraph(label: str, parts: Sequence[str], between: str = "; ") -> None:
    """Print parts beside a label, wrapped to the terminal."""
    wrapped = textwrap.wrap(between.join(parts), max(output.width() - LABEL, 20), break_on_hyphens=False)
    for number, line in enumerate(wrapped):
        output.result(f"{label if number == 0 else '':<{LABEL}}{line}")
