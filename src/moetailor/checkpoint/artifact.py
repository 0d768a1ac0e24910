"""Artifacts: files that are whole or not there. Each is written beside, brought to the disk, and renamed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moetailor.checkpoint.lock import claimed
from moetailor.errors import UnwritableError


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        UnwritableError: it cannot be written; what was there stays.
    """
    with _whole(file) as beside:
        beside.write_bytes(content)


def write_text(file: Path, text: str) -> None:
    """Write text in UTF-8, with ? for what it cannot say; see `write_bytes`."""
    write_bytes(file, text.encode("utf-8", errors="replace"))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that a person can read; see `write_bytes`."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def add_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Write into an artifact in JSON what it was made with; the rest stays as it is written.

    Raises:
        UnwritableError: see `write_bytes`.
    """
    text = file.read_text(encoding="utf-8")
    if "settings" in (content := json.loads(text)):  # of what it was made from
        del content["settings"]
        text = json.dumps(content, indent=2)
    said = json.dumps(settings, indent=2).replace("\n", "\n  ")
    write_text(file, f'{text.rstrip().removesuffix("}").rstrip()},\n  "settings": {said}\n}}\n')


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as one safetensors file; see `write_bytes`."""
    with _whole(file) as beside:
        _save(tensors, beside)


def write_by(file: Path, write: Callable[[Path], None]) -> None:
    """Have a library write a file, at the place that it is given; see `write_bytes`."""
    with _whole(file) as beside:
        write(beside)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors as one safetensors file in a folder that is the run's own, where nobody looks for whole files.

    Raises:
        UnwritableError: the file cannot be written, as on a full disk.
    """
    try:
        _save(tensors, file)
    except OSError as error:
        raise UnwritableError(file, error) from None


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Give a place to write a file at; it is put in the file's place when all went well, else it is deleted."""
    try:
        if file.exists() and not file.is_file():
            yield file  # a pipe or a terminal, such as /dev/stdout
            return
        place = Path(os.path.realpath(file))  # what a link leads to, not the link
        with claimed(place) as work:
            yield (beside := work / "new")
            sync(beside)
            beside.rename(place)
            sync(place.parent)
    except OSError as error:
        raise UnwritableError(file, error) from None


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from None
    file.chmod(mode)  # safetensors renames a file of its own, which only its owner may read
