"""A calibration folder: the manifest that says what was measured on what, and one file of statistics a layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch

from moetailor.calibration.batch import AGAIN, Batch, load_batches
from moetailor.calibration.domains import sampled_domains
from moetailor.calibration.effects import Effects, Prices
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.statistics import ON_REQUEST, SAMPLE, SUMS, Sample, Sums, load_counts, load_sample, load_sums
from moetailor.calibration.text import TextOptions
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import CalibrationError
from moetailor.schema import Count, load, load_json, read

MANIFEST, RUN, TEXT, STATES = "calibration.json", "run.json", "text.safetensors", "states"
SENSITIVITY = "sensitivity.json"
VERSION = 1
ANEW = "delete the folder and calibrate again"


class _Text(TypedDict):
    hash: str
    tokens: Count
    counted: Count
    shapes: list[list[int]]


class _Sampled(TypedDict):
    tokens: Count
    seed: int


class _Always(TypedDict):
    model: dict
    text: _Text
    sample: _Sampled
    versions: dict[str, str]
    dtype: str


class Fingerprint(_Always, total=False):
    """All that the numbers depend on; the last three where they were asked for or known."""

    tokenizer: str
    options: dict[str, Any]
    residual: bool


class _Manifest(TypedDict):
    fingerprint: Fingerprint
    model: ModelFacts
    hashes: dict[str, str]
    hash: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A finished calibration: facts at hand, statistics read layer by layer.

    Attributes:
        folder: where it lies.
        model: facts of the model.
        fingerprint: all that the numbers depend on.
        hashes: of each part of it when it was written, by file and, in a layer's file, prefix; what is read must agree.
    """

    folder: Path
    model: ModelFacts
    fingerprint: dict
    hashes: Mapping[str, str]

    @property
    def layers(self) -> list[int]:
        """Decoder layers with statistics."""
        return [stack.index for stack in self.model.stacks if stack.index is not None]

    @property
    def complete(self) -> bool:
        """Whether no file is missing."""
        return all((self.folder / name.split()[0]).exists() for name in self.hashes)

    def sums(self, layer: int) -> Sums:
        """Read the sums of one layer.

        Raises:
            CalibrationError: the file is missing, damaged or of another calibration.
        """
        file, experts = layer_file(self.folder, layer), self._experts(layer)
        return load_sums(file, experts, self.model.width, known=self._known(part_name(file, SUMS)))

    def sample(self, layer: int) -> Sample:
        """Read the sampled tokens of one layer; see `sums`."""
        file, experts = layer_file(self.folder, layer), self._experts(layer)
        known = self._known(part_name(file, SAMPLE))
        return load_sample(file, experts, self.model.width, self.model.top_k, known=known)

    def sampled_counts(self, layer: int) -> torch.Tensor:
        """Read how many of the sampled tokens each expert of one layer has, [E], and nothing else; see `sums`."""
        return load_counts(layer_file(self.folder, layer), self._experts(layer))

    @property
    def prices(self) -> Prices | None:
        """What errors cost the predictions; None where it was not measured.

        Raises:
            CalibrationError: its file is damaged or of another calibration.
        """
        file = self.folder / SENSITIVITY
        if SENSITIVITY not in self.hashes or not file.exists():
            return None
        content = load_json(file, error=CalibrationError, cure=AGAIN)
        measured = read(Effects, content, str(file), error=CalibrationError, cure=AGAIN)
        if _hash(measured) != self.hashes[SENSITIVITY] or set(measured["layers"]) != set(self.layers):
            raise CalibrationError(f"{file}: holds other values than were written; {AGAIN}")
        return Prices.of(measured)

    def sensitivities(self) -> dict[int, float] | None:
        """Return what coarse errors of each layer cost: nats a token for each unit of squared error a token of its
        routed output, summed over its width; None where it was not measured.

        Raises:
            CalibrationError: its file is damaged or of another calibration.
        """
        return None if (prices := self.prices) is None else dict(prices.coarse)

    def holds(self, statistic: str) -> bool:
        """Say whether a statistic was recorded, see `statistics.ON_REQUEST`."""
        if statistic == "sensitivity":
            return self.prices is not None
        return statistic not in ON_REQUEST or bool(self.fingerprint.get(ON_REQUEST[statistic]))

    @cached_property
    def domains(self) -> tuple[list[str], torch.Tensor]:
        """Names of the text's domains, and which of them each sampled token comes from, [N] in the order of every
        layer's sample; the text is read for them once.
        """
        return sampled_domains(self.batches(), SampleOptions(**self.fingerprint["sample"]))

    def batches(self) -> list[Batch]:
        """Read the text that was calibrated on.

        Raises:
            CalibrationError: its file is missing, damaged or of another calibration.
        """
        return load_batches(self.folder / TEXT, self._known(TEXT))

    def save(self) -> None:
        """Write the manifest; a folder with one is finished."""
        content = self._content()
        manifest = {"format": "moetailor-calibration", "version": VERSION, **content, "hash": _hash(content)}
        write_json(self.folder / MANIFEST, manifest)

    def with_sensitivities(self, measured: Effects) -> Calibration:
        """Write what was measured beside the rest, and return the calibration that holds it."""
        write_json(self.folder / SENSITIVITY, dict(measured))
        made = replace(self, hashes={**self.hashes, SENSITIVITY: _hash(measured)})
        made.save()
        return made

    @classmethod
    def open(cls, folder: str | Path) -> Calibration:
        """Open a finished calibration folder.

        Raises:
            CalibrationError: not such a folder, an unfinished one, or one of another version.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            state = (
                "not finished; run the same calibrate command again to resume it"
                if list(folder.glob("layer-*")) or (folder / RUN).exists()
                else "no calibration folder"
            )
            raise CalibrationError(f"{folder}: {state}")
        manifest = load(_Manifest, folder / MANIFEST, "calibration", VERSION, error=CalibrationError, cure=ANEW)
        if "options" in (fingerprint := dict(manifest["fingerprint"])):
            where = f"{folder / MANIFEST}: fingerprint.options"
            read(TextOptions, fingerprint["options"], where, error=CalibrationError, cure=ANEW)
        made = cls(folder=folder, model=manifest["model"], fingerprint=fingerprint, hashes=manifest["hashes"])
        if _hash(made._content()) != manifest["hash"]:
            raise CalibrationError(f"{folder / MANIFEST}: holds other values than were written; {ANEW}")
        return made

    def _content(self) -> dict:
        """Return what the manifest says."""
        hashes = dict(sorted(self.hashes.items()))
        return {"fingerprint": self.fingerprint, "model": self.model.to_json(), "hashes": hashes}

    def _experts(self, layer: int) -> int:
        return next(stack.num_experts for stack in self.model.stacks if stack.index == layer)

    def _known(self, name: str) -> str:
        if name not in self.hashes:
            raise CalibrationError(f"{self.folder / MANIFEST}: has no hash of {name}; {ANEW}")
        return self.hashes[name]


def layer_file(folder: Path, layer: int) -> Path:
    """Return the file of one layer's statistics."""
    return folder / f"layer-{layer:04d}.safetensors"


def part_name(file: Path, prefix: str) -> str:
    """Return the name of a part of a layer's file among the hashes."""
    return f"{file.name} {prefix}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
