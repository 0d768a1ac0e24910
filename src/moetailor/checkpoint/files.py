"""A safetensors checkpoint: every tensor found by name before any is read, and read by byte range, never mapped.

Mapped files count as resident memory and stay so; plain reads keep the peak at what is asked for. The headers of all
shards are checked when the checkpoint is opened, so that nothing long starts on a broken download.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moetailor.checkpoint.lock import restore
from moetailor.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``nbytes`` bytes of ``file`` from ``offset`` on, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """Read the tensor into fresh memory, in its stored dtype.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        # Pages of its own: they go back to the system with the tensor, where the heap would keep them. Their alignment
        # is the same in each run, so the same bytes give the same matrix products.
        buffer = torch.frombuffer(mmap.mmap(-1, max(self.nbytes, 1)), dtype=torch.uint8)[: self.nbytes]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = buffer.numpy().data, 0
            while done < self.nbytes:
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{self.file}: ends inside tensor {self.name!r}; download the shard again")
                done += got
        return buffer.view(DTYPES[self.dtype]).view(self.shape)


class LazyTensor:
    """A tensor that is read when it is sliced with ``[...]``: what transformers' loader expects of a source."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def __getitem__(self, key: object) -> torch.Tensor:
        return self.info.read()[key]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        """Return the stored shape, as safetensors' slices do."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """Return the safetensors name of the stored dtype."""
        return self.info.dtype


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked checkpoint folder: its config.json and the place of every tensor."""

    folder: Path
    source: str
    config: dict
    tensors: dict[str, TensorInfo]

    @property
    def shards(self) -> list[Path]:
        """The weight files, by name."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> dict:
        """Say what checkpoint this is: hashes of config.json and, for each shard, of its header and 1 MiB of data."""
        config = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()[:32]
        shards = {file.name: _shard_fingerprint(file) for file in self.shards}
        return {"config": config, "shards": shards}


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a local folder, or download a model from the hub, and check all of it that needs no weights.

    Args:
        source: a folder with config.json and safetensors files, or a hub name such as ``allenai/OLMoE-1B-7B-0125``.
        revision: branch, tag or commit of a hub model.

    Raises:
        CheckpointError: not a checkpoint, pickle weights, a missing or truncated shard, an index that does not agree
            with the shards or names a file outside the folder.
    """
    folder = Path(source)
    restore(folder)
    if not folder.is_dir():
        folder = _download(str(source), revision)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config_file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file}: not a JSON object; download it again")
    return Checkpoint(folder=folder, source=str(source), config=config, tensors=_find_tensors(folder))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder")
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=[*PICKLES, "*.gguf", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: neither a folder nor a model that the hub would give ({reason})") from None


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: weights are pickles ({pickles[0]}), which can run code when read; save the model as "
            "safetensors first"
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; give a folder with safetensors weights")


def _read_index(index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("not a map of tensor names to shards")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no readable weight_map ({error!r})") from None
    found: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        # Only plain names: an index must not make us read outside its folder.
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: names {shard!r}, which leaves the folder; refused")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: shard {shard} is missing; download it again")
        found |= read_header(index.parent / shard)
    lost = [name for name, shard in weight_map.items() if name not in found or found[name].file.name != shard]
    if lost:
        raise CheckpointError(
            f"{index}: {len(lost)} tensors are not where it says, first {lost[0]!r} in {weight_map[lost[0]]}"
        )
    extra = [name for name in found if name not in weight_map]
    if extra:
        raise CheckpointError(f"{index}: {len(extra)} tensors of the shards are not in it, first {extra[0]!r}")
    return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the place of each tensor of a safetensors file.

    The file is 8 bytes of header length (little endian), the header as JSON, then the data.

    Raises:
        CheckpointError: the file is truncated, or its header is not one of safetensors.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: truncated: {size} bytes, its header alone needs {length + 8}; download the shard again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a safetensors file ({error})") from None
    end = max((info.offset + info.nbytes for info in found.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{file}: truncated: {size} bytes, its tensors need {end}; download the shard again")
    return found


def _tensor_info(file: Path, name: str, entry: dict, base: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype}, known: {', '.join(DTYPES)}")
    if start < 0 or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name!r} has offsets {start} to {end} and shape {list(shape)}, none may be negative")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r} has {end - start} bytes, {dtype} {list(shape)} needs another number")
    return TensorInfo(name, dtype, shape, file, base + start, end - start)


def _shard_fingerprint(file: Path, pieces: int = 16) -> dict:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = hashlib.sha256(stream.read(length)).hexdigest()[:32]
        # 1 MiB of each shard in 16 pieces spread over it: enough to tell a fine-tuned sibling from its base.
        data, piece = hashlib.sha256(), 2**20 // pieces
        for number in range(pieces):
            stream.seek(max(8 + length, (size - piece) * number // max(pieces - 1, 1)))
            data.update(stream.read(piece))
    return {"bytes": size, "header": header, "sample": data.hexdigest()[:32]}


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor with this safetensors dtype and shape."""
    return math.prod(shape) * DTYPES[dtype].itemsize
