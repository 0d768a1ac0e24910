"""``OUT.training``: where Trainer's checkpoints lie until the result is complete, and what they were trained with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypedDict

from accelerate import PartialState
from transformers.trainer_callback import TrainerState

from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.place import PROVENANCE_FILE, Inputs, check_place, holding
from moetailor.errors import MoetailorError
from moetailor.schema import Count, find_json, load_json, read

SETTINGS, FORMAT = "settings.json", "moetailor-training"
# What Trainer needs beside the weights to go on as if it had not been stopped; it would begin anew without a word.
PARTS = {"optimizer": "optimizer*", "schedule": "scheduler.pt", "random numbers": "rng_state*.pth"}


def training_folder(out: Path) -> Path:
    """Return the folder of the training whose result is to be `out`."""
    return out.with_name(out.name + ".training")


@contextmanager
def place_of(out: Path, *, overwrite: bool, inputs: Inputs) -> Iterator[Path | None]:
    """Hold the place of the result, see `check_place`; gives the run's own folder beside it, None in all processes but
    the first.
    """
    with holding(out) if PartialState().is_main_process else nullcontext() as work:
        if work is not None and not overwrite:
            _sweep_training(out)
        check_place(out, overwrite=overwrite, inputs=inputs)
        yield work


def check_training(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with what is no training, or another one.

    Args:
        folder: the folder.
        settings: everything that the trained weights depend on.

    Raises:
        MoetailorError: see the message.
    """
    if not folder.exists():
        return
    told = _settings(folder)
    if told is None:
        raise MoetailorError(f"{folder}: exists and was not made by moetailor; choose another place for the result")
    if last_checkpoint(folder) is None:
        return
    if other := [name for name, value in settings.items() if told.get(name) != value]:
        raise MoetailorError(
            f"{folder}: holds a training with another {', '.join(other)}; give the same command to go on with it, or "
            "delete the folder"
        )


def begin_training(folder: Path, settings: dict[str, Any], work: Path | None) -> None:
    """Make the folder, which appears with the settings in it.

    Args:
        folder: the folder.
        settings: everything that the trained weights depend on.
        work: a folder of this run's own, on the same disk; None in all processes but the first.
    """
    # No process writes before all have looked.
    PartialState().wait_for_everyone()
    if work is None:
        return
    begun = {"format": FORMAT, **settings}
    if folder.exists():
        write_json(folder / SETTINGS, begun)
        return
    (work / "training").mkdir()
    write_json(work / "training" / SETTINGS, begun)
    (work / "training").rename(folder)


def end_training(folder: Path) -> None:
    """Delete what a training wrote into its folder, and the folder where nothing else is in it."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / SETTINGS).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _sweep_training(out: Path) -> None:
    """Delete the training of a result that is complete: the run was killed before it did."""
    folder, cure = training_folder(out), "delete it"
    made = find_json(out / PROVENANCE_FILE, error=MoetailorError, cure=cure) or {}
    told = _settings(folder) if folder.is_dir() else None
    if told is not None and made.get("recovery") == {name: told[name] for name in told if name != "format"}:
        end_training(folder)


def last_checkpoint(folder: Path) -> tuple[Path, TrainerState] | None:
    """Return the newest whole checkpoint in a folder and its state; Trainer writes the state last."""
    found = []
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            told = load_json(file, error=MoetailorError, cure="")
            read(_State, {name: told.get(name) for name in _State.__annotations__}, "", error=MoetailorError, cure="")
            state = TrainerState.load_from_json(str(file))
        except (MoetailorError, TypeError):
            continue  # cut off while it was written
        found.append((state.global_step, file.parent, state))
    return max(found, key=lambda entry: entry[0])[1:] if found else None


def check_parts(checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint that has lost a part.

    Raises:
        MoetailorError: see the message.
    """
    for what, pattern in PARTS.items():
        if not any(path.is_dir() or path.stat().st_size for path in checkpoint.glob(pattern)):
            raise MoetailorError(
                f"{checkpoint}: the state of the {what}, {pattern}, is not there, without which training would not go "
                "on as it began; put it back, or delete this checkpoint to go on from one before it or from the start"
            )


def _settings(folder: Path) -> dict[str, Any] | None:
    """Return what a training was begun with; None when the folder is not that of one."""
    told = find_json(folder / SETTINGS, error=MoetailorError, cure=f"delete {folder} to train anew")
    return told if told is not None and told.get("format") == FORMAT else None


class _State(TypedDict):
    global_step: Count
    max_steps: Count
    num_input_tokens_seen: Count
    log_history: list[dict]
