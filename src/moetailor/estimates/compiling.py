"""What loops over codes take where experts in few bits run on a CPU: numba, and its compiling them the first time."""

from __future__ import annotations

from moetailor.checkpoint.devices import is_apart
from moetailor.planning.plan import Plan
from moetailor.planning.work import Work
from moetailor.transform.formats import Format
from moetailor.transform.formats.moetailor import Moetailor

# Bytes of memory that numba brings, and that compiling leaves there; operations that take as long as compiling one
# loop, which the interpreter does as it does these: 5 to 7 s, and about two of them run over a text.
NUMBA, COMPILED, STEPS = 70 * 10**6, 70 * 10**6, 450_000
LOOPS = 2


def runs_loops(plan: Plan, form: Format | None = None) -> bool:
    """Say whether experts of a result lie in few bits of ours: those of compressed-tensors are its library's to open.

    Args:
        plan: the plan.
        form: the form of the result; None in memory.
    """
    ours = form is None or form.name == Moetailor.name
    return ours and any(layer.packed for layer in plan.layers.values())


def of_loops(device: str, loops: int = LOOPS) -> Work:
    """Return the work of some loops before they run, and the memory that they take.

    Args:
        device: where experts run.
        loops: how many.
    """
    if is_apart(device):
        return Work()
    from moetailor.checkpoint.storage import compiled  # numba takes half a second

    return Work(nbytes=NUMBA) if compiled.kept() else Work(steps=STEPS * loops, nbytes=NUMBA + COMPILED)
