"""checkpoint/files.py and checkpoint/writer.py: bytes laid out by hand, every damage named, nothing lost in writing."""

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetailor.checkpoint.files import (
    INDEX,
    SINGLE,
    LazyTensor,
    TensorInfo,
    open_checkpoint,
    read_header,
    tensor_nbytes,
)
from moetailor.checkpoint.writer import Piece, rows, whole, write_shards
from moetailor.errors import CheckpointError, MoetailorError

# a: 1..6 as float32 [2, 3]; b: 1 and -2 as bfloat16 [2], whose bits are the upper halves of 3F800000 and C0000000.
HEADER = (
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]}}'
)
DATA = struct.pack("<6f", 1, 2, 3, 4, 5, 6) + struct.pack("<2H", 0x3F80, 0xC000)
BLOB = struct.pack("<Q", len(HEADER)) + HEADER + DATA


def header_file(folder: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype: str = "F32", shape: Iterable[object] = (2,), offsets: Iterable[object] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    file = tmp_path / "blob.safetensors"
    file.write_bytes(BLOB)
    return file


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards: a, b in the first, c in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, folder / "one.safetensors")
    save_file({"c": torch.zeros(5, dtype=torch.bfloat16)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Headers and tensors


def test_header_gives_the_place_of_every_tensor(blob: Path) -> None:
    base = 8 + len(HEADER)
    assert read_header(blob) == {
        "a": TensorInfo("a", "F32", (2, 3), blob, base, 24),
        "b": TensorInfo("b", "BF16", (2,), blob, base + 24, 4),
    }


def test_reading_a_tensor_gives_its_values_in_its_own_dtype(blob: Path) -> None:
    found = read_header(blob)
    assert torch.equal(found["a"].read(), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert torch.equal(found["b"].read(), torch.tensor([1.0, -2.0], dtype=torch.bfloat16))


def test_lazy_tensor_slices_and_describes_itself(blob: Path) -> None:
    lazy = LazyTensor(read_header(blob)["a"])
    assert (lazy.get_shape(), lazy.get_dtype()) == ([2, 3], "F32")
    assert lazy[...].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert lazy[1:, :2].tolist() == [[4, 5]]


def test_every_proper_prefix_of_a_file_is_called_truncated(blob: Path) -> None:
    for size in range(len(BLOB)):
        blob.write_bytes(BLOB[:size])
        with pytest.raises(CheckpointError, match=f"blob.safetensors: truncated: {size} bytes, its .* needs? [0-9]+"):
            read_header(blob)


def test_truncated_data_is_told_in_bytes_with_the_cure(blob: Path) -> None:
    blob.write_bytes(BLOB[:-1])
    with pytest.raises(CheckpointError) as refusal:
        read_header(blob)
    assert str(refusal.value) == (
        f"{blob}: truncated: {len(BLOB) - 1} bytes, its tensors need {len(BLOB)}; download the shard again"
    )


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"not json", "not a safetensors file"),
        ([1], "not a safetensors file"),
        ("text", "not a safetensors file"),
        (7, "not a safetensors file"),
        ({"a": 5}, "not a safetensors file"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"a": entry(dtype="F4_E9")}, "tensor 'a' has dtype F4_E9, known: F64, F32"),
        ({"a": entry(offsets=(0, 7))}, r"tensor 'a' has 7 bytes, F32 \[2\] needs another number"),
        ({"a": entry(shape=(3,))}, r"tensor 'a' has 8 bytes, F32 \[3\] needs another number"),
        ({"a": entry(offsets=(-8, 0))}, "tensor 'a'"),
        ({"a": entry(shape=(-1, -2))}, "tensor 'a'"),
        ({"a": entry(shape=("2",))}, "not a safetensors file"),
    ],
)
def test_header_that_is_none_is_refused_by_name(tmp_path: Path, header: object, said: str) -> None:
    file = header_file(tmp_path, header, bytes(16))
    with pytest.raises(CheckpointError, match=said) as refusal:
        read_header(file)
    assert str(refusal.value).startswith(f"{file}: ")


