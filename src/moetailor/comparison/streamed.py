"""The bench for models larger than memory: each cell is written, run a layer at a time, and deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from moetailor.calibration.batch import Batch
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.original import Original
from moetailor.comparison.bench import REFERENCE, RESULT, Bench
from moetailor.comparison.cells import Cell, estimated
from moetailor.errors import MoetailorError, PlanError
from moetailor.planning.plan import Plan
from moetailor.runtime.parts import in_parts
from moetailor.transform.apply import apply
from moetailor.transform.formats import Finish, resolve_format

# Hidden states of the text that lie there at once: the original's, and those in front of a layer and behind it.
STATES = 3


class StreamedBench(Bench):
    """Writes each result into `place`, of which there is one at a time, and runs both models from disk.

    Speed, bytes in memory and errors of layers are not measured.
    """

    @cached_property
    def model(self) -> StreamedModel:
        """The original on disk."""
        return in_parts(self.source, dtype=self.dtype, device=self.device)

    @contextmanager
    def applied(self, plan: Plan) -> Iterator[StreamedModel]:
        """Give the written result, which is deleted at the end."""
        out = self.place / RESULT
        how = {"device": self.device, "batch_memory": self.batch_memory}
        try:
            # Not verified: what follows opens every part of it, and refuses what is not finite.
            apply(plan, self.source, out, calibration=self.calibration, verify=False, **how)
            result = Original(out, takes="anything", trust_remote_code=self.source.trust_remote_code)
            yield in_parts(result, dtype=self.dtype, device=self.device)
        finally:
            shutil.rmtree(out, ignore_errors=True)


def make_room(
    place: Path, original: Original, cells: Sequence[Cell], batches: Sequence[Batch], dtype: torch.dtype
) -> None:
    """Delete the result that a killed run left, and refuse a disk without room for what `StreamedBench` keeps there.

    Args:
        place: where it will work.
        original: the original.
        cells: those that are not measured yet.
        batches: held-out text.
        dtype: dtype of the run.

    Raises:
        MoetailorError: the disk has no room.
    """
    shutil.rmtree(place / RESULT, ignore_errors=True)
    largest = max((_nbytes(original, cell) for cell in cells), default=0)
    states = STATES * sum(batch.input_ids.numel() for batch in batches) * original.facts.width * dtype.itemsize
    states *= not (place / REFERENCE).exists()
    free = shutil.disk_usage(place).free
    if largest and largest + states > free:
        told = f"writing the largest result takes {largest:,} bytes and hidden states {states:,}, {free:,} are free"
        raise MoetailorError(f"{place}: {told}; name a folder with more room with --scratch")


def _nbytes(original: Original, cell: Cell) -> int:
    """Return the bytes that writing a cell's result takes, as known without data; 0 of one that will be refused."""
    try:
        plan = estimated(cell, original.facts)
    except PlanError:
        return 0
    return resolve_format(plan, "auto", original).room(plan, Finish(plan=plan, original=original))
