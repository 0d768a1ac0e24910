"""The plan as a file: every layer's slots, the method and budget they come from, and the model they are for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from moetailor.answers import Answer, SlotMap
from moetailor.checkpoint.artifact import write_text
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.place import check_file
from moetailor.errors import PlanError
from moetailor.planning.layer_plan import LayerPlan
from moetailor.schema import Count, load

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of a model.

    Attributes:
        method: name of the method that decided.
        parameters: its parameters, all of them.
        budget: what was asked for, as the user said it.
        model: facts of the model that it is for.
        calibration: hash of the calibration it was made from.
        layers: the plan of each MoE layer, by the prefix of its tensors on disk; layers that are not named stay whole.
    """

    method: str
    parameters: Mapping[str, Any]
    budget: str
    model: ModelFacts
    calibration: str
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)

    @cached_property
    def by_layer(self) -> dict[int, LayerPlan]:
        """The plans of the layers that the model runs, by decoder layer; untouched layers are left out."""
        stacks = {stack.prefix: stack.index for stack in self.model.stacks}
        found = {stacks[prefix]: plan for prefix, plan in self.layers.items() if not plan.untouched}
        return {index: plan for index, plan in found.items() if index is not None}

    @cached_property
    def slot_maps(self) -> dict[int, SlotMap]:
        """The slot maps of the layers that are changed and that the model runs, by decoder layer."""

        def slot_of(layer: int, expert: int) -> int:
            lender = self.by_layer.get(layer)
            return expert if lender is None else lender.kept_slots.index(expert)

        return {layer: plan.slot_map(slot_of) for layer, plan in sorted(self.by_layer.items())}

    @property
    def computed(self) -> set[str]:
        """The kinds of answers for which a method must compute tensors, see `LayerPlan.computed`."""
        return {kind for plan in self.layers.values() for kind in plan.computed}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the checkpoint that this plan writes, stand-ins included."""
        return planned_nbytes(self.model, self.layers)

    @property
    def changed(self) -> list[tuple[LayerPlan, Stack]]:
        """What becomes of each layer that changes, and the layer; those that the model does not run, too."""
        return [(self.layers[stack.prefix], stack) for stack in self.model.stacks if stack.prefix in self.layers]

    @property
    def built_nbytes(self) -> int:
        """Bytes that are computed anew, which wait in files of their own while the checkpoint is written."""
        return sum(built_nbytes(layer, stack) for layer, stack in self.changed if stack.shape is not None)

    @property
    def expected(self) -> float | None:
        """KL that the method expects the model to have, nats a token; None when it does not say."""
        found = [plan.expected for plan in self.layers.values()]
        return None if None in found else sum(cost for cost in found if cost is not None)

    @property
    def only_drops(self) -> bool:
        """Whether a smaller expert count says what becomes of the slots: dropped, as many in every MoE layer."""
        counts = {len(self._plan_of(stack.prefix, stack.num_experts)) for stack in self.model.stacks}
        return all(plan.only_drops for plan in self.layers.values()) and len(counts) == 1

    @property
    def native(self) -> bool:
        """Whether an ordinary checkpoint with a smaller expert count says it all."""
        return self.only_drops and all(plan.native for plan in self.layers.values())

    def _plan_of(self, prefix: str, experts: int) -> list[int]:
        plan = self.layers.get(prefix)
        return list(range(experts)) if plan is None else plan.pool

    def for_model(self, model: ModelFacts) -> Plan:
        """Return the plan for a model of the same shapes, whose experts may lie otherwise.

        Args:
            model: its facts.
        """
        coded = {stack.prefix for stack in model.stacks if stack.lies != "plain"}
        layers = {name: plan.beside_codes() if name in coded else plan for name, plan in self.layers.items()}
        return replace(self, model=model, layers=layers)

    def to_json(self) -> dict:
        """Return the plan as JSON values."""
        return {
            "format": "moetailor-plan",
            "version": VERSION,
            "method": self.method,
            "parameters": dict(self.parameters),
            "budget": self.budget,
            "bytes": {"original": self.model.nbytes, "planned": self.nbytes},
            "calibration": self.calibration,
            "model": self.model.to_json(),
            "layers": {prefix: plan.to_json() for prefix, plan in self.layers.items()},
        }

    @property
    def text(self) -> str:
        """The plan as readable JSON."""
        return _readable(self.to_json())

    def save(self, file: str | Path) -> None:
        """Write the plan as readable JSON."""
        check_file(Path(file), "plan")
        write_text(Path(file), self.text)

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: not a plan, one of another version, or one with slots that do not add up.
        """
        if Path(file).is_dir():
            raise PlanError(f"{file}: a folder, not a plan; `moetailor apply` takes MODEL, then PLAN")
        stored = load(_PlanFile, file, "plan", VERSION, error=PlanError, cure="make one with `moetailor plan`")
        return cls(
            method=stored["method"],
            parameters=stored["parameters"],
            budget=stored["budget"],
            model=stored["model"],
            calibration=stored["calibration"],
            layers={name: LayerPlan.from_json(entry, f"{file}, {name}") for name, entry in stored["layers"].items()},
        )


class _PlanFile(TypedDict):
    method: str
    parameters: dict[str, str | int | float | bool]
    budget: str
    bytes: dict[str, Count]
    calibration: str
    model: ModelFacts
    layers: dict[str, Any]


def planned_nbytes(model: ModelFacts, layers: Mapping[str, LayerPlan]) -> int:
    """Return the bytes of all tensors after the layers are changed as planned.

    Args:
        model: facts of the original.
        layers: plans by prefix; a layer that is not named stays as it is.
    """
    total = model.nbytes
    for stack in model.stacks:
        if plan := layers.get(stack.prefix):
            total += stored_nbytes(plan, stack) - stack.num_experts * stack.expert_bytes
            total -= (stack.num_experts - len(plan.kept_slots)) * stack.slot_bytes
    return total


def stored_nbytes(plan: LayerPlan, stack: Stack) -> int:
    """Return the bytes that a layer's plan stores: the pool, and the tensors of its other answers.

    Args:
        plan: the plan.
        stack: the layer.
    """
    # Layers that the model does not run only lose slots.
    added = 0 if stack.shape is None else plan.slot_map().nbytes(stack.shape, stack.dtype)
    return len(plan.plain) * stack.expert_bytes + added


def built_nbytes(plan: LayerPlan, stack: Stack) -> int:
    """Return the bytes that a layer's plan computes anew, which wait in files of their own while a result is written.

    Args:
        plan: the plan.
        stack: the layer, one that the model runs.
    """
    assert stack.shape is not None
    anew = sum(expert in plan.plain for expert in plan.rebuilt)
    return anew * stack.expert_bytes + plan.slot_map().nbytes(stack.shape, stack.dtype)


def answers_nbytes(answers: Iterable[Answer], shape: ExpertShape, dtype: str) -> int:
    """Return the bytes of the tensors that some answers together have in a layer.

    Args:
        answers: none of them a row of the pool.
        shape: the layer's experts.
        dtype: their safetensors dtype.
    """
    slots = tuple(answers)
    return SlotMap(experts=1, rows=(-1,) * len(slots), answers=slots).nbytes(shape, dtype)


def calibration_hash(fingerprint: dict) -> str:
    """Return a short name for a calibration."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _readable(content: dict) -> str:
    """Dump JSON with one line for each list of plain values."""
    text = json.dumps(content, indent=2)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r",\s+", ", ", match[1]) + "]", text) + "\n"
