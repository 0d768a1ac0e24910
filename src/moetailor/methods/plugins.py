"""Methods of other packages, found by their entry points in the group ``moetailor.methods``.

One that cannot be used is left out and named; nobody else's work waits for it.
"""

from __future__ import annotations

import inspect
import warnings
from importlib.metadata import EntryPoint, entry_points

from moetailor.errors import MoetailorWarning, reason_of
from moetailor.methods.method import Method
from moetailor.methods.registry import METHODS, register

GROUP = "moetailor.methods"


def load_plugins() -> None:
    """Register the methods that installed packages bring: each entry point is called as its method, and names its
    class.
    """
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            why = _registered(entry)
        except Exception as error:  # whatever code that is not ours raises
            why = f"cannot be loaded ({reason_of(error)})"
        if why is not None:
            package = entry.dist.name if entry.dist is not None else entry.value
            told = f"{package}: its method {entry.name!r} {why}; it is left out until the package is mended or removed"
            warnings.warn(told, MoetailorWarning, stacklevel=2)


def _registered(entry: EntryPoint) -> str | None:
    """Register a method; return why not, if it is refused."""
    if entry.name in METHODS:
        return f"has the name of one that is there already, of {METHODS[entry.name].__module__.partition('.')[0]}"
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, Method)):
        return f"is no method: {entry.value} is no class that comes from moetailor.methods.method.Method"
    if inspect.isabstract(found):
        return f"is no method: {entry.value} lacks {', '.join(sorted(found.__abstractmethods__))}"
    if found.name != entry.name:
        return f"calls itself {found.name!r}"
    register(found)
    return None
