"""What a run that was stopped left in its folder: which run it was, and what it had measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from moetailor.calibration.folder import ANEW, RUN, layer_file, part_name, write_json
from moetailor.calibration.statistics import SUMS
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


def has_layer(folder: Path, index: int, hashes: Mapping[str, str]) -> bool:
    """Say whether a layer is measured."""
    file = layer_file(folder, index)
    return file.exists() and part_name(file, SUMS) in hashes
