"""``OUT.training``: where Trainer's checkpoints lie until the result is complete, and what they were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from accelerate import PartialState
from transformers.trainer_callback import TrainerState

from moetailor.errors import MoetailorError
from moetailor.schema import Count, load_json, read
from moetailor.transform.disk import write_json

SETTINGS = "settings.json"


def training_folder(out: Path) -> Path:
    """Return the folder of the training whose result is to be `out`."""
    return out.with_name(out.name + ".training")


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
    if not (folder / SETTINGS).is_file():
        raise MoetailorError(f"{folder}: exists and was not made by moetailor; choose another place for the result")
    if last_checkpoint(folder) is None:
        return
    told = load_json(folder / SETTINGS, error=MoetailorError, cure=f"delete {folder} to train anew")
    if other := [name for name, value in settings.items() if told.get(name) != value]:
        raise MoetailorError(
            f"{folder}: holds a training with another {', '.join(other)}; give the same command to go on with it, or "
            "delete the folder"
        )


def begin_training(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, with the settings in it."""
    # No process writes before all have looked.
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)


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


class _State(TypedDict):
    global_step: Count
    max_steps: Count
    num_input_tokens_seen: Count
    log_history: list[dict]
