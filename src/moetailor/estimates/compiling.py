"""What loops over codes take where experts in few bits run on a CPU: numba, and its compiling them the first time."""

from __future__ import annotations

from moetailor.checkpoint.devices import is_apart
from moetailor.methods.registry import find_method
from moetailor.planning.plan import Plan
from moetailor.planning.work import Work
from moetailor.transform.formats import Format
from moetailor.transform.formats.moetailor import Moetailor

# Bytes of memory that numba brings, and that compiling leaves there (70 to 150 MB were seen); operations that take as
# long as compiling one loop, 4 to 7 s, which the interpreter does as it does these.
NUMBA, COMPILED, STEPS = 70 * 10**6, 100 * 10**6, 400_000
# Loops that run over a text, for each kind of tables; kinds that there are at most.
LOOPS, KINDS = 2, 3


def loops_of(plan: Plan, form: Format | None = None) -> int:
    """Return how many loops run a result over a text: none where no experts lie in few bits of ours, and those of
    compressed-tensors are its library's to open.

    Args:
        plan: the plan, or an estimate of it.
        form: the form of the result; None in memory.
    """
    widths, method = {width for layer in plan.layers.values() for width in layer.packed}, find_method(plan.method)
    chosen = method.of(plan.parameters)
    # Of what chooses a width for each expert an estimate knows none.
    if getattr(chosen, "bits", None) is True and not getattr(chosen, "uniform_layers", False):
        return LOOPS * KINDS
    ours = form is None or form.name == Moetailor.name
    return LOOPS * min(len(widths), KINDS) * ours


def of_loops(device: str, loops: int) -> Work:
    """Return the work of some loops before they run, and the memory that they take.

    Args:
        device: where experts run.
        loops: how many.
    """
    if is_apart(device) or not loops:
        return Work()
    from moetailor.checkpoint.storage import compiled  # numba takes half a second

    left = max(loops - compiled.kept(), 0)
    return Work(steps=STEPS * left, nbytes=NUMBA + COMPILED * (left > 0))
