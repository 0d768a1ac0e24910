"""A calibration folder: the manifest that says what was measured on what, and one file of statistics a layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moetailor.calibration.batch import Batch, load_batches
from moetailor.calibration.statistics import ON_REQUEST, Sample, Sums, load_sample, load_sums
from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import CalibrationError

MANIFEST, TEXT, EFFECT = "calibration.json", "text.safetensors", "effect.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A finished calibration: facts at hand, statistics read layer by layer."""

    folder: Path
    model: ModelFacts
    fingerprint: dict

    @property
    def layers(self) -> list[int]:
        """Decoder layers with statistics."""
        return [stack.index for stack in self.model.stacks if stack.index is not None]

    def sums(self, layer: int) -> Sums:
        """Read the sums of one layer.

        Raises:
            CalibrationError: the file is missing, damaged or of another model.
        """
        file = layer_file(self.folder, layer)
        sums = load_sums(file)
        experts = next(stack.num_experts for stack in self.model.stacks if stack.index == layer)
        if len(sums.count) != experts:
            raise CalibrationError(
                f"{file}: is about {len(sums.count)} experts, the layer has {experts}; "
                "delete it and run calibrate again"
            )
        return sums

    def sample(self, layer: int) -> Sample:
        """Read the sampled tokens of one layer."""
        return load_sample(layer_file(self.folder, layer))

    def effects(self) -> dict[int, float] | None:
        """Return what errors of each layer cost: nats a token for each unit of squared error a token of its routed
        output, [D] summed; None where it was not recorded.
        """
        measured = read_json(self.folder / EFFECT)
        if measured is None:
            return None
        return {int(layer): one["kl"] / max(one["squared_error"], 1e-300) for layer, one in measured["layers"].items()}

    def holds(self, statistic: str) -> bool:
        """Say whether a statistic was recorded, see `statistics.ON_REQUEST`."""
        if statistic == "effect":
            return self.effects() is not None
        return statistic not in ON_REQUEST or bool(self.fingerprint.get(ON_REQUEST[statistic]))

    def batches(self) -> list[Batch]:
        """Read the text that was calibrated on.

        Raises:
            CalibrationError: its file is missing or damaged.
        """
        return load_batches(self.folder / TEXT)

    def save(self) -> None:
        """Write the manifest; a folder with one is finished."""
        manifest = {"format": "moetailor-calibration", "version": VERSION}
        manifest |= {"fingerprint": self.fingerprint, "model": self.model.to_json()}
        write_json(self.folder / MANIFEST, manifest)

    @classmethod
    def open(cls, folder: str | Path) -> Calibration:
        """Open a finished calibration folder.

        Raises:
            CalibrationError: not such a folder, an unfinished one, or one of another version.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST)
        if manifest is None:
            state = (
                "not finished; run the same calibrate command again to resume it"
                if list(folder.glob("layer-*")) or (folder / "run.json").exists()
                else "no calibration folder"
            )
            raise CalibrationError(f"{folder}: {state}")
        if manifest.get("format") != "moetailor-calibration" or manifest.get("version") != VERSION:
            raise CalibrationError(f"{folder / MANIFEST}: not a calibration of version {VERSION}; calibrate again")
        try:
            facts, fingerprint = ModelFacts.from_json(manifest["model"]), manifest["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{folder / MANIFEST}: damaged ({error!r}); delete the folder and calibrate again"
            ) from None
        return cls(folder=folder, model=facts, fingerprint=fingerprint)


def layer_file(folder: Path, layer: int) -> Path:
    """Return the file of one layer's statistics."""
    return folder / f"layer-{layer:04d}.safetensors"


def write_json(file: Path, content: dict) -> None:
    """Write JSON beside, then rename."""
    beside = file.with_suffix(".partial")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.rename(file)


def read_json(file: Path) -> dict | None:
    """Read JSON; None when the file does not exist.

    Raises:
        CalibrationError: the file is not JSON.
    """
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise CalibrationError(f"{file}: not JSON ({error}); delete the folder and calibrate again") from None
    if not isinstance(content, dict):
        raise CalibrationError(f"{file}: not a JSON object; delete the folder and calibrate again")
    return content
