"""Whose a place is: one run at a time writes there, and only what carries our mark is deleted.

Every place that a run writes to has a work folder of ours: `.NAME.moetailor` beside a result that appears when it is
complete, `.moetailor` in a folder that grows, `moetailor-scratch-XXXX` among temporary files. The lock in it says
who works there, and is the mark of the folder. The kernel frees a lock when its process ends, however that is: what
lies beside a free lock was left by a run that was killed. Locks are sure between the processes of one machine, on its
own disks; on a disk that several machines share they are as sure as its server makes them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path

from moetailor.errors import MoetailorError, UnwritableError

LOCK, MARK = "lock", "moetailor-lock"
GROWING = ".moetailor"
# No name of anybody else, as those that a kill left empty are deleted, too.
SCRATCH = "moetailor-scratch-"
SCRATCHES = f"{SCRATCH}????????"
# Seconds that runs wait for one that is to be done in a moment.
PATIENCE = 60
# What is to be replaced, until the new result is in its place.
OLD = "old"
# The work folders that this run holds, with its process: what a verb holds is held for the stages in it too.
_held: ContextVar[frozenset[tuple[int, Path]]] = ContextVar("held", default=frozenset())


@contextmanager
def claimed(out: Path, *, wait: bool = False) -> Iterator[Path]:
    """Hold the place of a file or folder that appears when it is complete.

    Gives an empty folder beside it, on the same disk, which goes at the end. What a killed run left there is put back
    or deleted first.

    Args:
        out: the place; its parent exists.
        wait: wait for another run that holds it, where runs do so for a moment only; a minute at most.

    Raises:
        MoetailorError: another run holds it, or it cannot be written.
    """
    work = work_folder(out)
    if _is_held(work):
        yield work
        return
    with _locked(work, out, wait):
        place = work.parent / out.name  # absolute: the working directory may be what is replaced
        _put_back(work, place)
        _clear(work)
        try:
            yield work
        finally:
            _put_back(work, place)
            _clear(work)


@contextmanager
def growing(folder: Path) -> Iterator[Path]:
    """Hold a folder that grows until it is complete.

    Gives a folder in it for what is not finished; what is left there stays for the next run. What a killed run left of
    files in the folder is deleted first.

    Args:
        folder: the folder; it is made.

    Raises:
        MoetailorError: another run holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(folder, error) from None
    work = Path(os.path.realpath(folder)) / GROWING
    with _locked(work, folder):
        for left in folder.rglob(".*.moetailor"):
            _sweep(left)
        yield work


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """Give a folder for what is needed for a while, which goes at the end; those of killed runs go first.

    Args:
        place: the folder that it is made in; the system's for temporary files when None.

    Raises:
        MoetailorError: it cannot be written.
    """
    place = Path(tempfile.gettempdir()) if place is None else place
    for left in place.glob(SCRATCHES):
        _sweep(left)
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=place))
    except OSError as error:
        raise UnwritableError(place, error) from None
    with _locked(folder, folder):
        try:
            yield folder
        finally:
            _clear(folder)


def sweep(folder: Path) -> None:
    """Delete what killed runs left in a folder that is complete.

    Args:
        folder: a folder that `growing` held.
    """
    for left in [Path(os.path.realpath(folder)) / GROWING, *folder.rglob(".*.moetailor")]:
        _sweep(left)


def restore(out: Path) -> None:
    """Put back a result that a run had set aside when it was killed.

    Args:
        out: its place.
    """
    work = work_folder(out)
    if os.path.lexists(work / OLD) and (work / LOCK).is_file() and not os.path.lexists(out):
        with suppress(MoetailorError), _locked(work, out):  # else a run is just replacing it
            _put_back(work, out)


def work_folder(out: Path) -> Path:
    """Return our folder beside a result."""
    return Path(os.path.realpath(out.parent)) / f".{out.name}.moetailor"


def entries(folder: Path) -> list[str]:
    """Return the names in a folder, without those of our work folders."""
    ours = (".*.moetailor", GROWING, SCRATCHES)
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in ours))


