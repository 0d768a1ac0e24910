"""The cells of a comparison: each method with its parameters, at each share to remove."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moetailor.errors import PlanError, did_you_mean
from moetailor.methods.registry import METHODS, find_method
from moetailor.planning.budget import Budget

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one share.

    Attributes:
        method: its name.
        parameters: all its parameters.
        budget: the share to remove.
    """

    method: str
    parameters: Mapping[str, Any]
    budget: Budget

    @property
    def ratio(self) -> str:
        """The share as people write it, such as ``25%``."""
        return str(self.budget).removeprefix("remove ")

    @property
    def file(self) -> str:
        """Name of its file: method, share and a hash of the parameters."""
        given = json.dumps(self.parameters, sort_keys=True)
        return f"{self.method}-{self.ratio.rstrip('%')}-{hashlib.sha256(given.encode()).hexdigest()[:8]}.json"

    def to_json(self) -> dict:
        """Return what the cell is."""
        named = {"method": self.method, "ratio": self.ratio, "parameters": dict(self.parameters)}
        return named | {"budget": str(self.budget)}


def cells_of(methods: Iterable[str], remove: Iterable[str | float]) -> list[Cell]:
    """Return the cells that some words ask for, ratio by ratio, each once.

    Args:
        methods: names, each with parameters where they are not the defaults: ``linear:rank=4:ranks=chosen``; ``all``
            stands for every method that removes experts and is neither trained nor slow.
        remove: shares to remove.

    Raises:
        PlanError: an unknown method or parameter, a share that cannot be read, or none of them.
    """
    chosen = [found for word in methods for found in _read(word)]
    budgets = {Budget.parse(remove=share) for share in remove}
    if not chosen or not budgets:
        lacking = "--remove 10%,25%,50%" if chosen else "--methods all"
        raise PlanError(f"nothing to compare; name at least one, such as {lacking}")
    cells = [
        Cell(method=name, parameters=parameters, budget=budget)
        for budget in sorted(budgets, key=lambda budget: budget.remove or 0)
        for name, parameters in chosen
    ]
    return list({cell.file: cell for cell in cells}.values())


def _read(word: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the methods that one word names, with all their parameters."""
    if word == ALL:
        quick = sorted(
            name for name, method in METHODS.items() if method.removes and not (method.trained or method.slow)
        )
        return [(name, METHODS[name]().parameters) for name in quick]
    name, *given = word.split(":")
    if name.lower() not in METHODS:
        raise PlanError(f"--methods {word}: no method {name!r}" + did_you_mean(name, [*METHODS, ALL]))
    pairs = [entry.partition("=") for entry in given]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise PlanError(f"--methods {word}: write parameters as {name}:parameter=value")
    method = find_method(name).of({key: value for key, _, value in pairs})
    return [(method.name, method.parameters)]
