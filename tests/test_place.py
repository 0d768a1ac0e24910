"""checkpoint/place.py and lock.py: nothing of a user's is lost, one run at a time, and a kill at any step is mended."""

import errno
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.lock import claimed, entries, growing, restore, scratch, sweep, work_folder
from moetailor.checkpoint.place import PROVENANCE_FILE, check_file, check_place, new_folder
from moetailor.errors import CheckpointError, MoetailorError
from support.kills import in_child, killed, kills


def contents(folder: Path) -> dict[str, str]:
    """Return every file below a folder with its text, without provenances."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != PROVENANCE_FILE)
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def write(out: Path, text: str, *, overwrite: bool = False, error: BaseException | None = None) -> None:
    """Write a result that consists of one file, and fail after that if so wanted."""
    with new_folder(out, overwrite=overwrite, nbytes=1) as folder:
        (folder / "result").write_text(text)
        if error is not None:
            raise error


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier result, alone in its folder."""
    write(tmp_path / "box" / "out", "old")
    return tmp_path / "box" / "out"


# A folder that appears when it is complete


def test_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with new_folder(out, overwrite=False, nbytes=1) as folder:
        (folder / "result").write_text("new")
        assert not out.exists()
    assert contents(out.parent) == {"out/result": "new"}
    assert os.listdir(out.parent) == ["out"]


def test_provenance_names_every_file_and_keeps_what_it_says(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", overwrite=False, nbytes=1) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text("a")
        write_json(folder / PROVENANCE_FILE, {"made": "so", "files": ["of another folder"]})
    assert (tmp_path / "out" / PROVENANCE_FILE).read_text() == (
        '{\n  "made": "so",\n  "files": [\n    "moetailor_provenance.json",\n    "part/a"\n  ]\n}\n'
    )


def test_existing_folder_is_refused_untouched(old: Path) -> None:
    with pytest.raises(MoetailorError) as refusal:
        write(old, "new")
    assert str(refusal.value) == f"{old}: exists; choose another folder or pass --overwrite"
    assert contents(old.parent) == {"out/result": "old"}


def test_overwritten_result_is_replaced_at_the_end_and_whole(old: Path) -> None:
    with new_folder(old, overwrite=True, nbytes=1) as folder:
        (folder / "other").write_text("new")
        assert contents(old) == {"result": "old"}
    assert contents(old.parent) == {"out/other": "new"}
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x"), MoetailorError("x")])
def test_failure_in_the_middle_keeps_the_old_and_leaves_nothing(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(old, "half", overwrite=True, error=error)
    assert contents(old.parent) == {"out/result": "old"}
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_in_the_middle_is_said_and_leaves_nothing(old: Path, overwrite: bool) -> None:
    out = old if overwrite else old.with_name("other")
    with pytest.raises(MoetailorError) as refusal:
        write(out, "half", overwrite=overwrite, error=OSError(errno.ENOSPC, "No space left on device"))
    assert str(refusal.value) == f"{out}: the disk is full; nothing was kept of this run"
    assert contents(old.parent) == {"out/result": "old"}
    assert os.listdir(old.parent) == ["out"]


def test_too_small_a_disk_is_refused_before_writing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    with pytest.raises(MoetailorError) as refusal, new_folder(old, overwrite=True, nbytes=1235):
        raise AssertionError("nothing may be written")
    assert str(refusal.value) == f"{old}: writing it takes 1,235 bytes, the disk has 1,234 free"
    with new_folder(old, overwrite=True, nbytes=1234):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(path: object, *more: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(MoetailorError) as refusal:
        write(tmp_path / "out", "new")
    said = "the disk is full; nothing was kept of this run"
    if number != errno.ENOSPC:
        said = f"cannot be written ({os.strerror(number)}); name a place that can be written"
    assert str(refusal.value) == f"{tmp_path / 'out'}: {said}"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), SystemExit(143)])
