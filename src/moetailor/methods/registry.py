"""The methods by name."""

from __future__ import annotations

from typing import TypeVar

from moetailor.calibration.statistics import STATISTICS
from moetailor.errors import PlanError, did_you_mean
from moetailor.methods.method import Method

METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Register a class of methods under its name."""
    name, unknown = method.name, method.needs - STATISTICS
    assert name == name.lower(), f"{name}: names are written in small letters"
    assert not unknown, f"{name}: no statistics called {unknown}"
    assert name not in METHODS, f"{name} is registered twice"
    METHODS[name] = method
    return method


def find_method(name: str) -> type[Method]:
    """Return a method by name, however it is capitalised.

    Raises:
        PlanError: there is none of that name.
    """
    if name.lower() not in METHODS:
        raise PlanError(f"no method {name!r}" + did_you_mean(name, METHODS))
    return METHODS[name.lower()]
