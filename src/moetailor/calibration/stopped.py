"""How far the measuring of sensitivities was when it was stopped: its streams lie on disk, and this says what they are.

The walk deletes what went into a layer only after the layer is noted: whatever is noted is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from moetailor import ranks
from moetailor.checkpoint.artifact import write_json
from moetailor.errors import CalibrationError
from moetailor.schema import Few, find_json, read

NOTE = "stopped.json"


class _Noted(TypedDict):
    of: dict[str, Any]
    layer: Few
    squared: dict[str, float]


class Stopped:
    """Where a run of this process's streams stands, in the folder of their states.

    Args:
        folder: the folder; None where states are in memory, and nothing outlives the run.
        hashes: of the calibration's parts, which tell its runs from another's.

    Attributes:
        layer: the layer whose inputs all streams are; 0 where a run begins.
        squared: the squared error over tokens in the layer of each stream, by its name.

    Raises:
        CalibrationError: the note cannot be read.
    """

    def __init__(self, folder: Path | None, hashes: dict[str, str]) -> None:
        self._file = None if folder is None else folder / NOTE
        # A process has other streams where there are more or fewer processes.
        self._of = {"hashes": hashes, "processes": ranks.count()}
        self.layer, self.squared = 0, dict[str, float]()
        cure = f"delete {folder} and run the same command again"
        if self._file is None or (content := find_json(self._file, error=CalibrationError, cure=cure)) is None:
            return
        found = read(_Noted, content, str(self._file), error=CalibrationError, cure=cure)
        if found["of"] == self._of:
            self.layer, self.squared = found["layer"], found["squared"]

    def note(self, layer: int) -> None:
        """Write down that all streams stand in front of a layer."""
        if self._file is not None:
            write_json(self._file, {"of": self._of, "layer": layer, "squared": self.squared})
