"""What loops over codes take where experts in few bits run on a CPU: numba, and its compiling them the first time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moetailor.answers import Width
from moetailor.checkpoint.devices import is_apart
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.original import Original
from moetailor.methods.registry import find_method
from moetailor.planning.plan import Plan
from moetailor.planning.work import Work
from moetailor.runtime.parts import slot_maps
from moetailor.transform.formats import Format
from moetailor.transform.formats.moetailor import Moetailor

# What loops over codes do: multiply them with a few inputs, and write what they stand for, or multiply that in tiles.
PRODUCT, WEIGHT = "product", "weight"
# Loops in bfloat16 that run instead of one of these: dtype and widths say which, and they count as one.
INSTEAD = {"halved": PRODUCT, "thirds": PRODUCT, "tiled": WEIGHT, "vectored": WEIGHT}
# Bytes of memory that numba brings, and that compiling leaves there, for a first loop and for each one; operations that
# take as long as compiling one, 1 to 2 s, which the interpreter does as it does these.
NUMBA, COMPILED, EACH, STEPS = 60 * 10**6, 100 * 10**6, 5 * 10**6, 100_000
# Kinds of codes that widths by expert have, those of auto's menu: codebooks of 1 to 4 bits, integers of 5, 6 and 8.
MIXED = frozenset({(8, 8), (8, 4), (12, 4), (8, 2), (5, 0), (6, 0), (8, 0)})
# Kinds depend on no shape.
ANY = ExpertShape(width=128, intermediate=128)


def kinds_of(plan: Plan, form: Format | None = None) -> frozenset[tuple[int, int]]:
    """Return the kinds of codes that loops tell when a result runs: none where no experts lie in few bits of ours, and
    those of compressed-tensors are its library's to open.

    Args:
        plan: the plan, or an estimate of it.
        form: the form of the result; None in memory.
    """
    widths = {width for layer in plan.layers.values() for width in layer.packed}
    # Of widths by expert, which no other form holds, an estimate knows none.
    if not widths and find_method(plan.method).of(plan.parameters).decides_widths:
        return MIXED
    return _kinds(widths) if form is None or form.name == Moetailor.name else frozenset()


def kinds_in(result: Original) -> frozenset[tuple[int, int]]:
    """Return the kinds of codes of a checkpoint, see `kinds_of`.

    Args:
        result: the checkpoint.
    """
    return _kinds({width for slots in slot_maps(result).values() for width in slots.packed})


def of_loops(device: str, kinds: frozenset[tuple[int, int]], loops: Sequence[str] = (PRODUCT, WEIGHT)) -> Work:
    """Return the work of some loops before they run, and the memory that they take.

    Args:
        device: where experts run.
        kinds: of codes.
        loops: which run for each kind.
    """
    if is_apart(device) or not kinds:
        return Work()
    from moetailor.checkpoint.storage import compiled  # numba takes half a second

    kept = {(INSTEAD.get(loop, loop), *kind) for loop, *kind in compiled.kept()}
    left = len({(loop, *kind) for loop in loops for kind in kinds} - kept)
    return Work(steps=STEPS * left, nbytes=NUMBA + COMPILED * (left > 0) + EACH * left)


def _kinds(widths: Iterable[Width]) -> frozenset[tuple[int, int]]:
    if not (storages := {storage for width in widths for storage in width.storages(ANY).values()}):
        return frozenset()
    from moetailor.checkpoint.storage import compiled

    return frozenset(map(compiled.kind, storages))