def test_file_that_shrinks_after_it_was_opened_is_noticed(blob: Path) -> None:
    found = read_header(blob)
    os.truncate(blob, 8 + len(HEADER) + 10)
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'; download the shard again"):
        found["a"].read()


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F32", (2, 3), 24), ("BF16", (5,), 10), ("F8_E4M3", (3, 3), 9), ("I64", (), 8), ("F64", (0, 4), 0)],
)
def test_bytes_of_a_tensor(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert tensor_nbytes(dtype, shape) == nbytes


# Checkpoints


def test_sharded_checkpoint_is_found_whole(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    assert [file.name for file in checkpoint.shards] == ["one.safetensors", "two.safetensors"]
    # 6 and 4 numbers of 4 bytes, 5 of 2
    assert checkpoint.nbytes == 24 + 16 + 10
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.source == str(sharded)


def test_single_file_needs_no_index(tmp_path: Path, blob: Path) -> None:
    blob.rename(tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (
            {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"},
            "1 tensors are not where it says, first 'd' in two.safetensors",
        ),
        (
            {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
            "1 tensors are not where it says, first 'a' in two.safetensors",
        ),
        (
            {"a": "one.safetensors", "c": "two.safetensors"},
            "1 tensors of the shards are not in it, first 'b'",
        ),
        (
            {"a": "one.safetensors", "b": "one.safetensors", "c": "three.safetensors"},
            "shard three.safetensors is missing; download it again",
        ),
    ],
    ids=["more than there is", "another shard", "less than there is", "no such shard"],
)
def test_index_that_lies_is_refused(sharded: Path, weight_map: dict[str, str], said: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=said) as refusal:
        open_checkpoint(sharded)
    assert str(refusal.value).startswith(f"{sharded / INDEX}: ")


@pytest.mark.parametrize(
    "shard", ["../blob.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "./one.safetensors"]
)
def test_index_that_leaves_the_folder_is_refused(sharded: Path, blob: Path, shard: str) -> None:
    write_index(sharded, {"a": shard})
    with pytest.raises(CheckpointError, match="which leaves the folder; refused") as refusal:
        open_checkpoint(sharded)
    assert repr(shard) in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {}}',
        b"\xff\xfe",
    ],
)
def test_damaged_index_is_refused(sharded: Path, text: str | bytes) -> None:
    (sharded / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"{INDEX}: no readable weight_map"):
        open_checkpoint(sharded)


def test_shards_may_be_links_as_in_the_hub_cache(sharded: Path, tmp_path: Path) -> None:
    (sharded / "two.safetensors").rename(tmp_path / "0123abcd")
    (sharded / "two.safetensors").symlink_to(tmp_path / "0123abcd")
    assert open_checkpoint(sharded).tensors["c"].read().tolist() == [0] * 5


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path}: weights are pickles ({name}), which can run code when read; save the model as safetensors first"
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json; give the folder of a Hugging Face checkpoint"),
        ("{", "config.json: not JSON"),
        ("[1]", "config.json: not a JSON object"),
        ('"text"', "config.json: not a JSON object"),
        ("{}", f"neither {SINGLE} nor {INDEX}; give a folder with safetensors weights"),
    ],
)
def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, config: str | None, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=said) as refusal:
        open_checkpoint(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path))


def test_folder_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tmp_path / "nothing")
    assert str(refusal.value) == f"{tmp_path / 'nothing'}: no such folder"


