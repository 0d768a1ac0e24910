"""Writing a checkpoint: tensors as byte ranges of files; the index comes last.

What stays of a checkpoint, and what was computed into a file beside, is copied by byte range inside the kernel; nothing
of it is decoded or held in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.files import INDEX, SINGLE, TensorInfo, tensor_nbytes
from moetailor.errors import MoetailorError
from moetailor.progress import Progress

CHUNK = 64 * 2**20
# Does some work for each file, as `map` does; processes may share it out.
Share = Callable[[Sequence[str], Callable[[str], None]], Iterable[None]]


@dataclass(frozen=True)
class Piece:
    """One tensor to be written.

    Attributes:
        name: its name in the new checkpoint.
        dtype: safetensors dtype.
        shape: its shape.
        ranges: (file, offset, bytes) parts of files that make it up, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[Path, int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_nbytes(self.dtype, self.shape)


def whole(info: TensorInfo, name: str | None = None) -> Piece:
    """Return a tensor of the original as it is, perhaps under another name."""
    return Piece(name or info.name, info.dtype, info.shape, ((info.file, info.offset, info.nbytes),))


def rows(info: TensorInfo, axis: int, kept: Sequence[int], other: Mapping[int, tuple[TensorInfo, int]] = {}) -> Piece:
    """Return some rows of a tensor of the original along an axis.

    Args:
        info: the tensor.
        axis: which axis.
        kept: the rows, in their new order.
        other: rows that come from elsewhere: row -> (tensor that is as large along the other axes, its row).
    """
    shape = (*info.shape[:axis], len(kept), *info.shape[axis + 1 :])
    outer = torch.Size(info.shape[:axis]).numel()
    step = info.nbytes // outer // info.shape[axis]
    ranges: list[tuple[Path, int, int]] = []
    for block in range(outer):
        for row in kept:
            source, at = other.get(row, (info, row))
            start = source.offset + (block * source.shape[axis] + at) * step
            if ranges and ranges[-1][0] == source.file and ranges[-1][1] + ranges[-1][2] == start:
                ranges[-1] = (source.file, ranges[-1][1], ranges[-1][2] + step)
            else:
                ranges.append((source.file, start, step))
    return Piece(info.name, info.dtype, shape, tuple(ranges))


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[Piece]],
    progress: Progress | None = None,
    *,
    share: Share = lambda names, write: map(write, names),
) -> int:
    """Write tensors as safetensors shards with their index, and return the bytes of all tensors.

    Args:
        folder: where to write.
        shards: the tensors of each shard; empty shards are left out.
        progress: called with (bytes written here, bytes in all).
        share: has the files written, see `ranks.each`.
    """
    shards = [shard for shard in shards if shard]
    total, done = sum(piece.nbytes for shard in shards for piece in shard), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    )
    of = dict(zip(names, shards, strict=True))
    weight_map = {piece.name: name for name, shard in of.items() for piece in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def write(name: str) -> None:
        if name == INDEX:
            write_json(folder / INDEX, index)
        else:
            _write_shard(folder / name, of[name], count)

    for _ in share([*names, INDEX] if len(shards) > 1 else names, write):
        pass
    return total


def _write_shard(file: Path, pieces: Sequence[Piece], count: Callable[[int], None]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [end, end + piece.nbytes],
        }
        end += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            for source, offset, nbytes in piece.ranges:
                _copy(source, offset, nbytes, out.fileno(), count)
        os.fsync(out.fileno())


def _copy(source: Path, offset: int, nbytes: int, target: int, count: Callable[[int], None]) -> None:
    handle = os.open(source, os.O_RDONLY)
    try:
        while nbytes:
            done = _copy_some(handle, offset, min(nbytes, CHUNK), target)
            if not done:
                raise MoetailorError(f"{source}: ends inside a tensor; was it changed while it was read?")
            offset, nbytes = offset + done, nbytes - done
            count(done)
    finally:
        os.close(handle)


def _copy_some(source: int, offset: int, nbytes: int, target: int) -> int:
    # Not every pair of file systems can copy inside the kernel, and some say so by copying nothing; what is wrong
    # beside that, reading and writing meet as well.
    with suppress(OSError):
        if done := os.copy_file_range(source, target, nbytes, offset):
            return done
    data = memoryview(os.pread(source, nbytes, offset))
    done = len(data)
    while data:
        data = data[os.write(target, data) :]
    return done