def test_old_result_is_put_back_when_the_new_one_cannot_take_its_place(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new" and Path(target).name == "out":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        write(old, "new", overwrite=True)
    assert contents(old.parent) == {"out/result": "old"}
    assert os.listdir(old.parent) == ["out"]


def test_file_in_the_place_of_the_result_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("notes")
    with pytest.raises(MoetailorError, match="is a file; choose another folder"):
        write(out, "new", overwrite=True)
    assert contents(tmp_path) == {"out": "notes"}
    out.unlink()
    out.symlink_to(tmp_path / "nowhere")
    for overwrite in (False, True):
        with pytest.raises(MoetailorError, match="is a link to nothing; choose another folder"):
            write(out, "new", overwrite=overwrite)
    assert out.is_symlink()


def test_link_to_a_result_is_replaced_and_what_it_points_to_stays(tmp_path: Path, old: Path) -> None:
    out = tmp_path / "box" / "link"
    out.symlink_to(old)
    write(out, "new", overwrite=True)
    assert contents(out) == {"result": "new"}
    assert contents(old) == {"result": "old"}
    assert sorted(os.listdir(out.parent)) == ["link", "out"]


def test_present_folder_can_be_named_with_dots(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    for name in (".", "..", ""):
        with pytest.raises(MoetailorError, match=r"has no name of its own"):
            write(Path(name), "new")
    write(Path("../out"), "new", overwrite=True)
    assert contents(old.parent) == {"out/result": "new"}


# What is not ours


@pytest.mark.parametrize("name", ["out.partial", "out.old", "out.training", ".out", "out.calibration"])
def test_folders_of_the_user_beside_the_result_survive(old: Path, name: str) -> None:
    shutil.copytree(old, old.with_name(name))
    write(old, "new", overwrite=True)
    assert contents(old.parent) == {f"{name}/result": "old", "out/result": "new"}


def test_user_folder_with_the_name_of_ours_is_refused(old: Path) -> None:
    """Whatever is in it, a file named as our lock among it."""
    mine = work_folder(old)
    (mine / "old").mkdir(parents=True)
    (mine / "old" / "thesis.tex").write_text("x")
    for lock in (None, "", "notes", '{"format": "else"}', "[]"):
        if lock is not None:
            (mine / "lock").write_text(lock)
        before = contents(old.parent)
        with pytest.raises(MoetailorError, match="was not made by moetailor, which needs that name; move it away"):
            write(old, "new", overwrite=True)
        shutil.rmtree(aside := old.with_name("aside"), ignore_errors=True)
        old.rename(aside)
        restore(old)  # what a killed run had set aside is only ours to put back
        assert not old.exists()
        aside.rename(old)
        assert contents(old.parent) == before


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["thesis.tex"], "thesis.tex"),
        ([".git/HEAD"], ".git/HEAD"),
        (["notes.json", "train.py"], "notes.json, train.py"),
        ([f"{number}.txt" for number in range(7)], "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"),
    ],
)
def test_folder_that_holds_what_we_did_not_write_is_never_replaced(old: Path, names: list[str], said: str) -> None:
    for name in names:
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_text("mine")
    before = contents(old)
    with pytest.raises(MoetailorError) as refusal:
        write(old, "new", overwrite=True)
    assert str(refusal.value) == (
        f"{old}: holds {said}, which moetailor did not write there; choose another folder, or move them away"
    )
    assert contents(old) == before


@pytest.mark.parametrize("provenance", [None, "{", "[]", '{"files": 5}', '{"files": [["result"]]}', '{"moetailor": 1}'])
def test_folder_without_a_list_of_ours_is_never_replaced(old: Path, provenance: str | None) -> None:
    (old / PROVENANCE_FILE).unlink()
    if provenance is not None:
        (old / PROVENANCE_FILE).write_text(provenance)
    with pytest.raises(MoetailorError, match=r"holds .*result, which moetailor did not write there"):
        write(old, "new", overwrite=True)
    assert contents(old) == {"result": "old"}


def test_links_in_a_result_are_not_ours(old: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (old / "data").symlink_to(tmp_path / "data")
    with pytest.raises(MoetailorError, match="holds data, which moetailor did not write there"):
        write(old, "new", overwrite=True)


def test_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "empty").mkdir(parents=True)
    write(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path) == {"out/result": "new"}


def named_otherwise(path: Path, tmp_path: Path) -> list[Path]:
    """Return other names of a path: through links, dots and slashes."""
    (tmp_path / "link to it").symlink_to(path)
    (tmp_path / "link to its folder").symlink_to(path.parent)
    return [
        path,
        Path(f"{path}/"),
        path.parent / "." / ".." / path.parent.name / path.name,
        Path(os.path.relpath(path)),
        tmp_path / "link to it",
        tmp_path / "link to its folder" / path.name,
    ]


