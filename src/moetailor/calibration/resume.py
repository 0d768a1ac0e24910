"""What a run that was stopped left in its folder: which run it was, and what it had measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from moetailor.calibration.fingerprint import check_same_run
from moetailor.calibration.folder import ANEW, MANIFEST, RUN, Calibration, layer_file, part_name
from moetailor.calibration.statistics import SAMPLE, SUMS, load_sample, load_sums
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import CalibrationError
from moetailor.schema import find_json, read


class _Stopped(TypedDict):
    fingerprint: dict
    hashes: dict[str, str]


def note(folder: Path, fingerprint: dict, hashes: Mapping[str, str]) -> None:
    """Write down which run a folder belongs to, and the hashes of what it measured."""
    write_json(folder / RUN, {"fingerprint": fingerprint, "hashes": dict(sorted(hashes.items()))})


def noted(folder: Path) -> tuple[dict | None, dict[str, str]]:
    """Return the fingerprint of the run that a folder holds, finished or not, and the hashes of what it measured.

    The fingerprint is None where it holds none.
    """
    if (folder / MANIFEST).exists():
        calibration = Calibration.open(folder)
        return calibration.fingerprint, dict(calibration.hashes)
    file = folder / RUN
    if (content := find_json(file, error=CalibrationError, cure=ANEW)) is None:
        return None, {}
    found = read(_Stopped, content, str(file), error=CalibrationError, cure=ANEW)
    return found["fingerprint"], found["hashes"]


def finished_run(folder: Path, fingerprint: dict) -> Calibration | None:
    """Return the calibration that a run has left in its folder; None where it has still to measure.

    Raises:
        CalibrationError: the folder holds something else.
    """
    check_same_run(folder, noted(folder)[0], fingerprint)
    calibration = Calibration.open(folder) if (folder / MANIFEST).exists() else None
    return calibration if calibration is not None and calibration.complete else None


def measured_layers(folder: Path, facts: ModelFacts, hashes: Mapping[str, str]) -> set[int]:
    """Return the layers that are measured.

    Raises:
        CalibrationError: a file of one does not hold what was written.
    """
    found = set()
    for stack in facts.stacks:
        if stack.index is not None and (file := layer_file(folder, stack.index)).exists():
            sums, sample = (hashes.get(part_name(file, prefix)) for prefix in (SUMS, SAMPLE))
            if sums and sample:
                load_sums(file, stack.num_experts, facts.width, known=sums)
                load_sample(file, stack.num_experts, facts.width, facts.top_k, known=sample)
                found.add(stack.index)
    return found
