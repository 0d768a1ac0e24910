"""Answers as JSON, by kind: slots alone, or with fields that say more: ``"drop": [1, {"into": 4, "slots": [2]}]``."""

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
    """Return some answers as JSON values: for each kind its slots, with the fields that are not at their defaults.

    Args:
        answers: by slot.
    """
    groups: dict[str, list] = {}
    for kind in ANSWERS.values():
        alike: dict[Answer, list[int]] = {}
        for slot, answer in sorted(answers.items()):
            if type(answer) is kind:
                alike.setdefault(answer, []).append(slot)
        found = [(_given(answer), slots) for answer, slots in alike.items()]
        plain = [slot for given, slots in found if not given for slot in slots]
        if group := plain + [{**given, "slots": slots} for given, slots in found if given]:
            groups[kind.kind] = group
    return groups


def read_groups(
    entry: Mapping[str, Any],
    slots: int,
    where: str,
    *,
    experts: int = MOST_SLOTS,
    error: type[MoetailorError],
    cure: str,
) -> dict[int, Answer]:
    """Read what `write_groups` gave, perhaps edited by hand; keys that name no kind are left alone.

    Args:
        entry: the JSON values.
        slots: how many the layer has.
        where: what they were read from.
        experts: how many the layer has, which answers may refer to.
        error: what is raised.
        cure: what to do: the end of the message.

    Raises:
        MoetailorError: of the given class: a field does not fit, a slot is named twice or is not there.
    """
    found: dict[int, Answer] = {}
    for name, kind in ANSWERS.items():
        if name not in entry:
            continue
        for group in read(list[int | dict[str, Any]], entry[name], f"{where}, {name}", error=error, cure=cure):
            given = {"slots": [group]} if isinstance(group, int) else group
            named = read(list[int], given.get("slots"), f"{where}, {name}, slots", error=error, cure=cure)
            stated = {field: value for field, value in given.items() if field != "slots"}
            answer = read(kind, stated, f"{where}, {name} of slots {named[:8]}", error=error, cure=cure)
            other = getattr(answer, kind.refers) if kind.refers else None
            for slot in named:
                if not 0 <= slot < slots or not 0 <= (other or 0) < experts:
                    told = f"slot {slot}" if other is None else f"slot {slot} or its expert {other}"
                    raise error(f"{where}: {told} is outside 0..{slots - 1}; {cure}")
                if slot in found:
                    raise error(f"{where}: slot {slot} is named twice; {cure}")
                found[slot] = answer
    return found


def _given(answer: Answer) -> dict[str, Any]:
    values = {field.name: (getattr(answer, field.name), field.default) for field in fields(answer)}
    return {name: value for name, (value, default) in values.items() if value != default}