def test_input_is_never_replaced_whatever_it_is_called(old: Path, tmp_path: Path) -> None:
    for name in named_otherwise(old, tmp_path):
        for out, path in ((old, name), (name, old)):
            with pytest.raises(MoetailorError, match="is the model itself; choose another folder"):
                check_place(out, overwrite=True, inputs={"the model": path})
    for name in named_otherwise(old / "result", tmp_path / "box"):
        with pytest.raises(MoetailorError, match=r"holds the text, .*, which would be lost"):
            check_place(old, overwrite=True, inputs={"the text": [tmp_path, name], "the plan": None})


def test_folder_whose_files_are_links_into_the_result_is_an_input(old: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(old / "result")
    with pytest.raises(MoetailorError, match=r"holds the model, .*model.safetensors, which would be lost"):
        check_place(old, overwrite=True, inputs={"the model": model})


def test_input_that_is_not_there_yet_counts(tmp_path: Path) -> None:
    with pytest.raises(MoetailorError, match="holds the calibration"):
        check_place(tmp_path / "out", overwrite=True, inputs={"the calibration": tmp_path / "out" / "calibration"})
    check_place(tmp_path / "out", overwrite=True, inputs={"the calibration": tmp_path / "out.calibration"})


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ('{\n  "format": "moetailor-plan",\n  "version": 1\n}\n', {"plan"}),
        ('{"format":"moetailor-scores"}', {"scores"}),
        ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta name="generator" content="moetailor-report">', {"report"}),
        ('{"format": "moetailor-planned"}', set()),
        ('{"text": "\\"format\\": \\"moetailor-plan\\""}', set()),
        ("{}", set()),
        ("", set()),
        ("thesis", set()),
        ("\x00\xff", set()),
    ],
)  # fmt: skip
def test_only_files_of_the_kind_are_replaced(tmp_path: Path, text: str, kinds: set[str]) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    for kind in ("plan", "scores", "report", "allocation"):
        if kind in kinds:
            check_file(file, kind)
        else:
            with pytest.raises(MoetailorError, match=f"exists and is no {kind} of moetailor; name another file"):
                check_file(file, kind)


def test_file_of_a_result_is_not_replaced_alone(old: Path) -> None:
    with new_folder(old, overwrite=True, nbytes=1) as folder:
        write_json(folder / "moetailor_plan.json", {"format": "moetailor-plan"})
    with pytest.raises(MoetailorError, match=f"is a part of the result {old}; name another file"):
        check_file(old / "moetailor_plan.json", "plan")
    check_file(old / "plan.json", "plan")


# Two runs at once


def hold(context: Callable, tmp_path: Path) -> int:
    """Hold a place in another process until it is killed; returns once it does."""
    ready = tmp_path / "ready"

    def run() -> None:
        with context():
            ready.touch()
            time.sleep(60)

    child = in_child(run)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ready.unlink()
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_second_run_is_refused_with_who_holds_the_place(old: Path, tmp_path: Path) -> None:
    begin = time.strftime("%Y-%m-%d %H:")
    child = hold(lambda: new_folder(old, overwrite=True, nbytes=1), tmp_path)
    (tmp_path / "link").symlink_to(old.parent)
    for out in (old, tmp_path / "link" / "out", Path(os.path.relpath(old))):
        with pytest.raises(MoetailorError) as refusal:
            write(out, "new", overwrite=True)
        assert str(refusal.value).startswith(f"{out}: `")
        assert f"(process {child} on {socket.gethostname()}, since {begin}" in str(refusal.value)
        assert str(refusal.value).endswith(") is writing there; wait for it, or name another place")
    write(old.with_name("other"), "new")  # another place is free
    assert contents(old) == {"result": "old"}
    end(child)
    write(old, "new", overwrite=True)  # the dead hold nothing
    assert contents(old.parent) == {"other/result": "new", "out/result": "new"}
    assert sorted(os.listdir(old.parent)) == ["other", "out"]


def test_folder_that_grows_has_one_run(tmp_path: Path) -> None:
    child = hold(lambda: growing(tmp_path / "grown"), tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "grown")
    for name in ("grown", "link"):
        with pytest.raises(MoetailorError, match="is writing there"), growing(tmp_path / name):
            raise AssertionError("nobody else may be here")
    end(child)
    with growing(tmp_path / "link") as work:
        (work / "states").mkdir()
        assert entries(tmp_path / "grown") == []
    with growing(tmp_path / "grown") as work:
        (work / "states").rmdir()  # what was not finished stays for the next run
    assert os.listdir(tmp_path / "grown") == []


