"""The plan as a file: every layer's slots, the method and budget they come from, and the model they are for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.files import DTYPES
from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError
from moetailor.planning.slot_map import SlotMap
from moetailor.planning.slots import LayerPlan
from moetailor.schema import read

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

        def guest_slot(layer: int, expert: int) -> int:
            host = self.by_layer.get(layer)
            return expert if host is None else host.kept_slots.index(expert)

        return {layer: plan.slot_map(guest_slot) for layer, plan in sorted(self.by_layer.items())}

    @property
    def built(self) -> set[str]:
        """The answers whose tensors are computed, see `LayerPlan.built`."""
        return {kind for plan in self.layers.values() for kind in plan.built}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the checkpoint that this plan writes, stand-ins included."""
        return planned_nbytes(self.model, self.layers)

    @property
    def expected(self) -> float | None:
        """KL that the method expects the model to have, nats a token; None when it does not say."""
        found = [plan.expected for plan in self.layers.values()]
        return None if None in found else sum(cost for cost in found if cost is not None)

    @property
    def native(self) -> bool:
        """Whether an ordinary checkpoint with a smaller expert count says it all."""
        counts = {len(self._plan_of(stack.prefix, stack.num_experts)) for stack in self.model.stacks}
        return all(plan.native for plan in self.layers.values()) and len(counts) == 1

    def _plan_of(self, prefix: str, experts: int) -> list[int]:
        plan = self.layers.get(prefix)
        return list(range(experts)) if plan is None else plan.pool

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

    def save(self, file: str | Path) -> None:
        """Write the plan as readable JSON."""
        Path(file).write_text(_readable(self.to_json()))

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: not a plan, one of another version, or one with slots that do not add up.
        """
        try:
            content = json.loads(Path(file).read_text())
        except IsADirectoryError:
            raise PlanError(f"{file}: a folder, not a plan; `moetailor apply` takes MODEL, then PLAN") from None
        except OSError as error:
            raise PlanError(f"{file}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise PlanError(f"{file}: not JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != "moetailor-plan":
            raise PlanError(f"{file}: not a plan; make one with `moetailor plan`")
        if content.get("version") != VERSION:
            raise PlanError(
                f"{file}: a plan of version {content.get('version')}, this moetailor reads version {VERSION}"
            )
        try:
            return cls(
                method=content["method"],
                parameters=dict(content["parameters"].items()),
                budget=content["budget"],
                model=read(ModelFacts, content["model"], f"{file}: model", error=PlanError, cure="plan again"),
                calibration=content["calibration"],
                layers={
                    name: LayerPlan.from_json(entry, f"{file}, {name}") for name, entry in content["layers"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{file}: not a complete plan ({error!r})") from None


def planned_nbytes(model: ModelFacts, layers: Mapping[str, LayerPlan]) -> int:
    """Return the bytes of all tensors after the layers are changed as planned.

    Args:
        model: facts of the original.
        layers: plans by prefix; a layer that is not named stays as it is.
    """
    total = model.nbytes
    for stack in model.stacks:
        if plan := layers.get(stack.prefix):
            total -= (stack.num_experts - plan.stored) * stack.expert_bytes
            total -= (stack.num_experts - len(plan.kept_slots)) * stack.slot_bytes
            total += added_nbytes(plan, stack, model.width)
    return total


def added_nbytes(plan: LayerPlan, stack: Stack, width: int) -> int:
    """Return the bytes that a plan adds to a layer beside whole experts: stand-ins, own parts, vectors.

    Args:
        plan: the plan.
        stack: the layer.
        width: D.
    """
    itemsize = DTYPES[stack.dtype].itemsize
    own = sum(plan.low_ranks.values()) * stack.matrices * (width + stack.inner)
    vectors = 0
    if plan.auxiliary is not None:
        slots = len(plan.kept_slots)
        vectors = plan.auxiliary.rows(slots) * ((stack.matrices - 1) * width + stack.inner)
        vectors += slots * width * plan.auxiliary.constants
    return stand_in_nbytes(plan.ranks, plan.shared_input, width, itemsize) + (own + vectors) * itemsize


def stand_in_nbytes(ranks: Sequence[int], shared_input: bool, width: int, itemsize: int) -> int:
    """Return the bytes of a layer's stand-ins: a constant each, and two factors for each rank of a linear map.

    Args:
        ranks: rank of each stand-in.
        shared_input: the input factor is stored once, as wide as the largest rank.
        width: D.
        itemsize: bytes of a number.
    """
    inputs = max(ranks, default=0) if shared_input else sum(ranks)
    return (len(ranks) + inputs + sum(ranks)) * width * itemsize


def calibration_hash(fingerprint: dict) -> str:
    """Return a short name for a calibration."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _readable(content: dict) -> str:
    """Dump JSON with one line for each list of plain values."""
    text = json.dumps(content, indent=2)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r",\s+", ", ", match[1]) + "]", text) + "\n"
