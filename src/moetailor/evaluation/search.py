"""An evolutionary search for how many experts each layer keeps, after EvoESAP (arXiv:2603.06003).

Published: within a layer the order in which experts go is a method's and stays fixed; a population of allocations of
one total evolves by mutation alone. A candidate is worth what speculative decoding would accept of it, teacher forced:
the overlap of its next-word probabilities with the original's.

Here: the same, with one difference. What a method keeps is asked for each count, so that methods without an order, such
as subsets, take part. A candidate is the model in memory with fewer rows in its routers; its experts are not touched.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict

from torch import nn

from moetailor.answers import SlotMap
from moetailor.calibration.batch import Batch, text_fingerprint
from moetailor.calibration.folder import Calibration, write_json
from moetailor.checkpoint.anatomy import Anatomy, discover
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.models import copy_sharing_tensors, load_model, resolve_device, resolve_dtype
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import MoetailorError, PlanError
from moetailor.evaluation.fidelity import Reference
from moetailor.methods.outline import outline_plan, pairs_of, room_of
from moetailor.methods.registry import Method, find_method
from moetailor.methods.run import check_weights, view_of
from moetailor.planning.budget import Budget
from moetailor.planning.plan import calibration_hash
from moetailor.runtime.reshape import LayerChange, reshape_model
from moetailor.schema import Within, load_json, read

Counts = tuple[int, ...]
# A mutation makes up to so many moves, each of up to so many experts.
MOVES, EXPERTS = 3, 4


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How long to search.

    Attributes:
        population: candidates of a generation.
        generations: how many there are.
        survivors: the best candidates of a generation, from which the next one mutates.
        samples: sequences of the calibration's text that a candidate is run on.
        seed: another seed makes other mutations.
    """

    population: int = 32
    generations: int = 50
    survivors: int = 4
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.survivors < self.population or min(self.generations, self.samples) < 1:
            raise MoetailorError(
                f"population {self.population}, survivors {self.survivors}, generations {self.generations}, samples "
                f"{self.samples}: all must be at least 1, and fewer survive than a population has"
            )


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
    options: SearchOptions = SearchOptions(),
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
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
        MoetailorError: the file of another search is in the way.
    """
    chosen, facts, out = find_method(method), calibration.model, Path(out)
    resolved, protected = chosen.resolve(parameters or {}), pairs_of(protect)
    numbers = calibration.layers if layers is None else sorted({int(layer) for layer in layers})
    _check(chosen, numbers, model or facts.source)
    outline = outline_plan(facts, chosen, resolved, budget, layers=numbers, protect=protected, allocation="error")
    room = room_of(outline, chosen, numbers, protected)
    checkpoint = open_checkpoint(model or facts.source)
    weights = ExpertWeights(checkpoint.folder, trust_remote_code=trust_remote_code)
    check_weights(weights, facts)
    views = [view_of(calibration, number, weights, protected) for number in numbers]

    @cache
    def kept(at: int, count: int) -> list[int]:
        return chosen.plan([views[at]], [count], resolved)[0].kept_slots

    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device, checkpoint)
    batches = _some(calibration.batches(), options.samples)
    about = {"calibration": calibration_hash(calibration.fingerprint), "text": text_fingerprint(batches)["hash"]}
    about |= {"method": method, "parameters": resolved, "layers": numbers, "protect": sorted(map(list, protected))}
    known = Known(out.with_suffix(".search.json"), about | {"dtype": str(torch_dtype)})
    original = load_model(checkpoint.folder, dtype=torch_dtype, device=device, trust_remote_code=trust_remote_code)
    anatomy = discover(original.config, original, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="moetailor-") as folder:
        reference = Reference(Path(folder), batches).record(original)

        def measure(counts: Counts) -> float:
            slots = {number: kept(at, count) for at, (number, count) in enumerate(zip(numbers, counts, strict=True))}
            return reference.overlap(with_slots(original, anatomy, slots))

        def fitness(counts: Counts) -> float:
            return known.get(counts, measure)

        most = [view.num_experts for view in views]
        best = evolve(room.keeps, room.least, most, room.step, fitness, options, progress)
        found = Allocated(
            counts=dict(zip(numbers, best, strict=True)), overlap=fitness(best), uniform=fitness(room.keeps)
        )
    write_json(out, {str(layer): count for layer, count in found.counts.items()})
    return found


def evolve(
    start: Counts,
    least: Sequence[int],
    most: Sequence[int],
    step: int,
    fitness: Callable[[Counts], float],
    options: SearchOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Counts:
    """Return the fittest allocation that mutation finds.

    Each generation draws from a seed of its own: with the same fitness every run is the same, however far it goes.

    Args:
        start: the allocation that the first generation is made from.
        least: experts that each layer keeps at least.
        most: and at most.
        step: experts that move together.
        fitness: what is to be large.
        options: how long to search.
        progress: called with (generations done, in all).
    """

    def best_of(population: Iterable[Counts]) -> list[Counts]:
        return sorted(set(population), key=lambda counts: (-fitness(counts), counts))[: options.survivors]

    population, draw = [start], random.Random(f"{options.seed}:start")
    while len(population) < options.population:
        population.append(mutated(draw.choice(population), least, most, step, draw))
    for generation in range(1, options.generations):
        best, draw = best_of(population), random.Random(f"{options.seed}:{generation}")
        if progress:
            progress(generation, options.generations)
        children = range(options.population - len(best))
        population = best + [mutated(draw.choice(best), least, most, step, draw) for _ in children]
    best = best_of(population)
    if progress:
        progress(options.generations, options.generations)
    return best[0]


def mutated(counts: Counts, least: Sequence[int], most: Sequence[int], step: int, draw: random.Random) -> Counts:
    """Return an allocation of the same total in which a few experts moved from one layer to another."""
    moved = list(counts)
    # The smaller of two draws: one move is likelier than three.
    for _ in range(min(draw.randint(1, MOVES), draw.randint(1, MOVES))):
        giver, taker = draw.sample(range(len(moved)), 2)
        experts = min(step * draw.randint(1, EXPERTS), moved[giver] - least[giver], most[taker] - moved[taker])
        experts -= experts % step
        moved[giver] -= experts
        moved[taker] += experts
    return tuple(moved)


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
    """What is in the file of a search: what its numbers depend on, and the overlap of each allocation."""

    about: dict[str, Any]
    overlap: dict[str, Annotated[float, Within(0, 1 + 1e-3)]]


class Known:
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
            content = load_json(file, error=MoetailorError, cure=cure)
            found = read(Tried, content, str(file), error=MoetailorError, cure=cure)
            if found["about"] != self.content["about"]:
                raise MoetailorError(f"{file}: belongs to another search; {cure}")
            self.content = found

    def get(self, counts: Counts, measure: Callable[[Counts], float]) -> float:
        """Return the fitness of an allocation, measured when it is not known."""
        name, known = ",".join(map(str, counts)), self.content["overlap"]
        if name not in known:
            known[name] = measure(counts)
            write_json(self.file, dict(self.content))
        return known[name]


def _check(method: Method, layers: Sequence[int], model: str | Path | None) -> None:
    """Refuse what cannot be searched for."""
    if not method.removed.drops:
        raise PlanError(f"{method.name} drops no slots, which the search needs; use --allocation error or global")
    if len(layers) < 2:
        raise PlanError(f"layers {layers}: no other layer to give experts to; search over at least 2")
    if not model:
        raise PlanError("the search runs the model, which was calibrated in memory; pass model=")


def _some(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Return batches from everywhere in the text with about as many sequences as asked for."""
    sequences = sum(len(batch.input_ids) for batch in batches)
    return list(batches[:: max(1, sequences // samples)])