def test_what_a_verb_holds_its_stages_hold_too(tmp_path: Path) -> None:
    with claimed(tmp_path / "out") as outer:
        with claimed(tmp_path / "out") as inner:
            (inner / "half").touch()
        assert inner == outer
        assert (outer / "half").exists()
        write(tmp_path / "out", "new")
        child = hold(lambda: claimed(tmp_path / "other"), tmp_path)
        end(child)
    assert contents(tmp_path / "out") == {"result": "new"}
    assert not outer.exists()


def test_what_a_process_holds_its_children_do_not(tmp_path: Path) -> None:
    def child() -> None:
        with pytest.raises(MoetailorError, match=f"process {os.getppid()} on .* is writing there"):
            write(tmp_path / "out", "new")

    with claimed(tmp_path / "out"):
        assert os.waitpid(in_child(child), 0)[1] == 0


def test_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(MoetailorError, match=r"out: its disk has no locks \(No locks available\), which keep two runs"):
        write(tmp_path / "out", "new")
    assert os.listdir(tmp_path) == []


def test_runs_that_race_for_a_place_never_share_it(tmp_path: Path) -> None:
    """Four processes go for one place again and again: each that gets it finds it empty and alone."""

    def run() -> None:
        won = 0
        while won < 20:
            try:
                with claimed(tmp_path / "out") as work:
                    (work / "mine").mkdir()
                    (work / "mine").rmdir()
                won += 1
            except MoetailorError as error:
                if "is writing there" not in str(error):
                    raise

    assert [os.waitpid(child, 0)[1] for child in [in_child(run) for _ in range(4)]] == [0] * 4
    assert not work_folder(tmp_path / "out").exists()


# Kills


def test_killed_at_any_step_the_first_result_is_whole_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "box" / "out"
    for step in kills(lambda: write(out, "new")):
        assert not out.exists() or contents(out) == {"result": "new"}, step
        if out.exists():
            check_place(out, overwrite=True)
        write(out, "new", overwrite=True)
        assert contents(out.parent) == {"out/result": "new"}
        assert os.listdir(out.parent) == ["out"]
        shutil.rmtree(out.parent)
    assert step > 10


def overwritten(out: Path) -> None:
    write(out, "newer", overwrite=True)
    assert os.listdir(out.parent) == ["out"]


def not_overwritten(out: Path) -> None:
    with pytest.raises(MoetailorError, match="exists; choose another folder or pass --overwrite"):
        write(out, "newer")


def only_claimed(out: Path) -> None:
    with claimed(out):
        assert out.exists()


def read(out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"out: no config\.json"):
        open_checkpoint(out)


def test_killed_at_any_step_of_the_swap_the_old_result_comes_back(tmp_path: Path) -> None:
    """Whatever is done next with the place."""
    out, seen = tmp_path / "box" / "out", set()
    write(out, "old")
    for step in kills(lambda: write(out, "new", overwrite=True)):
        seen.add(out.exists())
        for then in (overwritten, not_overwritten, only_claimed, read, lambda out: check_place(out, overwrite=True)):
            shutil.copytree(out.parent, tmp_path / "copy")
            then(tmp_path / "copy" / "out")
            assert contents(tmp_path / "copy" / "out")["result"] in ("old", "new", "newer"), step
            shutil.rmtree(tmp_path / "copy")
        shutil.rmtree(out.parent)
        write(out, "old")
    assert seen == {True, False}  # one of the steps had left no result


def test_killed_while_it_is_put_back_it_is_put_back(tmp_path: Path) -> None:
    """A run is killed in the middle of the swap, and the next one at any step."""
    out, step = tmp_path / "box" / "out", 0
    write(out, "old")
    while out.exists():
        shutil.rmtree(out.parent)
        write(out, "old")
        assert killed(lambda: write(out, "new", overwrite=True), step := step + 1)
    middle = shutil.copytree(out.parent, tmp_path / "middle")
    for step in kills(lambda: write(out, "newer", overwrite=True)):
        restore(out)
        assert contents(out)["result"] in ("old", "newer"), step
        write(out, "last", overwrite=True)
        assert os.listdir(out.parent) == ["out"]
        shutil.rmtree(out.parent)
        shutil.copytree(middle, out.parent)