@contextmanager
def _locked(work: Path, place: Path, wait: bool = False) -> Iterator[None]:
    """Hold a work folder; it is made, and goes at the end where nothing but the lock is in it."""
    if _is_held(work):
        yield
        return
    handle = _take(work, place, wait)
    token = _held.set(_held.get() | {(os.getpid(), work)})
    try:
        yield
    finally:
        _held.reset(token)
        _leave(work)
        os.close(handle)


def _is_held(work: Path) -> bool:
    return (os.getpid(), work) in _held.get()


def _take(work: Path, place: Path, wait: bool) -> int:
    """Return the lock of a work folder, open and held."""
    patient_until = time.monotonic() + PATIENCE * wait
    while True:
        try:
            work.mkdir(exist_ok=True)
            names = set(os.listdir(work))
            if names and LOCK not in names:
                raise MoetailorError(f"{work}: was not made by moetailor, which needs that name; move it away")
            handle = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            # A run that ended deleted it in between, or another one made it.
            gone = isinstance(error, FileNotFoundError) and work.parent.is_dir()
            back = isinstance(error, FileExistsError) and not (work.is_file() or work.is_symlink())
            if gone or back:
                continue
            _leave(work)
            raise UnwritableError(place, error) from None
        try:
            if _hold(handle, work, place, time.monotonic() < patient_until):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _hold(handle: int, work: Path, place: Path, wait: bool) -> bool:
    """Lock a file and say in it who holds it; returns False where that must be tried again."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if (who := _holder(work)) is None or wait:
            time.sleep(0.02 if wait else 0.001)  # it is just coming, or going
            return False
        raise MoetailorError(f"{place}: {who} is writing there; wait for it, or name another place") from None
    except OSError as error:
        _leave(work)
        raise MoetailorError(
            f"{place}: its disk has no locks ({error.strerror}), which keep two runs apart; use another disk"
        ) from None
    try:
        if not os.path.samestat(os.fstat(handle), os.stat(work / LOCK)):
            return False
    except FileNotFoundError:
        return False
    if set(os.listdir(work)) - {LOCK} and _holder(work) is None:
        raise MoetailorError(f"{work}: was not made by moetailor, which needs that name; move it away")
    command = textwrap.shorten(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), 200, placeholder=" ...")
    about = {"format": MARK, "process": os.getpid(), "host": socket.gethostname(), "command": command}
    line = json.dumps(about | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode() + b"\n"
    try:
        os.pwrite(handle, line, 0)  # in one piece: a mark is never half written
        os.ftruncate(handle, len(line))
    except OSError as error:
        _leave(work)
        raise UnwritableError(place, error) from None
    return True


def _sweep(work: Path) -> None:
    """Delete a work folder that a killed run left; one that a run holds stays, and what is not ours."""
    with suppress(MoetailorError, OSError):
        # A run that was killed before it marked the folder had put nothing in.
        bare = all(path.name == LOCK and not path.stat().st_size for path in work.iterdir())
        if (bare or _holder(work)) and work.lstat().st_uid == os.getuid() and not _is_held(work):
            with _locked(work, work):
                _clear(work)


def _leave(work: Path) -> None:
    """Delete a work folder in which nothing is left; its lock goes last: nothing of ours is ever without its mark."""
    with suppress(OSError):
        with suppress(PermissionError):  # a umask may have shut us out; what has nothing in it can go even then
            if os.listdir(work) == [LOCK]:
                (work / LOCK).unlink()
        work.rmdir()


def _holder(work: Path) -> str | None:
    """Return who held a work folder last; None when it is none of ours."""
    try:
        about = json.loads((work / LOCK).read_bytes().partition(b"\n")[0])
        if about["format"] != MARK:
            return None
        return f"`{about['command']}` (process {about['process']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _put_back(work: Path, place: Path) -> None:
    if os.path.lexists(work / OLD) and not os.path.lexists(place):
        (work / OLD).rename(place)


def _clear(work: Path) -> None:
    for path in list(work.iterdir()):
        if path.name != LOCK:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
