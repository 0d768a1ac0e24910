"""The folder of a checkpoint: where it is, which files in it are ours to read, and which hold the weights.

What is measured must be what is written, so the weight files are those that transformers would read; a folder that
means one thing to transformers and another to an engine is refused.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from moetailor.checkpoint.hub import PICKLES, WEIGHTS, download, headers_only, name_and_revision
from moetailor.errors import CheckpointError
from moetailor.schema import unique

CONFIG, ADAPTER = "config.json", "adapter_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# One process's part of a model that was saved while it was shared out; transformers puts it before all else.
SHARED_OUT = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

Check = Callable[[Path, dict], None]


def find_folder(source: str | Path, *, check: Check | None = None, headers: Path | None = None) -> Path:
    """Return the folder of a checkpoint, after downloading it when it is a model on the hub.

    Args:
        source: a folder, or a hub name such as ``allenai/OLMoE-1B-7B-0125``, with a branch, tag or commit of it as in
            ``NAME@REVISION``.
        check: called with the folder and its config.json, before weights are downloaded; raises what it refuses.
        headers: a folder of which the weights' headers are enough: of a model on the hub they are written there, and no
            weights are downloaded.

    Raises:
        CheckpointError: there is no such folder or model, a link leads out of it, or `check` refuses it.
    """
    folder, name = Path(source), str(source)
    if not name:
        raise CheckpointError("no model is named; give its folder or hub name")
    local = folder.is_dir()
    if not local:
        name, revision = name_and_revision(source)
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise CheckpointError(f"{source}: no such folder")
        folder = download(name, revision=revision, ignore_patterns=list(WEIGHTS))
    check_links(folder)
    config = read_config(folder)
    if check is not None:
        check(folder, config)
    if not local:
        shards = read_index(folder / INDEX)[1] if (folder / INDEX).is_file() else [SINGLE]
        if headers is not None and not all((folder / shard).is_file() for shard in shards):
            return headers_only(name, folder, shards, headers)
        # The same commit: a branch may have moved on.
        download(name, revision=folder.name, allow_patterns=[SINGLE, *shards])
    return folder


def read_config(folder: Path) -> dict:
    """Read config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object; download it again")
    return config


def check_links(folder: Path, files: list[Path] | None = None) -> None:
    """Refuse links that lead out of a folder, save those that the hub's cache is made of.

    Args:
        folder: folder of the checkpoint.
        files: files to look at; everything that lies directly in the folder when None.

    Raises:
        CheckpointError: see the message.
    """
    for file in sorted(folder.iterdir()) if files is None else files:
        if not lies_inside(file, folder):
            raise CheckpointError(
                f"{file}: is a link to {os.path.realpath(file)}, outside the folder of the checkpoint; put the file "
                "itself there"
            )


def lies_inside(file: Path, folder: Path) -> bool:
    """Say whether a file, where its links lead, lies in a folder, or where the hub's cache keeps what lies in one."""
    home = Path(os.path.realpath(folder))
    places = [home]
    if home.parent.name == "snapshots":
        # CACHE/models--NAME/snapshots/COMMIT/x -> ../../blobs/HASH, which may be a link to CACHE/blobs/HA/HASH.
        model = home.parents[1]
        places += [model / "blobs", model.parent / "blobs"]
    return any(Path(os.path.realpath(file)).is_relative_to(place) for place in places)


def weight_files(folder: Path, config: dict) -> list[Path]:
    """Return the files that hold a checkpoint's weights, as transformers chooses them.

    Args:
        folder: folder of the checkpoint.
        config: its config.json.

    Raises:
        CheckpointError: there are none, they are pickles, or more than one choice could be meant.
    """
    # The order is that of transformers' from_pretrained: what comes first would be read, or on top.
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder}: {ADAPTER} lies beside the weights, and transformers would load that adapter on top of them; "
            "merge it into the weights, or move it elsewhere"
        )
    if shared := sorted(file.name for file in folder.iterdir() if SHARED_OUT.fullmatch(file.name)):
        raise CheckpointError(
            f"{folder}: {shared[0]} is one process's part of a model; load it with transformers and save it whole"
        )
    if (named := config.get("transformers_weights")) is not None:
        raise CheckpointError(
            f"{folder / CONFIG}: transformers_weights = {named!r}, which other engines do not read; rename that file "
            f"to {INDEX if str(named).endswith('.json') else SINGLE} and take the entry out"
        )
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        _, shards = read_index(index)
        if single.is_file() and shards != [SINGLE]:
            raise CheckpointError(
                f"{folder}: holds {SINGLE} and {INDEX}; transformers reads the first, other engines the second; "
                "delete the one that is not meant"
            )
        return [folder / shard for shard in shards]
    if single.is_file():
        return [single]
    raise CheckpointError(f"{folder}: {_without_weights(folder)}")


def _without_weights(folder: Path) -> str:
    if lost := [name for name in (SINGLE, INDEX) if (folder / name).is_symlink()]:
        return f"{lost[0]} is a link to nothing; download it again"
    names = sorted(file.name for file in folder.iterdir())
    if pickles := [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in PICKLES)]:
        return f"weights are pickles ({pickles[0]}), which can run code when read; save the model as safetensors first"
    others = [name for name in names if name.endswith(".safetensors")]
    told = f"; it has {others[0]}, which transformers does not look for: rename it if it is the model" if others else ""
    return f"neither {SINGLE} nor {INDEX}; give a folder with safetensors weights{told}"


def read_index(index: Path) -> tuple[dict[str, str], list[str]]:
    """Return the tensors of an index, name -> shard, and its shards in the order in which transformers reads them.

    Raises:
        CheckpointError: not an index, or one that names a file outside its folder.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
        weight_map, metadata = content["weight_map"], content["metadata"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("not a map of tensor names to shards")
        if not isinstance(metadata, dict):
            raise TypeError("metadata is not an object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no readable weight_map and metadata ({error!r})") from None
    for shard in set(weight_map.values()):
        path = PurePosixPath(shard)
        # An index must not make us read outside its folder.
        if str(path) != shard or path.is_absolute() or not path.name or ".." in path.parts or "\0" in shard:
            raise CheckpointError(f"{index}: names {shard!r}, which leaves the folder; refused")
    return weight_map, sorted(set(weight_map.values()))
