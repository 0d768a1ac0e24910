"""What planning measured of each expert, kept in the calibration folder.

What an expert loses in each form that it may take is long to measure, and depends on no budget. So it is measured once:
a run that was killed goes on where it was, and any other budget is a choice among numbers that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetailor._version import __version__
from moetailor.calibration.folder import Calibration, layer_file
from moetailor.checkpoint.artifact import write_tensors
from moetailor.checkpoint.lock import claimed
from moetailor.checkpoint.tensors import digest, read_tensors
from moetailor.errors import FULL, CalibrationError, MoetailorError, MoetailorWarning

# To be raised when methods measure otherwise: what lies in folders is then measured again.
FOLDER, VERSION = "measured", 3


@dataclass(frozen=True)
class Kept:
    """Rows of numbers, one for each expert of a layer.

    Attributes:
        calibration: what they were measured on.
        layer: the layer.
    """

    calibration: Calibration
    layer: int

    def read(self, what: Mapping[str, Any]) -> torch.Tensor | None:
        """Return rows, float64 [E, columns], NaN for experts that are not measured yet; None where none is.

        Args:
            what: all that the numbers depend on, beside calibration, model and version.

        Raises:
            CalibrationError: the file is damaged, or of another calibration.
        """
        file, cure = self._file(what), "delete it, and it is measured again"
        if not file.exists():
            return None
        found = read_tensors(file, names=("rows", "seal"), error=CalibrationError, cure=cure)
        if not torch.equal(found["seal"], self._seal(found["rows"], what)):
            raise CalibrationError(f"{file}: is damaged, or of another calibration; {cure}")
        return found["rows"]

    def write(self, what: Mapping[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Write rows, and return them with those that another run has measured meanwhile.

        Where they cannot be written, as in a folder that is only there to be read, it warns and goes on.

        Args:
            what: as in `read`.
            rows: as `read` returns them.

        Raises:
            MoetailorError: the disk is full. What was written before is there for the next run.
            CalibrationError: see `read`.
        """
        file = self._file(what)
        try:
            file.parent.mkdir(exist_ok=True)
            with claimed(file, wait=True):
                if (there := self.read(what)) is not None:
                    rows = torch.where(rows.isnan(), there, rows)
                write_tensors(file, {"rows": rows, "seal": self._seal(rows, what)})
        except CalibrationError:
            raise
        except (MoetailorError, OSError) as error:
            number = getattr(error, "errno", None)
            if number in FULL:
                raise
            why = os.strerror(number) if number else str(error)
            told = "so what is measured of experts is not kept, and a plan that is stopped begins anew"
            warnings.warn(f"{file.parent}: cannot be written ({why}), {told}", MoetailorWarning, stacklevel=3)
        return rows

    def _file(self, what: Mapping[str, Any]) -> Path:
        name = f"layer-{self.layer:04d}-{hashlib.sha256(self._key(what)).hexdigest()[:12]}.safetensors"
        return self.calibration.folder / FOLDER / name

    def _key(self, what: Mapping[str, Any]) -> bytes:
        name = layer_file(self.calibration.folder, self.layer).name
        parts = {part: known for part, known in self.calibration.hashes.items() if part.startswith(name)}
        known = {"parts": parts, "model": self.calibration.fingerprint["model"], "versions": [VERSION, __version__]}
        return json.dumps({**known, "what": dict(what)}, sort_keys=True).encode()

    def _seal(self, rows: torch.Tensor, what: Mapping[str, Any]) -> torch.Tensor:
        found = hashlib.sha256(self._key(what) + digest({"rows": rows}).encode()).digest()
        return torch.tensor(list(found), dtype=torch.uint8)
