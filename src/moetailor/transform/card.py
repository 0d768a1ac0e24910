"""The model card beside the weights: what was done, to which model, under which licence."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from moetailor._version import __version__
from moetailor.checkpoint.hub import name_and_revision
from moetailor.planning.plan import Plan
from moetailor.transform.formats import Format

# Bytes of the original's card in which its front matter must end, and levels that it may have: parsing more would take
# minutes.
LARGEST, DEEPEST = 2**16, 20
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def model_card(plan: Plan, source: Path, form: Format, nbytes: int) -> str:
    """Return README.md of a compressed checkpoint.

    Args:
        plan: what was done.
        source: folder of the original, whose card names the licence.
        form: the form that it is written in.
        nbytes: bytes of all its tensors.
    """
    named = plan.model.source
    hub_name, _ = name_and_revision(named)
    base = hub_name if HUB_NAME.fullmatch(hub_name) and not Path(named).exists() else ""
    licence = original_licence(source)
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    front |= licence | {"library_name": form.library, "tags": ["moetailor", "mixture-of-experts"]}
    name = plain(base or Path(named).name) or "the original"
    parameters = plain(", ".join(f"{key}={value}" for key, value in plan.parameters.items())) or "none"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10**6).rstrip(),
        "---",
        f"# {name}, compressed by moetailor",
        "",
        f"- Method: {plain(plan.method)} (parameters: {parameters})",
        f"- Budget: {plain(plan.budget)}",
        f"- Tensors: {nbytes:,} bytes, the original has {plan.model.nbytes:,}",
        f"- Format: {form.name}. {form.loading}",
        f"- Made by moetailor {__version__}; the plan is in moetailor_plan.json, what it was made from in "
        "moetailor_provenance.json.",
    ]
    if not licence:
        lines.append("- Licence: the original names none here; its terms hold for this model too.")
    return "\n".join(lines) + "\n" + form.example


def plain(text: str) -> str:
    """Return text that is not ours on one line, as Markdown shows it letter by letter."""
    line = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    return re.sub(r"([\\`*\[\]<>&~|$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(line.split()))


def original_licence(folder: Path) -> dict[str, str | list[str]]:
    """Return the licence fields of a model's card, empty when it has none that can be read."""
    if not (folder / "README.md").is_file():
        return {}
    try:
        with open(folder / "README.md", "rb") as card:
            text = card.read(LARGEST).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        if front is None or not _plain_yaml(front[1]):
            return {}
        data = yaml.safe_load(front[1])
    except Exception:  # whatever a file that is not ours makes its readers raise: it names no licence then
        return {}
    given = data if isinstance(data, dict) else {}
    named = {name: given.get(name) for name in ("license", "license_name", "license_link")}
    return {name: words for name, value in named.items() if (words := _one_line(value))}


def _plain_yaml(text: str) -> bool:
    """Say whether YAML can be read in a moment: an alias may stand for many more of its kind, and each level of a tree
    makes all that it holds slower; no card needs either.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            return False
    return True


def _one_line(value: Any) -> str | list[str]:
    """Return a text, or a list of some, each on one line, so that none ends the front matter; else nothing."""
    if isinstance(value, list):
        return [line for word in value if isinstance(line := _one_line(word), str) and line]
    return " ".join(value.split()) if isinstance(value, str) else ""
