"""What loops over codes take where experts in few bits run on a CPU: numba, and its compiling them the first time."""

from __future__ import annotations

from moetailor.checkpoint.devices import is_apart
from moetailor.checkpoint.original import Original
from moetailor.methods.registry import find_method
from moetailor.planning.plan import Plan
from moetailor.planning.work import Work
from moetailor.transform.formats import Format
from moetailor.transform.formats.moetailor import Moetailor

# Bytes of memory that numba brings, and that compiling leaves there (70 to 150 MB were seen); operations that take as
# long as compiling one loop, 1 to 2 s, which the interpreter does as it does these.
NUMBA, COMPILED, STEPS = 70 * 10**6, 100 * 10**6, 100_000
# Loops that run over a text, for each kind of codes; kinds that widths by expert have at most.
LOOPS, KINDS = 2, 8


def loops_of(plan: Plan, form: Format | None = None) -> int:
    """Return how many loops run a result over a text: none where no experts lie in few bits of ours, and those of
    compressed-tensors are its library's to open.

    Args:
        plan: the plan, or an estimate of it.
        form: the form of the result; None in memory.
    """
    widths = {width for layer in plan.layers.values() for width in layer.packed}
    # Of widths by expert, which no other form holds, an estimate knows none.
    if not widths and find_method(plan.method).of(plan.parameters).decides_widths:
        return LOOPS * KINDS
    kinds = {(width.codes, bits) for width in widths if not width.whole for bits in width.both}
    return LOOPS * len(kinds) if form is None or form.name == Moetailor.name else 0


def loops_in(result: Original) -> int:
    """Return how many loops run a checkpoint over a text, see `loops_of`.

    Args:
        result: the checkpoint.
    """
    names = {name.rpartition(".")[2] for name in result.checkpoint.tensors}
    return LOOPS * min(sum(name.endswith("down_packed") for name in names), KINDS) * result.written_here


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
