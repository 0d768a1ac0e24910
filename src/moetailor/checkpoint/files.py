"""A safetensors checkpoint: every tensor found by name before any is read, and read by byte range, never mapped.

Mapped files count as resident memory and stay so; plain reads keep the peak at what is asked for. The headers of all
shards are checked when the checkpoint is opened, so that nothing long starts on a broken download.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from moetailor.checkpoint.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    Check,
    check_links,
    find_folder,
    read_config,
    read_index,
    unique,
    weight_files,
)
from moetailor.checkpoint.lock import restore
from moetailor.errors import CheckpointError

if TYPE_CHECKING:
    from moetailor.checkpoint.coded import Coded

# Numbers that torch computes with, or at least holds one by one.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Parts of quantized weights, which mean nothing alone.
CODES = {
    "F4": "4-bit floats",
    "F6_E2M3": "6-bit floats",
    "F6_E3M2": "6-bit floats",
    "F8_E8M0": "powers of two, the scales of blocks",
}
# Every dtype that safetensors knows, in bits.
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``nbytes`` bytes of ``file`` from ``offset`` on, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What lies on disk of it: itself, see `Coded`."""
        return (self,)

    @property
    def lies(self) -> str:
        """How it lies, in words: as its numbers."""
        return "plain"

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

    def read_ahead(self) -> None:
        """Let the system read the tensor from the disk while other work goes on; where it cannot, nothing is done."""
        if hasattr(os, "posix_fadvise"):
            with open(self.file, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)


class LazyTensor:
    """A tensor that is read when it is sliced with ``[...]``: what transformers' loader expects of a source."""

    def __init__(self, info: TensorInfo | Coded) -> None:
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
    """An opened and checked checkpoint folder.

    Attributes:
        folder: where it lies.
        source: as the user named it, a folder so that it is no name of the hub either.
        config: its config.json.
        tensors: what lies on disk, by name.
        coded: weights that lie as codes, by the names that an unquantized checkpoint has for them.
    """

    folder: Path
    source: str
    config: dict
    tensors: dict[str, TensorInfo]
    coded: Mapping[str, Coded] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> dict[str, TensorInfo | Coded]:
        """The tensors as the model knows them, each with how it lies: codes and scales are one weight."""
        parts = {info.name for coded in self.coded.values() for info in coded.stored}
        return {name: info for name, info in self.tensors.items() if name not in parts} | dict(self.coded)

    @property
    def shards(self) -> list[Path]:
        """The weight files, by name."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Numbers of all tensors, of codes those that they stand for."""
        return sum(math.prod(info.shape) for info in self.numbers.values())

    def fingerprint(self) -> dict:
        """Say what checkpoint this is: hashes of config.json and, for each shard, of its header and 1 MiB of data."""
        config = hashlib.sha256((self.folder / CONFIG).read_bytes()).hexdigest()[:32]
        shards = {str(file.relative_to(self.folder)): _shard_fingerprint(file) for file in self.shards}
        return {"config": config, "shards": shards}


def open_checkpoint(source: str | Path, *, check: Check | None = None, headers: Path | None = None) -> Checkpoint:
    """Open a local folder, or download a model from the hub, and check all of it that needs no weights.

    Args:
        source: a folder with config.json and safetensors files, or a hub name, see `find_folder`.
        check: called with the folder and its config.json before the weights are looked at, or downloaded.
        headers: see `find_folder`.

    Raises:
        CheckpointError: not a checkpoint, pickle weights, weights of which it is not clear which are meant, a missing
            or damaged shard, an index that does not agree with the shards or names a file outside the folder.
    """
    restore(Path(source))
    folder = find_folder(source, check=check, headers=headers)
    config, source = read_config(folder), str(source)
    if Path(source).is_dir() and not source.startswith((".", "/", "~")):
        source = f"./{source}"  # elsewhere the name alone would be one of the hub
    return Checkpoint(folder=folder, source=source, config=config, tensors=_find_tensors(folder, config))


def _find_tensors(folder: Path, config: dict) -> dict[str, TensorInfo]:
    files = weight_files(folder, config)
    found: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder / INDEX}: shard {file.relative_to(folder)} is missing; download it again")
    check_links(folder, files)
    for file in files:
        tensors = read_header(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"tensor {twice[0]!r} lies in {found[twice[0]].file} and in {file}; write it again with one"
            )
        found |= tensors
    if files != [folder / SINGLE]:
        # What the shards hold beyond the index is loaded all the same; what it names must be there.
        weight_map, _ = read_index(folder / INDEX)
        lost = [name for name, shard in weight_map.items() if name not in found or found[name].file != folder / shard]
        if lost:
            first = f"{lost[0]!r} in {weight_map[lost[0]]}"
            raise CheckpointError(f"{folder / INDEX}: {len(lost)} tensors are not where it says, first {first}")
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
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{file}: not a safetensors file: a header of {length:,} bytes, {MAX_HEADER:,} at most"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        found = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
        end = max((info.offset + info.nbytes for info in found.values()), default=8 + length)
        if end > size:
            raise CheckpointError(f"{file}: truncated: {size} bytes, its tensors need {end}; download the shard again")
        # The library is the judge of what the format allows; it does not tell offsets, so they are read here.
        with safe_open(file, framework="np"):
            pass
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from None
    return found


def _tensor_info(file: Path, name: str, entry: dict, base: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in BITS:
        raise ValueError(f"tensor {name!r} has dtype {dtype}, known: {', '.join(BITS)}")
    if start < 0 or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name!r} has offsets {start} to {end} and shape {list(shape)}, none may be negative")
    if end - start != tensor_nbytes(dtype, shape):
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
    return math.prod(shape) * BITS[dtype] // 8
