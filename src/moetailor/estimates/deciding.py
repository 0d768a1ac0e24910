"""What plan and apply will take: experts that are read, priced, built and written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.devices import working_nbytes
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.estimates.compiling import PRODUCT, kinds_of, of_loops
from moetailor.estimates.estimate import LIBRARIES, Estimate, Host
from moetailor.estimates.sizes import downloads_of, statistics_nbytes
from moetailor.fitting.work import of_width
from moetailor.methods.method import Method
from moetailor.methods.registry import find_method
from moetailor.methods.run import view_of
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan, built_nbytes, stored_nbytes
from moetailor.planning.work import LayerSize, Work
from moetailor.transform.formats import Finish, Format

# How often numbers are gone over while experts are opened in float32, and while a result is verified.
OPENED, VERIFIED = 6, 8
# Bytes of memory for each number of a layer that a form writes out, three times in float32: 11.9 were measured.
WRITTEN_OUT = 12
# Characters of plan.json for settings, and of a tensor in headers and in the index; a score with as many as most have.
SETTINGS, TENSOR, SCORE = 150, 190, 0.012346


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The tokens of which each layer's inputs are kept.

    Attributes:
        tokens: how many.
        calibration: that keeps them; None before there is one: experts are taken to have as many each then.
    """

    tokens: int
    calibration: Calibration | None = None

    @classmethod
    def of(cls, calibration: Calibration) -> Sampled:
        """Return those of a calibration."""
        about = calibration.fingerprint
        return cls(tokens=min(about["sample"]["tokens"], about["text"]["tokens"]), calibration=calibration)

    @cached_property
    def _counts(self) -> dict[int, tuple[int, ...]]:
        """How many of them each expert has, by layer: read once, for whatever is foretold of it."""
        made = self.calibration
        return {} if made is None else {layer: tuple(made.sampled_counts(layer).tolist()) for layer in made.layers}

    def size(self, stack: Stack, facts: ModelFacts) -> LayerSize:
        """Return a layer that the model runs as far as work depends on it."""
        assert stack.shape is not None
        assert stack.index is not None
        return LayerSize(
            experts=stack.num_experts,
            top_k=facts.top_k,
            shape=stack.shape,
            sampled=self.tokens,
            counts=self._counts.get(stack.index, ()),
        )

    def nbytes(self, stack: Stack, facts: ModelFacts) -> tuple[int, int]:
        """Return the bytes of what calibration keeps of a layer, see `statistics_nbytes`."""
        return statistics_nbytes(stack.num_experts, facts.width, facts.top_k, self.tokens, 4)


def of_plan(
    host: Host, facts: ModelFacts, method: Method, estimate: Plan, sampled: Sampled, *, original: Original | None
) -> Estimate:
    """Return what `make_plan` will take.

    Args:
        host: the machine.
        facts: the model.
        method: the method with its parameters.
        estimate: what `estimate_plan` gave.
        sampled: tokens of which each layer's inputs are kept.
        original: where experts are; needed where the method reads them.
    """
    stacks = [stack for stack in facts.stacks if stack.index is not None and stack.prefix in estimate.layers]
    layers, calibration = [sampled.size(stack, facts) for stack in stacks], sampled.calibration
    total = method.trying(layers)
    reads, memory, writes, opened, left, counted = 0, 0, _json_nbytes(estimate, method), 0, 0, True
    for stack, layer in zip(stacks, layers, strict=True):
        (sums, sample), work = sampled.nbytes(stack, facts), method.work(layer)
        reads, memory, counted = reads + sums, max(memory, sums), counted and work is not None
        if not (work is None or work):
            continue
        missing, kept = (stack.num_experts, 0) if calibration is None else _measured(calibration, method, stack)
        opened, left, writes = opened + stack.num_experts, left + missing, writes + kept
        reads += sample + stack.num_experts * stack.expert_bytes
        memory = max(memory, sums + sample + opened_nbytes(layer, work if missing else None))
        total += Work(elements=OPENED * stack.num_experts * layer.weights)
        total += missing / stack.num_experts * (work or Work())
    done = opened - left
    kept_already = f"{done:,} of {opened:,} experts are measured already, and kept with the calibration"
    return Estimate(
        verb="plan",
        seconds=host.seconds(total, moved=reads) if counted else None,
        why="" if counted else f"nobody has counted what {method.name} computes",
        **host.memory(memory),
        reads=reads,
        writes=writes,
        downloads=downloads_of(original) if original else 0,
        notes=(kept_already,) if done else (),
    )


