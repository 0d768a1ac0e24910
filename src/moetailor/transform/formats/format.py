"""What a form of result declares: what it cannot hold, its config, its tensors, how it is checked, how it loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.writer import Piece
from moetailor.errors import PlanError, did_you_mean
from moetailor.planning.plan import Plan
from moetailor.progress import Progress
from moetailor.transform.pieces import Parts, shards_of
from moetailor.transform.verify import verify_result

FORMATS: dict[str, Format] = {}


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What a form has at hand once the checkpoint lies there.

    Attributes:
        plan: the plan as it was asked for.
        original: the original.
        calibration: the plan's, if it is given.
        converter: llama.cpp's ``convert_hf_to_gguf.py``.
        quantizer: its ``llama-quantize``.
    """

    plan: Plan
    original: Original
    calibration: Calibration | None = None
    converter: Path | None = None
    quantizer: Path | None = None


class Format(ABC):
    """One form in which a result is written.

    Attributes:
        name: as ``--format`` knows it.
        also: the name of another form for which it may be taken, where that one cannot hold a plan.
        one_count: whether all layers have as many slots in it.
        automatic: whether ``--format auto`` may choose it, in the order in which formats are registered.
        library: what loads it, as the hub names it.
        loading: how it loads, a sentence for the model card.
        example: how it loads, as code for the model card; empty when the sentence is enough.
    """

    name: str
    also: str = ""
    one_count: bool = False
    automatic: bool = False
    library: str = "transformers"
    loading: str
    example: str = ""

    @abstractmethod
    def refusal(self, plan: Plan) -> str | None:
        """Return why a plan cannot be written in this form, with the numbers; None when it can."""

    @abstractmethod
    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        """Return config.json of the result: the original's, patched.

        Args:
            original: config.json of the original, a copy.
            config: the same as transformers reads it, for spellings that the file leaves to defaults.
            plan: what was done.
        """

    def check(self, plan: Plan, original: Original) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse an original that cannot be written in this form, whatever the plan.

        Raises:
            PlanError: see the message.
        """

    def able(self, plan: Plan, original: Original) -> bool:
        """Say whether `check` refuses nothing."""
        try:
            self.check(plan, original)
        except PlanError:
            return False
        return True

    def carried(self, plan: Plan) -> Plan:
        """Return the plan of the checkpoint that is written, where something else carries out the rest."""
        return plan

    def nbytes(self, plan: Plan) -> int:
        """Return the bytes of all tensors that are written: those that the plan says, where this form adds none."""
        return plan.nbytes

    def beside(self, shape: ExpertShape) -> dict[str, torch.Tensor]:
        """Return tensors that this form stores in each changed layer beside what the answers store, by name.

        Args:
            shape: the layer's experts.
        """
        return {}

    def shards(self, parts: Parts) -> list[list[Piece]]:
        """Return the tensors of each shard: what stays under the original's names, and what was computed.

        Args:
            parts: the plan, the original and what was computed.
        """
        return shards_of(parts)

    def verify(
        self, folder: Path, plan: Plan, *, trust_remote_code: bool = False, progress: Progress | None = None
    ) -> None:
        """Check a written result.

        Raises:
            CheckpointError: it is not what was planned.
        """
        verify_result(folder, plan, trust_remote_code=trust_remote_code, progress=progress)

    def check_tools(self, finish: Finish) -> None:
        """Refuse tools that this form has no use for, or cannot use.

        Raises:
            PlanError: see the message.
            MoetailorError: a library is missing.
        """
        if finish.converter or finish.quantizer:
            raise PlanError(f"--converter and --quantizer are for --format gguf; this result is {self.name}")

    def finished_nbytes(self, plan: Plan) -> int:
        """Return the bytes of all tensors once `finish` has run, which may write them anew."""
        return self.nbytes(plan)

    def written_out(self, plan: Plan) -> int:
        """Return the numbers of the largest layer that `finish` writes anew; 0 where it writes none."""
        return 0

    def room(self, plan: Plan, finish: Finish) -> int:
        """Return the bytes that the disk must have free: those written, beside what was computed for them."""
        return self.nbytes(plan) + plan.built_nbytes

    def finish(self, folder: Path, finish: Finish) -> int | None:  # noqa: B027 (most have nothing left to do)
        """Do what is left once the checkpoint lies in its folder and was checked.

        Returns:
            The bytes of what stands in place of its tensors; None where they stay.
        """


def register_format(form: Format) -> None:
    """Make a form known by its name."""
    assert form.name not in FORMATS, f"format {form.name} is registered twice"
    FORMATS[form.name] = form


def find_format(name: str) -> Format:
    """Return a form by name.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in FORMATS:
        raise PlanError(f"unknown format {name!r}" + did_you_mean(name, ["auto", *FORMATS]))
    return FORMATS[name]


def resolve_format(plan: Plan, wanted: str, original: Original | None = None) -> Format:
    """Return the form to write: the first that can hold the plan, of those of the name, or with ``auto`` of many.

    Args:
        plan: the plan.
        wanted: name of a form, or ``auto``.
        original: that it must be able to write, too; not looked at when None.

    Raises:
        PlanError: the form that is asked for cannot hold it.
    """
    if wanted == "auto":
        fitting = (form for form in FORMATS.values() if form.automatic and form.refusal(plan) is None)
        return next(form for form in fitting if original is None or form.able(plan, original))
    if reason := (form := find_format(wanted)).refusal(plan):
        if other := next(
            (other for other in FORMATS.values() if other.also == wanted and not other.refusal(plan)), None
        ):
            return other
        fits = next((other.name for other in FORMATS.values() if other.refusal(plan) is None), None)
        raise PlanError(f"format {wanted} {reason}" + (f"; format {fits} can hold it" if fits else ""))
    return form
