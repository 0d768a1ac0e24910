"""What vLLM finds when it goes through all modules: llvmlite's library, which is behind numba, stops it."""

from __future__ import annotations

from typing import Any

from llvmlite.binding import ffi


def show_own_names() -> None:
    """Let llvmlite's library say that it has no ``__dict__``.

    On CPUs vLLM asks this of everything in all modules before it loads a model (triton_utils/dispatcher.py), and reads
    it where the answer is yes. llvmlite says yes to whatever its C library has, and wraps that as a function, so that
    no model loads in a process that has imported numba.
    """
    library: Any = type(ffi.lib)
    given = library.__getattr__

    def found(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return given(self, name)

    library.__getattr__ = found
