"""The bench: what the original gives, recorded when it is first needed, and cells that are held against it."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.comparison.cells import Cell, estimated, too_small
from moetailor.comparison.probe import LayerError
from moetailor.comparison.results import cell_result
from moetailor.comparison.stored import read_original
from moetailor.errors import TooSmallError
from moetailor.evaluation.fidelity import Reference
from moetailor.evaluation.speed import Speed
from moetailor.methods.run import make_plan
from moetailor.planning.plan import Plan
from moetailor.progress import Progress

# What lies in its place: what was recorded of the original, the same until it is complete, and a written result.
REFERENCE, UNFINISHED, RESULT = "reference", "unfinished", "result"


class Bench(ABC):
    """Measures cells against the original.

    Args:
        original: the original.
        calibration: what plans are made from.
        batches: held-out text.
        folder: where the original's speed lies.
        place: where what is large lies while it is needed.
        device: where models run.
        batch_memory: bytes that experts computed together may take; what the device is good for when None.
        dtype: dtype of the run.
        progress: called with (batches done, batches in all) while the original is recorded.
    """

    def __init__(
        self,
        original: Original,
        calibration: Calibration,
        batches: Sequence[Batch],
        folder: Path,
        place: Path,
        *,
        device: str,
        batch_memory: int | None = None,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.calibration = original, calibration
        self.weights = ExpertWeights(original, device=device, batch_memory=batch_memory)
        self.batches, self.folder, self.place = batches, folder, place
        self.device, self.batch_memory, self.dtype = device, batch_memory, dtype
        self._reference, self._partial = place / REFERENCE, place / UNFINISHED
        self._progress = progress

    @property
    @abstractmethod
    def model(self) -> Any:
        """The original, as `Reference` takes a model."""

    @abstractmethod
    def applied(self, plan: Plan) -> AbstractContextManager[Any]:
        """Give the compressed model, as `Reference` takes one, while the context lasts."""

    def speed(self, model: Any) -> Speed | None:
        """Return how fast a model runs; None where it is not measured."""
        return None

    def resident(self, model: Any) -> int | None:
        """Return the bytes of a model's weights in memory; None where it is not measured."""
        return None

    def errors(self, model: Any) -> Mapping[int, LayerError] | None:
        """Return the errors of a compressed model by decoder layer; None where they are not measured."""
        return None

    @cached_property
    def reference(self) -> Reference:
        """What the original gives on the held-out text; a folder that is there is complete."""
        if not self._reference.exists():
            began = time.perf_counter()
            shutil.rmtree(self._partial, ignore_errors=True)
            Reference(self._partial, self.batches).record(self.model, self._progress)
            seconds, speed = time.perf_counter() - began, self.speed(self.model)
            measured = dict.fromkeys(each.name for each in fields(Speed)) if speed is None else asdict(speed)
            measured |= {"resident": self.resident(self.model), "seconds": seconds}
            write_json(self.folder / "original.json", measured)
            self._partial.rename(self._reference)
        return Reference(self._reference, self.batches)

    @property
    def original(self) -> dict:
        """Its speed and its bytes in memory, as far as they are measured, and the seconds that recording it took."""
        file = self.folder / "original.json"
        if not file.exists():
            _ = self.reference
        return dict(read_original(file))

    def measure(self, cell: Cell, progress: Progress | None = None) -> dict:
        """Plan, apply and measure one cell; returns it as it stands in results.json.

        Raises:
            MoetailorError: whatever the stages refuse.
            RuntimeError: whatever torch does.
        """
        began = time.perf_counter()
        plan = self._plan(cell)
        planned = time.perf_counter() - began
        reference = self.reference
        began = time.perf_counter()
        with self.applied(plan) as model:
            applied = time.perf_counter() - began
            began = time.perf_counter()
            fidelity = reference.compare(model, self.model, progress)
            seconds = {"plan": planned, "apply": applied, "evaluate": time.perf_counter() - began}
            return cell_result(
                cell,
                plan,
                seconds=seconds,
                fidelity=fidelity,
                speed=self.speed(model),
                resident=self.resident(model),
                errors=self.errors(model),
                prices=self.calibration.prices,
            )

    def _plan(self, cell: Cell) -> Plan:
        """Plan a cell; refuses one with nothing to remove, and says how small it can be of one that is too small."""
        _ = estimated(cell, self.calibration.model)
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
            raise too_small(error, self.calibration.model) from None


def forget(place: Path) -> None:
    """Delete what a bench keeps in its place; whoever needs it again makes it again."""
    if (place / REFERENCE).exists():  # a folder of that name is complete, while it is deleted too
        shutil.rmtree(place / UNFINISHED, ignore_errors=True)
        (place / REFERENCE).rename(place / UNFINISHED)
    for name in (UNFINISHED, RESULT):
        shutil.rmtree(place / name, ignore_errors=True)