def opened_nbytes(layer: LayerSize, work: Work | None) -> int:
    """Return the bytes of memory of a layer's experts in float32 and of what is computed with them or, if that is more,
    of stacking their first matrices.
    """
    experts, computed = 4 * layer.experts * layer.weights, (work or Work()).nbytes
    if experts > working_nbytes(torch.zeros(0).device):  # they stay on disk
        return LIBRARIES + computed
    return LIBRARIES + max(4 * experts // 3, experts + computed)


def _measured(calibration: Calibration, method: Method, stack: Stack) -> tuple[int, int]:
    """Return how many experts of a layer are not measured yet, and the bytes of the rows that will be kept of them."""
    index = stack.index or 0
    view = view_of(calibration, index, ExpertWeights(calibration.model.source))
    what = method.kept_under(view)
    if what is None or view.kept is None:
        return stack.num_experts, 0
    rows = view.kept.read(what)
    columns = sum(len(each) for each in what.values() if isinstance(each, list))
    missing = stack.num_experts if rows is None else int(rows.isnan().any(1).sum())
    # A seal for each row, and headers.
    return missing, 8 * stack.num_experts * (columns + 1) + TENSOR if missing else 0


def _json_nbytes(plan: Plan, method: Method) -> int:
    """Return the bytes of plan.json with some scores and settings, of whose slots not all is known yet."""
    layers = {
        name: replace(layer, scores=(SCORE,) * len(layer.slots)) if method.removes and not layer.scores else layer
        for name, layer in plan.layers.items()
    }
    return len(replace(plan, layers=layers).text) + SETTINGS


def of_apply(
    host: Host,
    plan: Plan,
    original: Original,
    form: Format,
    sampled: Sampled,
    *,
    compressed: bool = False,
    verify: bool = True,
) -> Estimate:
    """Return what `apply` will take.

    Args:
        host: the machine.
        plan: the plan.
        original: the checkpoint.
        form: the form of the result.
        sampled: tokens of which the calibration kept each layer's inputs.
        compressed: whether what is computed is fitted on what compressed layers give: the text then runs again.
        verify: whether the result is opened again.
    """
    method = find_method(plan.method).of(plan.parameters)
    total, reads, memory, counted = Work(), 0, 0, not (compressed and plan.computed)
    for stack in original.facts.stacks:
        layer = plan.layers.get(stack.prefix)
        if layer is None or stack.shape is None or not layer.computed:
            continue
        size, (sums, sample) = sampled.size(stack, plan.model), sampled.nbytes(stack, plan.model)
        work, new = building(method, size, layer), built_nbytes(layer, stack)
        counted, total = counted and work is not None, total + (work or Work())
        reads, memory = reads + sums, max(memory, sums + 2 * new)
        if work is None or work:
            copied = 4 * len(layer.widths) * size.weights
            reads += sample + stack.num_experts * stack.expert_bytes
            total += Work(elements=OPENED * stack.num_experts * size.weights)
            memory = max(memory, sums + sample + opened_nbytes(size, work) + copied + 2 * new)
    nbytes, finished = form.nbytes(plan), form.finished_nbytes(plan)
    room, numbers = form.room(plan, Finish(plan=plan, original=original)), form.written_out(plan)
    if numbers:
        memory = max(memory, LIBRARIES + WRITTEN_OUT * numbers)
    if verify:
        # A few tokens run.
        loops = of_loops(host.device, kinds_of(plan, form), (PRODUCT,))
        total += loops + Work(elements=VERIFIED * nbytes / 2)
        memory = max(memory, LIBRARIES + loops.nbytes + _verified_nbytes(plan))
    reads += nbytes - plan.built_nbytes + verify * nbytes
    uncounted = f"nobody has counted what {'--propagate compressed' if compressed else plan.method} computes"
    # What passes is written, and read once more.
    seconds = host.seconds(total, moved=reads + nbytes + 2 * (room - nbytes)) if counted else None
    return Estimate(
        verb="apply",
        seconds=seconds,
        why="" if counted else uncounted,
        **host.memory(memory),
        reads=reads,
        writes=finished + TENSOR * len(original.checkpoint.tensors) + _json_nbytes(plan, method) + _beside(original),
        meanwhile=room - finished,
        downloads=downloads_of(original),
    )


def building(method: Method, size: LayerSize, layer: LayerPlan) -> Work | None:
    """Return the work of a layer's new tensors, those in few bits too."""
    work = method.building(size, layer)
    if work is None or method.rounding == "nearest":
        return work
    return work + sum((len(some) * of_width(size, width) for width, some in layer.packed.items()), Work())


def _verified_nbytes(plan: Plan) -> int:
    """Return the bytes of memory of the largest layer of a result while it is opened again: its experts, and those
    whose first matrices are stacked twice.
    """
    layers = ((plan.layers.get(stack.prefix), stack) for stack in plan.model.stacks)
    found = (s.num_experts * s.expert_bytes if layer is None else stored_nbytes(layer, s) for layer, s in layers)
    return 4 * max(found, default=0) // 3


def _beside(original: Original) -> int:
    """Return the bytes of the files that are copied as they are."""
    files = (file for file in original.folder.iterdir() if file.suffix in (".json", ".model", ".txt", ".jinja"))
    return sum(file.stat().st_size for file in files if file.is_file() and not file.name.endswith(".index.json"))
