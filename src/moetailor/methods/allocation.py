"""Allocation: how many experts each layer keeps, with any method that decides within a layer.

Whatever the counts, they are the budget's in all: what one layer keeps more, another one keeps less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError, did_you_mean
from moetailor.fitting.constants import constant_errors
from moetailor.methods.choose import best_of_all
from moetailor.methods.method import Method
from moetailor.planning.budget import read_fraction
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView
from moetailor.schema import load_json, read

Rule = Literal["uniform", "error", "global"]
RULES = get_args(Rule)
# Those that decide from what was measured.
DECIDED_LATER = ("error", "global")
# A rule, or for each layer the experts that stay: a number, or a share of them (0.75, "75%").
Allocation = Rule | Mapping[int, int | float | str]


def read_allocation(text: str) -> Allocation:
    """Return a rule by its name, or the counts that a file holds: ``{"0": 24, "1": "75%"}``.

    Raises:
        PlanError: neither a rule nor such a file.
    """
    if text in RULES:
        return text  # type: ignore[return-value]
    if not text.endswith(".json") and not Path(text).is_file():
        raise PlanError(f"--allocation {text}" + did_you_mean(text, RULES) + "; or name a .json file")
    cure = 'write layers to experts kept, such as {"0": 24, "1": "75%"}'
    content = load_json(text, error=PlanError, cure=cure)
    for name in ("format", "settings"):  # of those that a search wrote
        content.pop(name, None)
    return read(dict[int, int | float | str], content, f"--allocation {text}", error=PlanError, cure=cure)


def counts_of(given: Mapping[int, int | float | str], stacks: Sequence[Stack], *, step: int = 1) -> dict[str, int]:
    """Return the experts that each layer keeps, by the prefix of its tensors; shares are rounded up to a whole number.

    Args:
        given: what was asked for.
        stacks: the layers to change.
        step: counts must be multiples of it.

    Raises:
        PlanError: a layer that is not to be changed or is left out, or a count outside 1..E.
    """
    known = {stack.index: stack for stack in stacks if stack.index is not None}
    if unknown := sorted(set(given) - set(known)):
        raise PlanError(f"--allocation: {unknown} are no MoE layers to change; those are {_listed(known)}")
    if missing := [index for index in known if index not in given]:
        raise PlanError(f"--allocation: nothing is said of layers {_listed(missing)}; give each its number of experts")
    return {stack.prefix: _count(layer, given[layer], stack.num_experts, step) for layer, stack in known.items()}


@dataclass(frozen=True, kw_only=True)
class AllocationBounds:
    """What an allocation may choose from.

    Attributes:
        keeps: experts of each layer when every layer keeps the same number; any other allocation has their sum.
        least: experts that each layer keeps at least.
        most: and at most.
        step: what counts are multiples of: the groups of a router, where slots are dropped.
    """

    keeps: tuple[int, ...]
    least: tuple[int, ...]
    most: tuple[int, ...]
    step: int


def allocate_by_rule(
    rule: Allocation, method: Method, layers: Sequence[LayerView], bounds: AllocationBounds
) -> dict[int, int]:
    """Return how many experts each decoder layer keeps by a rule.

    Args:
        rule: ``error`` or ``global``.
        method: the method.
        layers: the layers.
        bounds: what may be chosen.

    Raises:
        PlanError: the rule needs scores and the method has none.
    """
    if rule == "error":
        worths = weighted_errors(layers)
    else:
        worths = score_shares(method.name, list(method.plan_layers(layers, bounds.keeps)))
    counts = best_of_all(layers, worths, sum(bounds.keeps), bounds.least, groups=bounds.step)
    return {layer.index: count for layer, count in zip(layers, counts, strict=True)}


def weighted_errors(layers: Sequence[LayerView]) -> list[torch.Tensor]:
    """Return what is lost when the best constant stands in for an expert, float64 [E] for each layer.

    In nats a token where all layers know what their errors cost in the end; else as a share of what constants lose in
    the whole layer.

    Args:
        layers: the layers.
    """
    found = []
    for layer in layers:
        error = constant_errors(layer.sums)
        total = error.sum().clamp_min(1e-300)
        found.append(error / total if layer.sensitivity is None else error * layer.sensitivity)
        layer.close()
    return found


def score_shares(method: str, plans: Sequence[LayerPlan]) -> list[torch.Tensor]:
    """Return the scores that a method ranked by as shares of their layer's sum, float64 [E] for each layer.

    Raises:
        PlanError: the method gave none.
    """
    if not all(plan.scores for plan in plans):
        raise no_scores(method)
    scores = [torch.tensor(plan.scores, dtype=torch.float64) for plan in plans]
    return [score / score.sum().clamp_min(1e-300) for score in scores]


def no_scores(method: str) -> PlanError:
    """Return the refusal of a rule that goes by scores for a method that gives none."""
    return PlanError(f"--allocation global: {method} gives experts no scores of their own; use error or uniform")


def _count(layer: int, given: int | float | str, experts: int, step: int) -> int:
    try:
        whole = type(given) is int or (isinstance(given, str) and given.isdecimal())
        count = int(given) if whole else math.ceil(experts * read_fraction(given))
    except ValueError:
        raise PlanError(f"--allocation: layer {layer} keeps {given!r}; write a number of experts or a share") from None
    if not 1 <= count <= experts:
        raise PlanError(f"--allocation: layer {layer} keeps {given} of {experts} experts; keep 1 to {experts}")
    if count % step:
        raise PlanError(
            f"--allocation: layer {layer} keeps {count}; its router chooses among {step} groups of equal size: keep a "
            f"multiple of {step}"
        )
    return count


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
