"""What a method is, in words: what the command line and docs/methods.md say of it."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from moetailor.answers import ANSWERS, Answer
from moetailor.calibration.statistics import ON_REQUEST
from moetailor.methods.method import AtLeast, Method

KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter.

    Attributes:
        name: as in ``-p name=value``.
        kind: what it may be.
        default: what it is when nobody says.
        meaning: what it does.
    """

    name: str
    kind: str
    default: Any
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """One method.

    Attributes:
        name: as the command line knows it.
        summary: what it does, in a sentence.
        text: what else is said of it, perhaps nothing.
        about: what was published and what is different here, in paragraphs; those that are indented are formulas.
        paper: where it comes from, perhaps nothing.
        becomes: the kinds of answers that may stand behind a slot whose expert goes.
        statistics: what it reads of a calibration.
        options: what a calibration must be made with for that.
        reads_weights: whether it reads the experts, or sampled tokens.
        notes: what else sets it apart, in phrases.
        parameters: its parameters.
    """

    name: str
    summary: str
    text: str
    about: str
    paper: str
    becomes: tuple[type[Answer], ...]
    statistics: tuple[str, ...]
    options: tuple[str, ...]
    reads_weights: bool
    notes: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def describe(method: type[Method]) -> Description:
    """Describe a method: from its facts, its annotations and its docstrings."""
    summary, _, text = (inspect.getdoc(method) or "").partition("\n\nAttributes:")[0].partition("\n")
    about = inspect.getdoc(sys.modules[method.__module__]) or ""
    kinds = {method.replaces_with.kind, *method.builds}
    notes = {
        "--remove is a share of all bytes": method.remove_counts_bytes,
        "of use without removing an expert": method.useful_whole,
        "made to be trained (moetailor recover)": method.trained,
        "slow: it searches": method.slow,
    }
    return Description(
        name=method.name,
        summary=summary,
        text=text.strip(),
        about=about.partition("\n\n")[2],
        paper=method.paper,
        # An answer that keeps the slot's own expert is none of a slot whose expert goes.
        becomes=tuple(ANSWERS[kind] for kind in ANSWERS if kind in kinds and not _keeps(ANSWERS[kind])),
        statistics=tuple(sorted(method.needs)),
        options=tuple(f"--{option}" for name, option in ON_REQUEST.items() if name in method.needs),
        reads_weights=method.reads_weights,
        notes=tuple(note for note, holds in notes.items() if holds),
        parameters=tuple(_parameters(method)),
    )


def _keeps(kind: type[Answer]) -> bool:
    return kind.standing_for(1).expert(0) == 0


def _parameters(method: type[Method]) -> list[Parameter]:
    hints, meanings = get_type_hints(method, include_extras=True), _meanings(inspect.getdoc(method) or "")
    return [
        Parameter(
            name=field.name,
            kind=_kind(hints[field.name]),
            default=field.default,
            meaning=meanings[field.name],
        )
        for field in fields(method)
    ]


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint)[:-1]) + f" or {get_args(hint)[-1]}"
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        return KINDS[kind] + "".join(f", at least {limit.least}" for limit in limits if isinstance(limit, AtLeast))
    return KINDS[hint]


def _meanings(docstring: str) -> dict[str, str]:
    """Return what a docstring says of each attribute, each on one line."""
    entries = re.split(r"\n    (?=\w+: )", docstring.partition("\nAttributes:")[2])
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries if entry.strip())
    return {name: meaning for name, _, meaning in pairs}
