"""The result on disk: the checkpoint that was trained, with the tensors that changed written anew."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moetailor._version import __version__
from moetailor.checkpoint.anatomy import tensors_of
from moetailor.checkpoint.artifact import save_tensors, write_bytes, write_json
from moetailor.checkpoint.files import DTYPES, INDEX, Checkpoint, TensorInfo, read_header
from moetailor.checkpoint.folder import CONFIG
from moetailor.checkpoint.names import disk_tensors, memory_names
from moetailor.checkpoint.place import PROVENANCE_FILE, new_folder
from moetailor.checkpoint.tensors import check_stored
from moetailor.checkpoint.writer import Piece, whole, write_shards
from moetailor.errors import CheckpointError, MoetailorError
from moetailor.progress import Progress
from moetailor.schema import find_json
from moetailor.transform.beside import copy_others

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
        overwrite: replace an earlier result.
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
        card = checkpoint.folder / "README.md"
        if card.is_file():
            write_bytes(folder / card.name, card.read_bytes() + CARD.encode())
        write_json(folder / PROVENANCE_FILE, provenance_of(checkpoint) | {"recovery": dict(settings)})


def provenance_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint was made from, as far as it says.

    Raises:
        MoetailorError: the file that says it cannot be read.
    """
    cure = "delete it, and the result will say only how it was trained"
    told = find_json(checkpoint.folder / PROVENANCE_FILE, error=MoetailorError, cure=cure)
    return {"moetailor": __version__} if told is None else told


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
        stored = {key: made[key].to(DTYPES[checkpoint.tensors[key].dtype]) for key in made}
        for key, tensor in stored.items():
            check_stored(tensor, key)
        save_tensors(stored, file)
        found |= read_header(file)
    return found
