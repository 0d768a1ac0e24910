"""What a run that was stopped left in its folder: which run it was, and what it had measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from moetailor.calibration.folder import ANEW, RUN, layer_file, part_name, write_json
from moetailor.calibration.statistics import SAMPLE, SUMS, load_sample, load_sums
from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import CalibrationError
from moetailor.schema import load_json, read


class _Stopped(TypedDict):
    fingerprint: dict
    hashes: dict[str, str]


def note(folder: Path, fingerprint: dict, hashes: Mapping[str, str]) -> None:
    """Write down which run a folder belongs to, and the hashes of what it measured."""
    write_json(folder / RUN, {"fingerprint": fingerprint, "hashes": dict(sorted(hashes.items()))})


def noted(folder: Path) -> tuple[dict | None, dict[str, str]]:
    """Return the fingerprint of the stopped run that a folder holds, if any, and the hashes of what it measured."""
    file = folder / RUN
    if not file.exists():
        return None, {}
    content = load_json(file, error=CalibrationError, cure=ANEW)
    found = read(_Stopped, content, str(file), error=CalibrationError, cure=ANEW)
    return found["fingerprint"], found["hashes"]


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
