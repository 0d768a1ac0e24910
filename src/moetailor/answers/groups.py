"""Answers as JSON, grouped by what they are: ``"drop": [1, 4], "linear": [{"rank": 8, "slots": [2, 3]}]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moetailor.answers.answer import ANSWERS, Answer
from moetailor.errors import MoetailorError
from moetailor.schema import read

# More slots than any router has: what a file says may not make us count without end.
MOST_SLOTS = 2**16


def write_groups(answers: Mapping[int, Answer]) -> dict[str, list]:
    """Return some answers as JSON values: of each kind the slots, with the fields that are not at their defaults.

    Args:
        answers: by slot.
    """
    groups: dict[str, list] = {}
    for kind in ANSWERS.values():
        alike: dict[Answer, list[int]] = {}
        for slot, answer in sorted(answers.items()):
            if type(answer) is kind:
                alike.setdefault(answer, []).append(slot)
        if alike and not fields(kind):
            groups[kind.kind] = alike.popitem()[1]
        elif alike:
            groups[kind.kind] = [{**_given(answer), "slots": slots} for answer, slots in alike.items()]
    return groups


def read_groups(
    entry: Mapping[str, Any], size: int, where: str, *, error: type[MoetailorError], cure: str
) -> dict[int, Answer]:
    """Read what `write_groups` gave, perhaps edited by hand; keys that name no kind are left alone.

    Args:
        entry: the JSON values.
        size: slots of the layer.
        where: what they were read from.
        error: what is raised.
        cure: what to do: the end of the message.

    Raises:
        MoetailorError: of the given class: a field does not fit, a slot is named twice or is not there.
    """
    found: dict[int, Answer] = {}
    for name, kind in ANSWERS.items():
        if name not in entry:
            continue
        groups = entry[name] if fields(kind) else [{"slots": entry[name]}]
        for group in read(list[dict[str, Any]], groups, f"{where}, {name}", error=error, cure=cure):
            slots = read(list[int], group.get("slots"), f"{where}, {name}, slots", error=error, cure=cure)
            given = {field: value for field, value in group.items() if field != "slots"}
            answer = read(kind, given, f"{where}, {name} of slots {slots[:8]}", error=error, cure=cure)
            other = getattr(answer, kind.refers) if kind.refers else None
            for slot in slots:
                if not 0 <= slot < size or not 0 <= (other or 0) < size:
                    raise error(f"{where}: slot {slot} or its expert {other} is outside 0..{size - 1}; {cure}")
                if slot in found:
                    raise error(f"{where}: slot {slot} is named twice; {cure}")
                found[slot] = answer
    return found


def _given(answer: Answer) -> dict[str, Any]:
    values = {field.name: (getattr(answer, field.name), field.default) for field in fields(answer)}
    return {name: value for name, (value, default) in values.items() if value != default}
