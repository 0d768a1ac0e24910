"""The result on disk: the checkpoint that was trained, with the tensors that changed written anew."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moetailor._version import __version__
from moetailor.checkpoint.anatomy import tensors_of
from moetailor.checkpoint.files import DTYPES, INDEX, Checkpoint, TensorInfo, read_header
from moetailor.checkpoint.loader import disk_tensors, memory_names
from moetailor.checkpoint.writer import Piece, new_folder, save_tensors, whole, write_shards
from moetailor.errors import CheckpointError
from moetailor.transform.beside import copy_others
from moetailor.transform.disk import PROVENANCE_FILE, write_json

Progress = Callable[[int, int], None]
CONFIG = "config.json"
CARD = f"\nTrained further by moetailor {__version__}: how, is in {PROVENANCE_FILE} under `recovery`.\n"


def write_recovered(
    out: Path,
    checkpoint: Checkpoint,
    model: Any,
    changed: Iterable[str],
    *,
    settings: Mapping[str, Any],
    overwrite: bool,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint again with some tensors changed, each in the dtype and shard that it had.

    Args:
        out: folder of the result; it appears when it is complete.
        checkpoint: what was trained.
        model: it in memory, trained, without adapters.
        changed: names of the parameters that changed.
        settings: how it was trained, for the provenance.
        overwrite: replace an existing folder.
        trust_remote_code: copy code that comes with the checkpoint.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: the tensors lie on disk in a way that transformers' rules do not give back.
        MoetailorError: the disk is full.
    """
    with new_folder(out, overwrite=overwrite, nbytes=checkpoint.nbytes) as folder:
        scratch = folder / "trained"
        scratch.mkdir()
        trained = _save_changed(scratch, checkpoint, model, changed)
        shards: dict[Path, list[Piece]] = defaultdict(list)
        for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset)):
            shards[info.file].append(whole(trained.get(info.name, info)))
        write_shards(folder, [shards[file] for file in sorted(shards)], progress)
        shutil.rmtree(scratch)
        shutil.copyfile(checkpoint.folder / CONFIG, folder / CONFIG)
        left_out = {CONFIG, INDEX, PROVENANCE_FILE}
        copy_others(checkpoint.folder, folder, left_out=left_out, trust_remote_code=trust_remote_code)
        card, provenance = (checkpoint.folder / name for name in ("README.md", PROVENANCE_FILE))
        if card.is_file():
            (folder / card.name).write_text(card.read_text(encoding="utf-8") + CARD, encoding="utf-8")
        told = json.loads(provenance.read_text()) if provenance.is_file() else {"moetailor": __version__}
        write_json(folder / PROVENANCE_FILE, told | {"recovery": dict(settings)})


def _save_changed(scratch: Path, checkpoint: Checkpoint, model: Any, changed: Iterable[str]) -> dict[str, TensorInfo]:
    """Write the changed tensors as they lie on disk, a file for each parameter; return where each one is."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key, name in memory_names(checkpoint, model).items():
        keys[name].append(key)
    tensors, found = tensors_of(model), {}
    for number, name in enumerate(changed):
        made = disk_tensors(model, {name: tensors[name].detach().cpu()})
        if len(made) == len(keys[name]) == 1:
            made = {keys[name][0]: next(iter(made.values()))}
        fits = {key: key in made and made[key].shape == checkpoint.tensors[key].shape for key in keys[name]}
        if not all(fits.values()) or len(made) != len(fits):
            raise CheckpointError(
                f"{checkpoint.source}: {name} does not lie there as transformers would write it "
                f"({', '.join(list(made)[:2])}, ...); save the checkpoint again with this transformers, then recover"
            )
        file = scratch / f"{number:05d}.safetensors"
        save_tensors({key: made[key].to(DTYPES[checkpoint.tensors[key].dtype]) for key in made}, file)
        found |= read_header(file)
    return found
