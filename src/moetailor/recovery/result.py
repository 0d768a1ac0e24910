"""The result on disk: the checkpoint that was trained, with the tensors that changed written anew."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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


def check_writable(checkpoint: Checkpoint, model: Any, changed: Iterable[str]) -> None:
    """Refuse, before a training, tensors that could not be written after it; see `write_recovered`."""
    tensors, keys = tensors_of(model), _keys(checkpoint, model)
    for name in changed:
        _as_on_disk(checkpoint, model, name, tensors[name].detach().to("meta"), keys[name])


def _save_changed(scratch: Path, checkpoint: Checkpoint, model: Any, changed: Iterable[str]) -> dict[str, TensorInfo]:
    """Write the changed tensors as they lie on disk, a file for each parameter; return where each one is."""
    tensors, keys, found = tensors_of(model), _keys(checkpoint, model), {}
    for number, name in enumerate(changed):
        made = _as_on_disk(checkpoint, model, name, tensors[name].detach().cpu(), keys[name])
        file = scratch / f"{number:05d}.safetensors"
        stored = {key: tensor.to(DTYPES[checkpoint.tensors[key].dtype]) for key, tensor in made.items()}
        for key, tensor in stored.items():
            check_stored(tensor, key)
        save_tensors(stored, file)
        found |= read_header(file)
    return found


def _keys(checkpoint: Checkpoint, model: Any) -> Mapping[str, Sequence[str]]:
    """Return the names on disk of what becomes each parameter."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key, name in memory_names(checkpoint, model).items():
        keys[name].append(key)
    return keys


def _as_on_disk(
    checkpoint: Checkpoint, model: Any, name: str, tensor: torch.Tensor, keys: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return a parameter as its checkpoint has it.

    Args:
        checkpoint: what was trained.
        model: it in memory.
        name: the parameter.
        tensor: its numbers.
        keys: the names on disk of what becomes it.

    Raises:
        CheckpointError: transformers' rules do not give that back.
    """
    made = disk_tensors(model, {name: tensor})
    if len(made) == len(keys) == 1:
        return {keys[0]: next(iter(made.values()))}
    # On disk the name of the decoder may have been left away.
    named = {made_key: key for key in keys for made_key in made if f".{made_key}".endswith(f".{key}")}
    shapes = {named[key]: part.shape for key, part in made.items() if key in named}
    if len(named) < len(made) or shapes != {key: checkpoint.tensors[key].shape for key in keys}:
        raise CheckpointError(
            f"{checkpoint.source}: {name} does not lie there as transformers would write it "
            f"({', '.join(list(made)[:2])}, ...); save the checkpoint again with this transformers, then recover"
        )
    return {named[key]: part for key, part in made.items()}
