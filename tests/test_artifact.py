"""checkpoint/artifact.py: a file is what it was or what it should be, obeys the umask, and leaves nothing beside it."""

import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moetailor.checkpoint.artifact import save_tensors, write_json, write_tensors, write_text
from moetailor.checkpoint.lock import claimed
from moetailor.errors import MoetailorError
from support.kills import kills

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True])}
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda file: write_text(file, "né\n"),
    "json": lambda file: write_json(file, {"b": 1, "a": [2]}),
    "tensors": lambda file: write_tensors(file, TENSORS),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return WRITERS[request.param]


def test_what_is_written(tmp_path: Path) -> None:
    for name, writer in WRITERS.items():
        writer(tmp_path / name)
    assert (tmp_path / "text").read_bytes() == "né\n".encode()
    assert (tmp_path / "json").read_text() == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'
    found = load_file(tmp_path / "tensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert sorted(os.listdir(tmp_path)) == ["json", "tensors", "text"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_umask_rules(tmp_path: Path, write: Callable[[Path], None], mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "new")
        save_tensors(TENSORS, tmp_path / "apart")
    finally:
        os.umask(before)
    for name in ("new", "apart"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_file_is_replaced_not_written_over(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Whoever reads it at that moment has the old one to its end."""
    file = tmp_path / "file"
    file.write_text("old")
    with open(file) as reading:
        write(file)
        assert reading.read() == "old"


def test_killed_at_any_step_the_file_is_old_or_new(tmp_path: Path, write: Callable[[Path], None]) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    write(other)
    new, seen = other.read_bytes(), set()
    other.unlink()
    file.write_bytes(b"old")
    for step in kills(lambda: write(file)):
        seen.add(file.read_bytes())
        assert seen <= {b"old", new}, step
        write(file)
        assert (os.listdir(tmp_path), file.read_bytes()) == (["file"], new)
        file.write_bytes(b"old")
    assert seen == {b"old", new}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "open"])
def test_failure_names_file_and_cure_and_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(MoetailorError) as refusal:
            write(file)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    cure = "make room and run the same command again" if full else "name a place that can be written"
    assert str(refusal.value) == f"{file}: cannot be written ({os.strerror(number)}); {cure}"
    assert (os.listdir(tmp_path), file.read_text()) == (["file"], "old")
    write(file)
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_under_safetensors_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.serialize_file", fail)
    for writer in (lambda file: write_tensors(file, TENSORS), lambda file: save_tensors(TENSORS, file)):
        with pytest.raises(MoetailorError) as refusal:
            writer(tmp_path / "file")
        assert str(refusal.value).startswith(f"{tmp_path / 'file'}: cannot be written (")
        assert "No space left on device" in str(refusal.value)
        assert str(refusal.value).endswith("make room and run the same command again")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("x")])
def test_stop_in_the_middle_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def stop(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(type(error)):
        write(file)
    assert (os.listdir(tmp_path), file.read_text()) == (["file"], "old")


def test_place_that_is_none_is_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "none" / "file", tmp_path / "file" / "file"):
        with pytest.raises(MoetailorError, match=r": cannot be written \("):
            write(place)
    assert (os.listdir(tmp_path), (tmp_path / "file").read_text()) == (["file"], "mine")


def test_link_stays_and_what_it_leads_to_is_written(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for _ in range(2):  # first it leads to nothing
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert os.listdir(tmp_path / "there") == ["file"]


def test_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join(timeout=30)
    assert json.loads(found[0]) == {"a": 1}
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_file_that_the_run_holds_can_be_written(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with claimed(tmp_path / "file"):
        write(tmp_path / "file")
        write(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
