"""An evolutionary search for how many experts each layer keeps, after EvoESAP (arXiv:2603.06003).

Published: within a layer the order in which experts go is a method's and stays fixed; a population of allocations of
one total evolves by mutation alone. A candidate is worth what speculative decoding would accept of it, teacher forced:
the overlap of its next-word probabilities with the original's.

Here: the same, with one difference. What a method keeps is asked for each count, so that methods without an order, such
as subsets, take part. A candidate is the model in memory with fewer rows in its routers; its experts are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict

from torch import nn

from moetailor.answers import SlotMap
from moetailor.calibration.batch import Batch, text_fingerprint
from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.devices import resolve_device
from moetailor.checkpoint.lock import claimed, scratch
from moetailor.checkpoint.models import copy_sharing_tensors, resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.place import check_file
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import MoetailorError, PlanError
from moetailor.evaluation.fidelity import Reference
from moetailor.methods.estimate import allocation_bounds, estimate_plan, pairs_of
from moetailor.methods.evolution import Counts, SearchOptions, evolve
from moetailor.methods.method import Method
from moetailor.methods.registry import find_method
from moetailor.methods.run import check_weights, view_of
from moetailor.planning.budget import Budget
from moetailor.planning.plan import calibration_hash
from moetailor.progress import Progress, resumed
from moetailor.runtime.reshape import LayerChange, reshape_model
from moetailor.schema import Within, load

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """What a search found.

    Attributes:
        counts: experts that each layer keeps.
        overlap: its fitness, the share of the predicted probability that original and candidate have in common.
        uniform: the fitness where every layer keeps as many.
    """

    counts: dict[int, int]
    overlap: float
    uniform: float


def allocate(
    calibration: Calibration,
    method: str,
    budget: Budget,
    out: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    protect: Iterable[tuple[int, int]] = (),
    options: SearchOptions = SearchOptions(),  # noqa: B008 (frozen)
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Allocated:
    """Search for the counts with which a method that drops slots loses least, and write them for ``--allocation``.

    What was tried is kept beside the result, so a stopped search resumes and a finished one goes on with more
    generations.

    Args:
        calibration: a finished calibration.
        method: name of a method that drops slots.
        budget: how much stays.
        out: where the counts go (JSON).
        parameters: parameters of the method.
        layers: decoder layers to change; all MoE layers when None.
        protect: (layer, expert) pairs that must stay.
        options: how long to search.
        model: the original; where it was calibrated when None.
        device: where it runs.
        dtype: dtype of the run.
        trust_remote_code: run code that comes with the checkpoint.
        progress: called with (generations done, in all).

    Raises:
        PlanError: the method or the budget cannot be used.
        MoetailorError: the file of another search is in the way, or another run writes there.
    """
    chosen, facts, out = find_method(method).of(parameters or {}), calibration.model, Path(out)
    tried, protected = out.with_suffix(".search.json"), pairs_of(protect)
    check_file(out, "allocation")
    check_file(tried, "search")
    numbers = calibration.layers if layers is None else sorted({int(layer) for layer in layers})
    _check(chosen, numbers, model or facts.source)
    estimate = estimate_plan(facts, chosen, budget, layers=numbers, protect=protected, allocation="error")
    bounds = allocation_bounds(estimate, chosen, numbers, protected)
    source = Original(model or facts.source, trust_remote_code=trust_remote_code)
    weights = ExpertWeights(source)
    check_weights(weights, facts)
    views = [view_of(calibration, number, weights, protected) for number in numbers]

    @cache
    def kept(at: int, count: int) -> list[int]:
        (plan,) = chosen.plan_layers([views[at]], [count])
        return plan.kept_slots

    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device, source.checkpoint)
    batches = _some(calibration.batches(), options.samples)
    about = {"calibration": calibration_hash(calibration.fingerprint), "text": text_fingerprint(batches)["hash"]}
    about |= {
        "method": chosen.name,
        "parameters": chosen.parameters,
        "layers": numbers,
        "protect": sorted(map(list, protected)),
    }
    with claimed(out), claimed(tried), scratch() as folder:
        file = SearchFile(tried, about | {"dtype": str(torch_dtype)})
        resumed(len(file.content["overlap"]), None, "allocations that were tried")
        original, anatomy = source.load(dtype=torch_dtype, device=device), source.anatomy
        reference = Reference(folder, batches).record(original)

        def measure(counts: Counts) -> float:
            slots = {number: kept(at, count) for at, (number, count) in enumerate(zip(numbers, counts, strict=True))}
            return reference.overlap(with_slots(original, anatomy, slots), original)

        def fitness(counts: Counts) -> float:
            return file.get(counts, measure)

        best = evolve(bounds, fitness, options, progress)
        counts = dict(zip(numbers, best, strict=True))
        found = Allocated(counts=counts, overlap=fitness(best), uniform=fitness(bounds.keeps))
        write_json(out, {"format": "moetailor-allocation"} | {str(layer): n for layer, n in counts.items()})
    return found


def with_slots(model: nn.Module, anatomy: Anatomy, slots: Mapping[int, Sequence[int]]) -> nn.Module:
    """Return a model that shares all weights with the given one, and whose routers have some of their slots only.

    Args:
        model: the original, left as it is.
        anatomy: its MoE layers.
        slots: the slots that stay, by decoder layer.
    """
    masked = copy_sharing_tensors(model)
    changes = {}
    for index, left in slots.items():
        everything = range(anatomy.layers[index].num_experts)
        slot_map = SlotMap.of_rows(left, len(everything))
        changes[index] = LayerChange(experts=everything, slots=left, slot_map=slot_map)
    reshape_model(masked, anatomy, changes)
    return masked


class Tried(TypedDict):
    """What the file of a search holds: all that its numbers depend on, and the overlap of each allocation."""

    about: dict[str, Any]
    overlap: dict[str, Annotated[float, Within(0, 1 + 1e-3)]]


class SearchFile:
    """The fitness of what was tried, in a file that is whole after every candidate.

    Args:
        file: where; made when the first fitness is known.
        about: all that a fitness depends on beside the counts.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self.file = file
        self.content: Tried = {"about": dict(about), "overlap": {}}
        if file.exists():
            cure = "delete it, or name another --out"
            found = load(Tried, file, "search", VERSION, error=MoetailorError, cure=cure)
            if found["about"] != self.content["about"]:
                raise MoetailorError(f"{file}: belongs to another search; {cure}")
            self.content = found

    def get(self, counts: Counts, measure: Callable[[Counts], float]) -> float:
        """Return the fitness of an allocation, measured when it is not known."""
        name, known = ",".join(map(str, counts)), self.content["overlap"]
        if name not in known:
            known[name] = measure(counts)
            write_json(self.file, {"format": "moetailor-search", "version": VERSION, **self.content})
        return known[name]


def _check(method: Method, layers: Sequence[int], model: str | Path | None) -> None:
    """Refuse what cannot be searched for."""
    if not method.replaces_with.drops:
        raise PlanError(f"{method.name} drops no slots, which the search needs; use --allocation error or global")
    if len(layers) < 2:
        raise PlanError(f"layers {layers}: no other layer to give experts to; search over at least 2")
    if not model:
        raise PlanError("the search runs the model, which was calibrated in memory; pass model=")


def _some(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Return batches from everywhere in the text with about as many sequences as asked for."""
    sequences = sum(len(batch.input_ids) for batch in batches)
    return list(batches[:: max(1, sequences // samples)])
