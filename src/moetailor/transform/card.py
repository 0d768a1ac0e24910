"""The model card beside the weights: what was done, to which model, under which licence."""

from __future__ import annotations

from pathlib import Path

import yaml

from moetailor._version import __version__
from moetailor.planning.plan import Plan
from moetailor.transform.formats import Format


def model_card(plan: Plan, source: Path, form: Format) -> str:
    """Return README.md of a compressed checkpoint.

    Args:
        plan: what was done.
        source: folder of the original, whose card names the licence.
        form: the form that it is written in.
    """
    base = plan.model.source if plan.model.source.count("/") == 1 and not Path(plan.model.source).exists() else ""
    front = [f"base_model: {base}", "base_model_relation: quantized"] if base else []
    licence = original_licence(source)
    front += [f"{name}: {value}" for name, value in licence.items()]
    front += ["library_name: transformers", "tags:", "- moetailor", "- mixture-of-experts"]
    name = base or Path(plan.model.source).name or "the original"
    parameters = ", ".join(f"{key}={value}" for key, value in plan.parameters.items()) or "none"
    lines = [
        "---",
        *front,
        "---",
        f"# {name}, compressed by moetailor",
        "",
        f"- Method: {plan.method} (parameters: {parameters})",
        f"- Budget: {plan.budget}",
        f"- Tensors: {plan.nbytes:,} bytes, the original has {plan.model.nbytes:,}",
        f"- Format: {form.name}. {form.loading}",
        f"- Made by moetailor {__version__}; the plan is in moetailor_plan.json, what it was made from in "
        "moetailor_provenance.json.",
    ]
    if not licence:
        lines.append("- Licence: the original names none here; its terms hold for this model too.")
    return "\n".join(lines) + "\n" + form.example


def original_licence(folder: Path) -> dict[str, str]:
    """Return the licence fields of a model's card, empty when it has none."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    _, fence, rest = card.read_text(encoding="utf-8").partition("---\n")
    front, closed, _ = rest.partition("\n---")
    try:
        data = yaml.safe_load(front) if fence and closed else None
    except yaml.YAMLError:
        data = None
    data = data if isinstance(data, dict) else {}
    return {name: str(data[name]) for name in ("license", "license_name", "license_link") if data.get(name)}