def test_scratch_of_the_dead_goes_and_of_the_living_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def begin(stay: bool) -> None:
        with scratch() as folder:
            (folder / "large").mkdir()
            (folder / "large" / "file").write_text(str(stay))
            (tmp_path / "ready").touch()
            time.sleep(60)

    dead, living = in_child(lambda: begin(False)), 0
    for name in ("dead", "living"):
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        (tmp_path / "ready").unlink()
        if name == "dead":
            end(dead)
            assert len(list(tmp_path.glob("moetailor-*/large/file"))) == 1
            living = in_child(lambda: begin(True))
    mine = tmp_path / "moetailor-scratch-of--mine"
    mine.mkdir()
    (mine / "lock").write_text("a lock of mine")
    (mine / "notes").write_text("x")
    with scratch() as folder:
        assert [file.read_text() for file in tmp_path.glob("moetailor-*/large/file")] == ["True"]
        (folder / "file").touch()
    assert not folder.exists()
    end(living)
    with scratch():
        pass
    assert contents(tmp_path) == {
        "moetailor-scratch-of--mine/lock": "a lock of mine",
        "moetailor-scratch-of--mine/notes": "x",
    }


def test_folders_of_others_stay_where_there_is_scratch_room(tmp_path: Path) -> None:
    for name in ("moetailor-research", "moetailor-datasets"):
        (tmp_path / name).mkdir()
    with scratch(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["moetailor-datasets", "moetailor-research"]


def test_scratch_that_a_kill_left_is_nobody_elses(tmp_path: Path) -> None:
    """A folder that is filled by a run, named as its own scratch folder, too, takes the same run again."""
    for name in ("moetailor-scratch-abcd1234", ".moetailor", ".new.moetailor", "mine", "moetailor-scratch-mine"):
        (tmp_path / name).mkdir()
    assert entries(tmp_path) == ["mine", "moetailor-scratch-mine"]


def test_scratch_killed_at_any_step_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run() -> None:
        with scratch() as folder:
            (folder / "large").mkdir()

    left = 0
    for step in kills(run):
        left += len(os.listdir(tmp_path))
        with scratch() as folder:
            assert os.listdir(tmp_path) == [folder.name], step
        assert os.listdir(tmp_path) == []
    assert left > 3


def test_what_kills_left_in_a_folder_is_swept(tmp_path: Path) -> None:
    """Also where nobody writes the file again that was being written."""
    grown = tmp_path / "grown"
    for then in (growing, sweep):
        (grown / "cells").mkdir(parents=True, exist_ok=True)
        for file in (grown / "log", grown / "cells" / "cell"):
            step = 1
            while not (work_folder(file) / "new").exists():
                assert killed(lambda file=file: write_json(file, {}), step)
                step += 1
        child = hold(lambda: growing(grown), tmp_path)
        sweep(grown)  # what a run holds stays
        assert (grown / ".moetailor" / "lock").exists()
        end(child)
        (grown / ".mine.moetailor").mkdir(exist_ok=True)
        (grown / ".mine.moetailor" / "notes").touch()
        with then(grown) or nullcontext():
            pass
        assert sorted(path.name for path in grown.rglob("*")) == [".mine.moetailor", "cells", "notes"]


def test_a_link_that_leads_to_itself_harms_nobody(tmp_path: Path) -> None:
    """Python 3.11 raises RuntimeError over it."""
    model = tmp_path / "model"
    model.mkdir()
    for loop in (model / "loop", tmp_path / "loop", tmp_path / "file.json"):
        loop.symlink_to(loop.name)
    check_place(tmp_path / "out", overwrite=False, inputs={"the original": model, "the text": [model / "loop"]})
    with pytest.raises(MoetailorError, match="loop: is a link to nothing; choose another folder"):
        check_place(tmp_path / "loop", overwrite=True)
    write_json(tmp_path / "file.json", {})
    assert not (tmp_path / "file.json").is_symlink()


def test_a_home_folder_that_no_shell_has_named_is_refused() -> None:
    with pytest.raises(MoetailorError, match="no shell has put your home folder in place of ~"):
        check_place(Path("~/result"), overwrite=False)


def test_a_file_on_a_disk_that_is_read_only_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(MoetailorError, match=r"scores\.json: its place cannot be written to"):
        check_file(tmp_path / "scores.json", "scores")
    check_file(Path("/dev/null"), "scores")


def test_a_disk_too_full_for_a_lock_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MoetailorError, match="make room"):
        write_json(tmp_path / "plan.json", {})
    assert os.listdir(tmp_path) == []