def test_fingerprint_tells_weights_and_config_apart(sharded: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(sharded, twin)
    first = open_checkpoint(sharded).fingerprint()
    assert open_checkpoint(twin).fingerprint() == first
    assert set(first["shards"]) == {"one.safetensors", "two.safetensors"}

    (twin / "config.json").write_text('{"model_type": "other"}')
    other = open_checkpoint(twin).fingerprint()
    assert other["config"] != first["config"]
    assert other["shards"] == first["shards"]

    data = bytearray((twin / "one.safetensors").read_bytes())
    data[-1] ^= 1
    (twin / "one.safetensors").write_bytes(data)
    changed = open_checkpoint(twin).fingerprint()["shards"]
    assert changed["one.safetensors"] != first["shards"]["one.safetensors"]
    assert changed["two.safetensors"] == first["shards"]["two.safetensors"]


def test_fingerprint_of_a_large_shard_sees_both_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    numbers = torch.zeros(3 * 2**18)  # 3 MiB, of which one is read
    prints = []
    for place in (None, 0, len(numbers) - 1):
        values = numbers.clone()
        if place is not None:
            values[place] = 1
        save_file({"a": values}, tmp_path / SINGLE)
        prints.append(open_checkpoint(tmp_path).fingerprint()["shards"][SINGLE]["sample"])
    assert len(set(prints)) == 3


# Pieces and shards


def test_whole_tensor_is_one_range(blob: Path) -> None:
    info = read_header(blob)["a"]
    base = 8 + len(HEADER)
    assert whole(info) == Piece("a", "F32", (2, 3), ((blob, base, 24),))
    assert whole(info, "z").name == "z"
    assert whole(info).nbytes == 24


def test_rows_are_ranges_and_neighbours_are_one(tmp_path: Path) -> None:
    file = header_file(tmp_path, {"t": entry(shape=(2, 4, 3), offsets=(0, 96))}, bytes(96))
    info = read_header(file)["t"]
    at = info.offset
    # Axis 0: rows of 48 bytes. Axis 1: rows of 12 bytes in two blocks of 48.
    assert rows(info, 0, [1]).ranges == ((file, at + 48, 48),)
    assert rows(info, 0, [0, 1]).ranges == ((file, at, 96),)
    picked = rows(info, 1, [0, 2, 3])
    assert picked.shape == (2, 3, 3)
    assert picked.nbytes == 72
    # Row 3 of the first block ends where row 0 of the second begins.
    assert picked.ranges == ((file, at, 12), (file, at + 24, 36), (file, at + 72, 24))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_written_are_the_rows_of_the_tensor(tmp_path: Path, axis: int) -> None:
    tensor = torch.arange(60.0).view(3, 4, 5)
    save_file({"t": tensor}, tmp_path / "x.safetensors")
    kept = [0, 2]
    write_shards(tmp_path, [[rows(read_header(tmp_path / "x.safetensors")["t"], axis, kept)]])
    assert torch.equal(load_file(tmp_path / SINGLE)["t"], tensor.index_select(axis, torch.tensor(kept)))


def test_rows_keep_the_order_they_are_asked_in(tmp_path: Path) -> None:
    save_file({"t": torch.arange(8.0).view(4, 2)}, tmp_path / "x.safetensors")
    write_shards(tmp_path, [[rows(read_header(tmp_path / "x.safetensors")["t"], 0, [3, 1])]])
    assert load_file(tmp_path / SINGLE)["t"].tolist() == [[6, 7], [2, 3]]


def test_one_shard_is_written_byte_for_byte(tmp_path: Path, blob: Path) -> None:
    info = read_header(blob)
    save_file({"n": torch.tensor([1.5, -2.0])}, tmp_path / "computed")
    pieces = [whole(info["b"], "z"), whole(read_header(tmp_path / "computed")["n"])]
    assert write_shards(tmp_path, [pieces]) == 12
    header = (
        b'{"__metadata__":{"format":"pt"},"z":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"n":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    header += b" " * (-len(header) % 8)
    written = (tmp_path / SINGLE).read_bytes()
    assert written == struct.pack("<Q", len(header)) + header + struct.pack("<2H2f", 0x3F80, 0xC000, 1.5, -2.0)
    assert not (tmp_path / INDEX).exists()


def test_rows_may_come_from_another_file(tmp_path: Path) -> None:
    save_file({"w": torch.arange(24.0).view(2, 4, 3)}, tmp_path / "original")
    save_file({"w": -torch.arange(12.0).view(2, 2, 3)}, tmp_path / "computed")
    info, other = read_header(tmp_path / "original")["w"], read_header(tmp_path / "computed")["w"]
    write_shards(tmp_path, [[rows(info, 1, [0, 2, 3], {2: (other, 1)})]])
    expected = torch.arange(24.0).view(2, 4, 3)[:, [0, 2, 3]]
    expected[:, 1] = -torch.arange(12.0).view(2, 2, 3)[:, 1]
    assert torch.equal(load_file(tmp_path / SINGLE)["w"], expected)


def test_several_shards_are_named_indexed_and_counted(tmp_path: Path, blob: Path) -> None:
    info = read_header(blob)
    told: list[tuple[int, int]] = []
    shards = [[whole(info["a"])], [], [whole(info["b"])]]
    assert write_shards(tmp_path, shards, lambda done, total: told.append((done, total))) == 28
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 28},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    assert told == [(24, 28), (28, 28)]
    (tmp_path / "config.json").write_text("{}")
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_copying_outside_the_kernel_gives_the_same_bytes(
    tmp_path: Path, blob: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write_shards(tmp_path, [[whole(info) for info in read_header(blob).values()]])
    assert (tmp_path / SINGLE).read_bytes()[-28:] == DATA


def test_source_that_shrinks_while_it_is_copied_is_noticed(tmp_path: Path, blob: Path) -> None:
    info = read_header(blob)["a"]
    os.truncate(blob, info.offset + 10)
    with pytest.raises(MoetailorError, match="ends inside a tensor; was it changed while it was read"):
        write_shards(tmp_path, [[whole(info)]])
