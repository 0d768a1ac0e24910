"""The original on the bench: loaded once, copied for each cell, and what is measured of it, when it is first needed."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.models import copy_sharing_tensors
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.comparison.cells import Cell
from moetailor.comparison.probe import Probe
from moetailor.comparison.results import cell_result
from moetailor.comparison.stored import read_original
from moetailor.errors import PlanError, TooSmallError
from moetailor.evaluation.fidelity import Reference
from moetailor.evaluation.speed import Speed, measure_speed, resident_nbytes
from moetailor.methods.estimate import estimate_plan
from moetailor.methods.run import make_plan
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan
from moetailor.progress import Progress
from moetailor.transform.apply import apply

# Tokens of the prompt that speed is measured on, and new ones: little against a pass over held-out text.
PROMPT, NEW_TOKENS = 256, 16


class Bench:
    """Measures cells against the original, of which one copy is in memory at a time.

    Args:
        original: the original.
        calibration: what plans are made from.
        batches: held-out text.
        folder: where the original's speed lies.
        work: where its predictions lie, in ``reference`` when they are complete.
        device: where models run.
        batch_memory: bytes that experts computed together may take; what the device is good for when None.
        dtype: dtype of the run.
        progress: called with (batches done, batches in all) while the original's predictions are recorded.
    """

    def __init__(
        self,
        original: Original,
        calibration: Calibration,
        batches: Sequence[Batch],
        folder: Path,
        work: Path,
        *,
        device: str,
        batch_memory: int | None = None,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.calibration = original, calibration
        self.weights = ExpertWeights(original, device=device, batch_memory=batch_memory)
        self.batches, self.folder = batches, folder
        self._place, self._partial = work / "reference", work / "unfinished"
        self._load: Callable[[], Any] = lambda: original.load(dtype=dtype, device=device)
        self._progress = progress

    @cached_property
    def model(self) -> Any:
        """The original in memory."""
        gc.collect()  # models have cycles: the one that calibrated, if any, goes first
        return self._load()

    @cached_property
    def probe(self) -> Probe:
        """What its layers get and give."""
        return Probe(self.model, self.source.anatomy.layers, self.calibration.batches(), self.batches)

    @cached_property
    def reference(self) -> Reference:
        """Its predictions on the held-out text; a folder that is there is complete."""
        if not self._place.exists():
            began = time.perf_counter()
            shutil.rmtree(self._partial, ignore_errors=True)
            Reference(self._partial, self.batches).record(self.model, self._progress)
            seconds = time.perf_counter() - began
            measured = asdict(self._speed(self.model)) | {"resident": resident_nbytes(self.model)}
            write_json(self.folder / "original.json", measured | {"seconds": seconds})
            self._partial.rename(self._place)
        return Reference(self._place, self.batches)

    @property
    def original(self) -> dict:
        """Its speed, its bytes in memory, and the seconds that recording its predictions took."""
        file = self.folder / "original.json"
        if not file.exists():
            _ = self.reference
        return dict(read_original(file))

    def copy(self) -> Any:
        """Return a copy of the original that shares every tensor.

        Applying a plan puts new tensors in place of those that it changes, so the original stays what it is and the
        copy costs what the plan leaves of the experts.
        """
        gc.collect()  # the copy before this one goes first
        return copy_sharing_tensors(self.model)

    def measure(self, cell: Cell, progress: Progress | None = None) -> dict:
        """Plan, apply and measure one cell; returns it as it stands in results.json.

        Raises:
            MoetailorError: whatever the stages refuse.
            RuntimeError: whatever torch does.
        """
        began = time.perf_counter()
        plan = self._plan(cell)
        planned = time.perf_counter() - began
        reference, probe = self.reference, self.probe
        began = time.perf_counter()
        model = apply(plan, self.copy(), calibration=self.calibration)
        applied = time.perf_counter() - began
        began = time.perf_counter()
        fidelity = reference.compare(model, self.model, progress)
        seconds = {"plan": planned, "apply": applied, "evaluate": time.perf_counter() - began}
        return cell_result(
            cell,
            plan,
            seconds=seconds,
            fidelity=fidelity,
            speed=self._speed(model),
            resident=resident_nbytes(model),
            errors=probe.errors(model),
            prices=self.calibration.prices,
        )

    def close(self) -> None:
        """Delete the original's predictions; whoever needs them again records them again."""
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._place.exists():
            self._place.rename(self._partial)
            shutil.rmtree(self._partial)

    def _plan(self, cell: Cell) -> Plan:
        """Plan a cell; refuses one with nothing to remove, and says how small it can be of one that is too small."""
        facts = self.calibration.model
        size = cell.budget.in_bytes(facts.nbytes).size
        if cell.width is not None and size is not None:
            every = estimate_plan(facts, cell.method, Budget.parse(remove="0%"), width=cell.width).nbytes
            if every <= size:
                of_all = f"{every:,} bytes, {every / facts.nbytes:.1%} of the original's"
                raise PlanError(f"with every expert in {cell.width} it takes {of_all}: nothing is left to remove")
        try:
            return make_plan(
                self.calibration,
                cell.method.name,
                cell.budget,
                parameters=cell.method.parameters,
                width=cell.width,
                weights=self.weights,
            )
        except TooSmallError as error:
            least = f"{error.least:,} bytes, {error.least / facts.nbytes:.1%} of the original's"
            raise PlanError(f"takes at least {least}") from None

    def _speed(self, model: Any) -> Speed:
        return measure_speed(model, self.batches[0].input_ids[:1, :PROMPT], new_tokens=NEW_TOKENS)
