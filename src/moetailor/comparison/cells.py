"""The cells of a comparison: each method with its parameters, at each share to remove or each size to fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moetailor.answers import Width
from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import PlanError, TooSmallError, did_you_mean
from moetailor.methods.estimate import estimate_plan, refuse_unknown
from moetailor.methods.method import Method
from moetailor.methods.registry import METHODS, find_method, with_bits
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan

ALL = "all"
# What `all` means beside methods where sizes are asked for: bits alone, and methods that leave experts in few bits.
PLAIN = (*(f"quantize@{bits}" for bits in (8, 6, 5, 4, 3, 2)), "quantize:rounding=nearest@4")
PLAIN += ("quantize:rounding=nearest@3", "quantize@int4g32")
PLAIN += tuple(f"quantize@vq{bits}" for bits in (4, 3, 2))
COMPOSED = tuple(f"{name}@{bits}" for name in ("reap", "mone") for bits in (4, 3))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method within one budget.

    Attributes:
        method: the method, with its parameters.
        budget: the share to remove, or the bytes; nothing to remove for what keeps every expert.
        width: how all that stays of experts lies; as it lay when None.
    """

    method: Method
    budget: Budget
    width: Width | None = None

    @property
    def name(self) -> str:
        """What tables and pictures call it, within one budget."""
        if self.width is None:
            return self.method.label
        group = f" g{self.width.group}" * (self.width.group != Width.group)
        return f"{self.method.label} + {self.width}{group}"

    @property
    def file(self) -> str:
        """Name of its file: method, budget and a hash of all of it."""
        given, limit = json.dumps(self.to_json(), sort_keys=True), str(self.budget).split()[1].rstrip("%")
        return f"{self.method.name}-{limit}-{hashlib.sha256(given.encode()).hexdigest()[:8]}.json"

    def to_json(self) -> dict:
        """Return what the cell is."""
        return {
            "name": self.name,
            "method": self.method.name,
            "parameters": self.method.parameters,
            "bits": None if self.width is None else self.width.text,
            "removes": self.method.removes,
            "budget": str(self.budget),
        }


def cells_of(
    methods: Iterable[str], remove: Iterable[str | float] = (), sizes: Iterable[str | float] = ()
) -> list[Cell]:
    """Return the cells that some words ask for, budget by budget from the mildest, each once.

    Args:
        methods: names, each with parameters where they are not the defaults, and with the bits of what stays:
            ``linear:rank=4:ranks=chosen``, ``reap@4``, ``mone:score=exact@4/6``. ``all`` stands for every method that
            removes experts and is neither trained nor slow; with sizes also for `PLAIN` and `COMPOSED`. What removes
            no expert is one cell.
        remove: shares to remove.
        sizes: bytes of the result, or shares of the original's.

    Raises:
        PlanError: an unknown method or parameter, a share or size that cannot be read, bits for a method that shares
            bytes out itself, both shares and sizes, or nothing to compare.
    """
    budgets = {Budget.parse(remove=share) for share in remove}
    limits = {Budget.parse(size=size) for size in sizes}
    if budgets and limits:
        raise PlanError("--remove and --sizes: rows are of equal ratios or of equal bytes; give one of them")
    chosen = [found for word in methods for found in _read(word, sized=bool(limits))]
    if not chosen or not (budgets or limits):
        lacking = "--sizes 75%,50%,35% or --remove 10%,25%,50%" if chosen else "--methods all"
        raise PlanError(f"nothing to compare; name at least one, such as {lacking}")
    cells = [Cell(method=m, budget=Budget.parse(remove="0%")) for m, _ in chosen if not m.removes]
    # Shares of the original and bytes have no common order before the original is known: shares come first.
    ordered = sorted(budgets, key=lambda budget: budget.remove or 0)
    ordered += sorted(limits, key=lambda budget: (budget.share or 0, budget.size or 0), reverse=True)
    for budget in ordered:
        for method, width in chosen:
            if method.removes:
                try:
                    refuse_unknown(method, budget, "uniform", width)
                except PlanError as error:
                    named = f"--methods {method.name}@{width.text}:" if width else "--bits:"
                    raise PlanError(str(error).replace("--bits:", named)) from None
                cells.append(Cell(method=method, budget=budget, width=width))
    return list({cell.file: cell for cell in cells}.values())


def estimated(cell: Cell, facts: ModelFacts) -> Plan:
    """Return a plan with the counts and bytes that a cell's will have.

    Raises:
        PlanError: it will be refused, as there is nothing to remove or it cannot be so small.
    """
    size = cell.budget.in_bytes(facts.nbytes).size
    if cell.width is not None and size is not None:
        every = estimate_plan(facts, cell.method, Budget.parse(remove="0%"), width=cell.width).nbytes
        if every <= size:
            of_all = f"{every:,} bytes, {every / facts.nbytes:.1%} of the original's"
            raise PlanError(f"with every expert in {cell.width} it takes {of_all}: nothing is left to remove")
    try:
        return estimate_plan(facts, cell.method, cell.budget, width=cell.width)
    except TooSmallError as error:
        raise too_small(error, facts) from None


def too_small(error: TooSmallError, facts: ModelFacts) -> PlanError:
    """Return what a row says that cannot be so small."""
    return PlanError(f"takes at least {error.least:,} bytes, {error.least / facts.nbytes:.1%} of the original's")


def _read(word: str, *, sized: bool) -> list[tuple[Method, Width | None]]:
    """Return the methods that one word names, and the bits of what each leaves."""
    if word == ALL:
        every = [METHODS[name]() for name in sorted(METHODS)]
        quick = [(method, None) for method in every if method.removes and not (method.trained or method.slow)]
        return quick + [found for more in (PLAIN + COMPOSED if sized else ()) for found in _read(more, sized=sized)]
    whole, at, bits = word.partition("@")
    name, *given = whole.split(":")
    if "=" in name:
        told = (
            "parameters follow their method with colons, as in linear:rank=4:ranks=chosen; methods lie between commas"
        )
        raise PlanError(f"--methods {word}: {told}")
    if name.lower() not in METHODS:
        raise PlanError(f"--methods {word}: no method {name!r}" + did_you_mean(name, [*METHODS, ALL]))
    pairs = [entry.partition("=") for entry in given]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise PlanError(f"--methods {word}: write parameters as {name}:parameter=value")
    parameters: Mapping[str, Any] = {key: value for key, _, value in pairs}
    try:
        parameters, width = with_bits(name, parameters, bits) if at else (parameters, None)
    except PlanError as error:
        few, colon, more = bits.partition(":")
        if colon:
            raise PlanError(f"--methods {word}: write bits as {whole}:{more}@{few}, last") from None
        raise PlanError(f"--methods {word}: {str(error).removeprefix(f'--bits {bits}: ')}") from None
    return [(find_method(name).of(parameters), width)]
