"""The methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from moetailor.answers import Width
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


def with_bits(method: str, parameters: Mapping[str, Any], bits: str) -> tuple[Mapping[str, Any], Width | None]:
    """Return parameters and width of a method beside which bits are said: those of a method that
    removes nothing are its parameters.

    Args:
        method: its name.
        parameters: those that are given.
        bits: as `Width.parse` takes them.

    Raises:
        PlanError: no such method, not bits, or parameters say other ones.
    """
    width = Width.parse(bits)
    if find_method(method).removes:
        return parameters, width
    spelled = {"bits": True, "down": width.down, "codes": bits[0].isalpha(), "group": "g" in bits}
    said = {each: getattr(width, each) for each, is_said in spelled.items() if is_said}
    if twice := sorted(each for each in said if str(parameters.get(each, said[each])) != str(said[each])):
        raise PlanError(f"--bits {bits}: parameters say {', '.join(twice)} in another way; say it once")
    return {**parameters, **said}, None
