"""Evolution of allocations: how many experts each layer keeps, by mutation alone, whatever says how fit one is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moetailor.errors import MoetailorError
from moetailor.methods.allocation import AllocationBounds
from moetailor.progress import Progress

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


def evolve(
    bounds: AllocationBounds,
    fitness: Callable[[Counts], float],
    options: SearchOptions,
    progress: Progress | None = None,
) -> Counts:
    """Return the fittest allocation that mutation finds.

    Each generation draws from a seed of its own: with the same fitness every run is the same, however far it goes.

    Args:
        bounds: what may be chosen; the first generation comes from the allocation that keeps as many in each layer.
        fitness: what is to be large.
        options: how long to search.
        progress: called with (generations done, in all).
    """

    def best_of(population: Iterable[Counts]) -> list[Counts]:
        return sorted(set(population), key=lambda counts: (-fitness(counts), counts))[: options.survivors]

    population, draw = [bounds.keeps], random.Random(f"{options.seed}:start")
    while len(population) < options.population:
        population.append(mutated(draw.choice(population), bounds, draw))
    for generation in range(1, options.generations):
        best, draw = best_of(population), random.Random(f"{options.seed}:{generation}")
        if progress:
            progress(generation, options.generations)
        children = range(options.population - len(best))
        population = best + [mutated(draw.choice(best), bounds, draw) for _ in children]
    best = best_of(population)
    if progress:
        progress(options.generations, options.generations)
    return best[0]


def mutated(counts: Counts, bounds: AllocationBounds, draw: random.Random) -> Counts:
    """Return an allocation of the same total in which a few experts moved from one layer to another.

    Args:
        counts: experts that each layer keeps.
        bounds: what may be chosen.
        draw: where chance comes from.
    """
    moved, step = list(counts), bounds.step
    # The smaller of two draws: one move is likelier than three.
    for _ in range(min(draw.randint(1, MOVES), draw.randint(1, MOVES))):
        giver, taker = draw.sample(range(len(moved)), 2)
        experts = min(
            step * draw.randint(1, EXPERTS), moved[giver] - bounds.least[giver], bounds.most[taker] - moved[taker]
        )
        experts -= experts % step
        moved[giver] -= experts
        moved[taker] += experts
    return tuple(moved)
