"""What loops over codes take where experts in few bits run on a CPU: numba, and its compiling them the first time."""

from __future__ import annotations

from moetailor.checkpoint.devices import is_apart
from moetailor.planning.plan import Plan
from moetailor.planning.work import Work
from moetailor.transform.formats import Format
from moetailor.transform.formats.moetailor import Moetailor

# Bytes of memory that numba brings, and that compiling leaves there (70 to 150 MB were seen); operations that take as
# long as compiling one loop, 4 to 7 s, which the interpreter does as it does these; and loops that run over a text.
NUMBA, COMPILED, STEPS = 70 * 10**6, 100 * 10**6, 400_000
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

    left = max(loops - compiled.kept(), 0)
    return Work(steps=STEPS * left, nbytes=NUMBA + COMPILED * (left > 0))
