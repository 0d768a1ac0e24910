"""The bench for models that fit into memory: the original is loaded once, and copied for each cell."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from moetailor.checkpoint.models import copy_sharing_tensors
from moetailor.comparison.bench import Bench
from moetailor.comparison.probe import LayerError, Probe
from moetailor.evaluation.speed import Speed, measure_speed, resident_nbytes
from moetailor.planning.plan import Plan
from moetailor.transform.apply import apply

# Tokens of the prompt that speed is measured on, and new ones: little against a pass over held-out text.
PROMPT, NEW_TOKENS = 256, 16


class WholeBench(Bench):
    """Applies each plan to a copy of the original in memory, of which there is one at a time."""

    @cached_property
    def model(self) -> Any:
        """The original in memory."""
        gc.collect()  # models have cycles: the one that calibrated, if any, goes first
        return self.source.load(dtype=self.dtype, device=self.device)

    @cached_property
    def probe(self) -> Probe:
        """What its layers get and give."""
        return Probe(self.model, self.source.anatomy.layers, self.calibration.batches(), self.batches)

    def copy(self) -> Any:
        """Return a copy of the original that shares every tensor.

        Applying a plan puts new tensors in place of those that it changes, so the original stays what it is and the
        copy costs what the plan leaves of the experts.
        """
        gc.collect()  # the copy before this one goes first
        return copy_sharing_tensors(self.model)

    @contextmanager
    def applied(self, plan: Plan) -> Iterator[Any]:
        """Give a copy that the plan was applied to."""
        yield apply(plan, self.copy(), calibration=self.calibration)

    def speed(self, model: Any) -> Speed:
        """Return how fast a model in memory runs."""
        return measure_speed(model, self.batches[0].input_ids[:1, :PROMPT], new_tokens=NEW_TOKENS)

    def resident(self, model: Any) -> int:
        """Return the bytes of its weights."""
        return resident_nbytes(model)

    def errors(self, model: Any) -> dict[int, LayerError]:
        """Return the errors of a compressed copy."""
        return self.probe.errors(model)
