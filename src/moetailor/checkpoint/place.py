"""Where results go: what is refused before anything is lost, and a folder that appears when it is complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moetailor.checkpoint.artifact import sync, write_json
from moetailor.checkpoint.lock import OLD, claimed, entries, restore
from moetailor.errors import FULL, MoetailorError, UnwritableError
from moetailor.schema import load_json

Inputs = Mapping[str, Path | Iterable[Path] | None]
PLAN_FILE, PROVENANCE_FILE = "moetailor_plan.json", "moetailor_provenance.json"
# Names of a message.
SHOWN = 5


def check_place(out: Path, *, overwrite: bool, inputs: Inputs | None = None) -> None:
    """Refuse a place for the result where something would be lost.

    Args:
        out: where the result shall be.
        overwrite: an earlier result may be replaced.
        inputs: files and folders that must stay, by what they are.

    Raises:
        MoetailorError: see the message.
    """
    if out.name in ("", ".."):
        raise MoetailorError(f"{out}: has no name of its own; name the folder of the result")
    if out.parts[0] == "~":
        raise MoetailorError(f"{out}: no shell has put your home folder in place of ~; write the whole path")
    restore(out)
    check_inputs(out, inputs or {})
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if out.exists() else "a link to nothing"
        raise MoetailorError(f"{out}: is {what}; choose another folder")
    if out.exists() and not overwrite:
        raise MoetailorError(f"{out}: exists; choose another folder or pass --overwrite")
    if foreign := sorted(_files(out) - _written(out)):
        raise MoetailorError(
            f"{out}: holds {_listed(foreign)}, which moetailor did not write there; choose another folder, or move "
            "them away"
        )


def check_empty(
    folder: Path, kind: str, *, but: Collection[str] = (), error: type[MoetailorError] = MoetailorError
) -> None:
    """Refuse a folder, to be filled by a run and those that resume it, that holds something else.

    Args:
        folder: it exists, and is known not to hold such a run.
        kind: what it will hold.
        but: names of what a run that was stopped may have left there before it said so.
        error: what is raised.
    """
    if not folder.is_dir():
        raise error(f"{folder}: is a file; choose another folder")
    if others := [name for name in entries(folder) if name not in but]:
        raise error(f"{folder}: holds {_listed(others)}, and no {kind}; choose another folder")


def check_apart(scratch: Path | None, models: Iterable[Path]) -> None:
    """Refuse a folder for what is needed for a while that is a model's, or lies in one.

    Raises:
        MoetailorError: it does.
    """
    if scratch is None:
        return
    real = Path(os.path.realpath(scratch))
    for folder in models:
        if Path(os.path.realpath(folder)) in (real, *real.parents):
            raise MoetailorError(f"--scratch {scratch}: lies in the model {folder}; choose another folder")


def check_inputs(out: Path, inputs: Inputs) -> None:
    """Refuse a place for the result that is an input of the run or holds one; see `check_place`."""
    for what, paths in inputs.items():
        for path in [paths] if isinstance(paths, Path) else paths or ():
            if _is(path, out):
                raise MoetailorError(f"{out}: is {what} itself; choose another folder")
            links = [link for link in path.iterdir() if link.is_symlink()] if path.is_dir() else []
            for part in (path, *links):
                if any(_is(folder, out) for folder in Path(os.path.realpath(part)).parents):
                    raise MoetailorError(f"{out}: holds {what}, {part}, which would be lost; choose another folder")


def check_file(file: Path, kind: str) -> None:
    """Refuse a file that could not be written, before the work whose result it shall hold, or that would be lost.

    Args:
        file: where an artifact shall be.
        kind: what it will be; an earlier one of the kind may be replaced, and an estimate of it.

    Raises:
        MoetailorError: see the message.
    """
    if file.is_dir() or not file.parent.is_dir():
        what = "is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise MoetailorError(f"{file}: {what}; name a file that can be written")
    if not os.access(file.parent if file.is_file() or not file.exists() else file, os.W_OK):
        raise MoetailorError(f"{file}: its place cannot be written to; name a file that can be written")
    if file.is_file() and not (_is_a(kind, file) or _is_a("estimate", file)):
        raise MoetailorError(f"{file}: exists and is no {kind} of moetailor; name another file, or move that one away")
    if file.name in _written(file.parent):
        raise MoetailorError(f"{file}: is a part of the result {file.parent}; name another file")


@contextmanager
def holding(out: Path) -> Iterator[Path]:
    """Hold the place of a result for a whole run, see `claimed`; the folder that it lies in is made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(out, error) from None
    with claimed(out) as work:
        yield work


@contextmanager
def new_folder(out: Path, *, overwrite: bool, nbytes: int) -> Iterator[Path]:
    """Give a folder beside `out` to write into; it takes `out`'s place when all went well, else it is deleted.

    Its provenance then names every file in it: what else is found there one day is not ours to replace.

    Args:
        out: where the result shall be.
        overwrite: replace an earlier result, at the end.
        nbytes: bytes that will be written, checked against the free space first.

    Raises:
        MoetailorError: `out` exists or holds what is not ours, another run writes there, or the disk has no room.
    """
    check_place(out, overwrite=overwrite)
    try:
        with holding(out) as work:
            check_place(out, overwrite=overwrite)  # another run may have ended in between
            free = shutil.disk_usage(work).free
            if nbytes > free:
                raise MoetailorError(f"{out}: writing it takes {nbytes:,} bytes, the disk has {free:,} free")
            folder, place = work / "new", work.parent / out.name
            folder.mkdir()
            yield folder
            _complete(folder)
            if os.path.lexists(place):
                place.rename(work / OLD)
            folder.rename(place)
            sync(place.parent)
    except (OSError, UnwritableError) as error:
        if error.errno in FULL:
            raise MoetailorError(f"{out}: the disk is full; nothing was kept of this run") from None
        raise


def _complete(folder: Path) -> None:
    """Note in the provenance which files a result has, and bring them to the disk."""
    provenance = folder / PROVENANCE_FILE
    told = load_json(provenance, error=MoetailorError, cure="it was just written") if provenance.is_file() else {}
    files = _files(folder)
    write_json(provenance, told | {"files": sorted(files | {PROVENANCE_FILE})})
    for path in [*files, "."]:
        sync(folder / path)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _is(path: Path, out: Path) -> bool:
    """Say whether two names are of one place, by whatever links, case or mount."""
    try:
        return os.path.samefile(path, out)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(out)


def _files(folder: Path) -> set[str]:
    """Return everything in a folder that is no folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _written(folder: Path) -> set[str]:
    """Return the files of the result in a folder, none where there is no result."""
    try:
        told = load_json(folder / PROVENANCE_FILE, error=MoetailorError, cure="")
    except MoetailorError:
        return set()
    files = told.get("files")
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def _is_a(kind: str, file: Path) -> bool:
    """Say whether a file begins as ours of a kind do."""
    begin = r'\s*(\{\s*"format":|<!DOCTYPE html>\s*<html[^>]*>\s*<head>\s*<meta name="generator" content=)\s*'
    with open(file, "rb") as stream:
        return re.match(f'{begin}"moetailor-{kind}"'.encode(), stream.read(1000)) is not None
