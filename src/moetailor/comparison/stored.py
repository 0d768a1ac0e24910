"""What a comparison keeps on disk, its cells and its results: read whole or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from moetailor.answers import all_marks
from moetailor.errors import MoetailorError
from moetailor.methods.registry import METHODS
from moetailor.schema import Count, Few, Within, load, load_json, read

VERSION = 3
ANEW = "make it with `moetailor compare`"
Positive = Annotated[float, Within(1e-300, 1e300)]
Share = Annotated[float, Within(0, 1)]
# Nats, and shares of a layer's energy: what is larger is no measurement, and no picture has room for it.
Nats = Annotated[float, Within(-1e6, 1e6)]
Error = Annotated[float, Within(0, 1e12)]
Seconds = Annotated[float, Within(0, 1e12)]


# What comparison.json notes: what all cells have in common.
Notes = TypedDict(
    "Notes",
    {
        "calibrate_seconds": Seconds,
        "model": dict,
        "held-out text": dict,
        "device": str,
        "dtype": str,
        "way of running": Literal["in memory", "streamed"],
        "versions": dict[str, str],
        "calibration": str,
        "sensitivities": dict[str, Error] | None,
    },
)


class _Perplexity(TypedDict):
    perplexity: Positive
    perplexity_interval: list[Positive]


class _Interval(TypedDict):
    mean: Nats
    low: Nats
    high: Nats


class _Fidelity(TypedDict):
    tokens: Annotated[int, Within(1)]
    original: _Perplexity
    compressed: _Perplexity
    kl: _Interval
    top1_agreement: _Interval


class _Speed(TypedDict):
    prefill: Positive
    decode: Positive
    prefill_low: Positive
    decode_low: Positive


class _Layer(TypedDict):
    expected: Error | None
    measured: Error | None
    slots: str


class _Cell(TypedDict):
    name: str
    method: str
    parameters: dict[str, int | float | str | bool]
    bits: str | None
    removes: bool
    budget: str


class MeasuredCell(_Cell):
    """A cell that was measured, as in ``cells/``; of a streamed comparison some of it was not."""

    error: None
    nbytes: Annotated[int, Within(1)]
    seconds: dict[str, Seconds]
    native: bool
    fidelity: dict[str, _Fidelity]
    speed: _Speed | None
    resident: Count | None
    expected_kl: Nats | None
    layers: dict[str, _Layer]


class FailedCell(_Cell):
    """A cell that could not be measured: why, and nothing else."""

    error: str
    nbytes: None
    seconds: None
    native: None
    fidelity: None
    speed: None
    resident: None
    expected_kl: None
    layers: None


class _Model(TypedDict):
    source: str
    model_type: str
    nbytes: Annotated[int, Within(1)]
    top_k: Few
    layers: dict[str, Few]


class _About(TypedDict):
    moetailor: str
    torch: str
    transformers: str
    threads: Count
    device: str
    seconds: dict[str, Seconds]


class _Calibrated(TypedDict):
    data: list[str]
    tokens: Count
    folder: str


class _HeldOut(TypedDict):
    data: list[str]
    tokens: Count
    domains: dict[str, Count]


class _Running(TypedDict):
    prefill: Positive | None
    decode: Positive | None
    prefill_low: Positive | None
    decode_low: Positive | None
    resident: Count | None


class OriginalSpeed(_Running):
    """What was measured of the original, as in original.json; null what was not, where it was streamed."""

    seconds: Seconds


class _Original(_Running):
    perplexity: dict[str, Positive]


class Results(TypedDict):
    """What is in results.json."""

    model: _Model
    about: _About
    calibration: _Calibrated
    heldout: _HeldOut
    original: _Original
    usage: dict[str, dict[str, list[Share]]]
    sensitivities: dict[str, Error] | None
    cells: list[dict]
    groups: dict[str, list[Count]]
    front: list[Count]
    recommendation: str | None
    spearman: dict[str, Nats] | None


def read_results(file: str | Path) -> dict[str, Any]:
    """Read what `compare` measured.

    Args:
        file: its results.json.

    Raises:
        MoetailorError: it cannot be read, is something else, or its parts do not fit each other.
    """
    results = load(Results, file, "comparison", VERSION, error=MoetailorError, cure=ANEW)
    layers = results["model"]["layers"]
    if not layers or not all(layer.isascii() and layer.isdecimal() and experts for layer, experts in layers.items()):
        raise MoetailorError(f"{file}: model.layers is no map of layers to their numbers of experts; {ANEW}")
    for layer, shares in results["usage"].items():
        if "" not in shares or any(len(found) != layers.get(layer) for found in shares.values()):
            raise MoetailorError(f"{file}: usage[{layer!r}] is not of a share for each expert of that layer; {ANEW}")
    for number, cell in enumerate(results["cells"]):
        read_cell(cell, f"{file}: cells[{number}]", layers, failed=cell.get("error") is not None)
    if sorted(number for group in results["groups"].values() for number in group) != [*range(len(results["cells"]))]:
        raise MoetailorError(f"{file}: groups do not name each of {len(results['cells'])} cells once; {ANEW}")
    measured = [number for number, cell in enumerate(results["cells"]) if cell["error"] is None]
    if strange := sorted(set(results["front"]) - set(measured)):
        raise MoetailorError(f"{file}: front has cells {strange}, which were not measured; {ANEW}")
    return {"format": "moetailor-comparison", "version": VERSION, **results}


def read_original(file: Path) -> OriginalSpeed:
    """Read what `Bench` measured of the original beside its predictions.

    Raises:
        MoetailorError: the file is damaged.
    """
    cure = f"delete {file.name} and the folder reference, and run the same command again"
    content = load_json(file, error=MoetailorError, cure=cure)
    return read(OriginalSpeed, content, str(file), error=MoetailorError, cure=cure)


def read_cell(cell: dict, where: str, layers: Mapping[str, int], *, failed: bool = False, cure: str = ANEW) -> dict:
    """Return a cell that is whole.

    Args:
        cell: as `cell_result` or `failed` gave it.
        where: what it was read from.
        layers: experts of each layer.
        failed: whether it is one that could not be measured.
        cure: what to do, the end of the message.

    Raises:
        MoetailorError: see the message.
    """
    found = read(FailedCell if failed else MeasuredCell, cell, where, error=MoetailorError, cure=cure)
    if not failed:
        if "" not in cell["fidelity"]:
            raise MoetailorError(f"{where}.fidelity lacks all text, ''; {cure}")
        slots = {layer: part["slots"] for layer, part in cell["layers"].items()}
        if {layer: len(letters) for layer, letters in slots.items()} != dict(layers):
            raise MoetailorError(f"{where}.layers does not have a letter for each slot of the model; {cure}")
        if unknown := {*"".join(slots.values())} - all_marks().keys():
            raise MoetailorError(f"{where}.layers has slots {sorted(unknown)}, which no version knows; {cure}")
    return dict(found)


def forget_plans_without_sensitivities(cells: Path) -> None:
    """Delete the rows of methods that go by sensitivities where there are some, and were measured without."""
    for name, method in METHODS.items():
        for file in cells.glob(f"{name}-*.json") if "sensitivity" in method.uses else ():
            file.unlink()
