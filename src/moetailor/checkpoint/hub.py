"""Models on the hub: what of them is downloaded."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetailor.checkpoint.artifact import write_bytes
from moetailor.errors import CheckpointError, MoetailorError, UnwritableError, reason_of

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What is not downloaded before the config was looked at, if at all.
WEIGHTS = ("*.safetensors", *PICKLES, "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "original/*")


def name_and_revision(source: str | Path) -> tuple[str, str | None]:
    """Return the name of a model on the hub and its branch, tag or commit, of ``NAME@REVISION``; None where none is
    said. A folder that is there is a name as a whole.
    """
    if os.path.exists(source):  # Path.exists raises for a name that is longer than any path
        return str(source), None
    name, _, revision = str(source).partition("@")
    return name, revision or None


def download(name: str, **options: Any) -> Path:
    """Return the folder of files of a model in the hub's cache, after downloading what is not there.

    Args:
        name: the model.
        options: as `snapshot_download` takes them.

    Raises:
        CheckpointError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # whatever the hub's HTTP library of the day raises
        told = f"neither a folder nor a model that the hub would give ({reason_of(error)})"
        at = f"@{options['revision']}" if options.get("revision") else ""
        raise CheckpointError(f"{name}{at}: {told}") from None


def check_upload(name: str) -> None:
    """Refuse a place on the hub that cannot be written to, as far as it shows before there is anything to write.

    Raises:
        MoetailorError: not a name of a repository, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise MoetailorError(f"--push-to-hub {name}: {reason_of(error)}") from None
    try:
        HfApi().whoami()
    except Exception as error:  # see above
        told = f"--push-to-hub {name}: the hub does not know who you are ({reason_of(error)})"
        raise MoetailorError(f"{told}; log in with `hf auth login`, or leave it out") from None


def upload(folder: Path, name: str) -> str:
    """Upload the files of a finished result, its card among them, and return the address; a repository that is not
    there is made.

    Args:
        folder: the result.
        name: the repository.

    Raises:
        MoetailorError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from moetailor")
    except Exception as error:  # see above
        told = f"{folder} is whole, and the hub does not take it as {name} ({reason_of(error)})"
        raise MoetailorError(f"{told}; try `hf upload {name} {folder}` later") from None
    return f"{HfApi().endpoint}/{name}"


def headers_only(name: str, folder: Path, shards: Iterable[str], out: Path) -> Path:
    """Write weight files of which the headers are there, with holes in place of the numbers, and return their folder.

    Whoever reads headers finds what the whole files would say. Only these are asked for, by range.

    Args:
        name: the model.
        folder: where its other files lie, by commit.
        shards: its weight files; those that the hub does not have are left out.
        out: where to write.

    Raises:
        CheckpointError: the hub does not give them, or what it gives is no header.
    """
    found = {shard: tensors for shard in shards if (tensors := _tensors(name, shard, folder.name)) is not None}
    if not found:
        raise CheckpointError(f"{name}: has no safetensors weights; name a model that has")
    # Of a download that was stopped some weights are there already.
    beside = [file for file in folder.iterdir() if not any(fnmatch.fnmatch(file.name, kind) for kind in WEIGHTS)]
    try:
        for file in filter(Path.is_file, beside):
            shutil.copyfile(file, out / file.name)
        for shard, tensors in found.items():
            header = json.dumps(tensors).encode()
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            (out / shard).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out / shard, len(header).to_bytes(8, "little") + header)
            os.truncate(out / shard, 8 + len(header) + end)
    except OSError as error:
        raise UnwritableError(out, error) from None
    return out


def _tensors(name: str, shard: str, commit: str) -> dict[str, dict[str, Any]] | None:
    """Return what the header of a weight file says of its tensors; None where the hub has no such file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = HfApi().parse_safetensors_file_metadata(name, shard, revision=commit)
    except EntryNotFoundError:
        return None
    except Exception as error:  # see above
        told = f"the header of {shard} cannot be had from the hub ({reason_of(error)})"
        raise CheckpointError(f"{name}: {told}; try again later, or name another model") from None
    return {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in found.tensors.items()
    }
