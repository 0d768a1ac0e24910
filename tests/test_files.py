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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moetailor.checkpoint.files import BITS, LazyTensor, TensorInfo, open_checkpoint, read_header, tensor_nbytes
from moetailor.checkpoint.folder import INDEX, SINGLE
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


def raw(text: str) -> bytes:
    """Return a header in which ONE stands for a sound entry of 8 bytes."""
    return text.replace("ONE", '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}').encode()


STRICT = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "the same bytes twice": ({"a": entry(), "b": entry()}, 8),
    "a gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "a gap before the first": ({"a": entry(offsets=(8, 16))}, 16),
    "bytes behind the last": ({"a": entry()}, 9),
    "bytes of no tensor": ({}, 1),
    "end before start": ({"a": entry(offsets=(8, 0))}, 8),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, 8),
    "a float offset": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}'), 8),
    "a float size": (raw('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}'), 8),
    "a truth value as size": ({"a": entry(shape=(True,), offsets=(0, 4))}, 4),
    "a size of 70 bits": ({"a": entry(shape=(2**70, 0), offsets=(0, 0))}, 0),
    "a product of 126 bits": ({"a": entry(shape=(2**63, 2**63, 0), offsets=(0, 0))}, 0),
    "an empty tensor out of place": ({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, 8),
    "metadata that is no text": (raw('{"__metadata__":{"a":1},"a":ONE}'), 8),
    "metadata that is a list": (raw('{"__metadata__":[],"a":ONE}'), 8),
    "a field twice": (raw('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), 8),
    "a tensor twice": (raw('{"a":ONE,"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'), 16),
    "a byte order mark": (b"\xef\xbb\xbf" + raw('{"a":ONE}'), 8),
    "more than one value": (raw('{"a":ONE}{}'), 8),
    "a byte of nothing behind it": (raw('{"a":ONE}\0'), 8),
    "half a character": (raw('{"\\ud800":ONE}'), 8),
    "Latin-1": ('{"\u00e9":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.encode("latin-1"), 8),
    "100,000 brackets": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "5,000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', 8),
    "a size that is no whole byte": ({"a": entry("F4", (3,), (0, 2))}, 2),
    "an unknown dtype": ({"a": entry("F3", (2,), (0, 8))}, 8),
}


@pytest.mark.parametrize("kind", STRICT)
def test_what_the_library_refuses_is_refused(tmp_path: Path, kind: str) -> None:
    header, nbytes = STRICT[kind]
    file = header_file(tmp_path, header, bytes(nbytes))
    with pytest.raises(SafetensorError):
        safe_open(file, framework="np")
    with pytest.raises(CheckpointError, match=r"not a safetensors file|truncated"):
        read_header(file)


SOUND = {
    "other order": {"b": entry(offsets=(8, 16)), "a": entry()},
    "an empty tensor between": {"a": entry(), "z": entry(shape=(0,), offsets=(8, 8)), "b": entry(offsets=(8, 16))},
    "a number": {"a": entry(shape=(), offsets=(0, 4)), "b": entry(shape=(3,), offsets=(4, 16))},
    "a name beyond ASCII": {"\u00e9\u4e2d": entry(shape=(4,), offsets=(0, 16))},
    "halves of bytes": {"a": entry("F4", (32,), (0, 16))},
    "three quarters of bytes": {"a": entry("F6_E2M3", (16,), (0, 12)), "b": entry("F8_E8M0", (4,), (12, 16))},
}


@pytest.mark.parametrize("kind", SOUND)
def test_what_the_library_takes_is_read_alike(tmp_path: Path, kind: str) -> None:
    file = header_file(tmp_path, SOUND[kind], bytes(16))
    with safe_open(file, framework="np") as judged:
        told = {key: (judged.get_slice(key).get_dtype(), judged.get_slice(key).get_shape()) for key in judged.keys()}
    assert {name: (info.dtype, list(info.shape)) for name, info in read_header(file).items()} == told


def test_every_dtype_of_the_library_is_known_by_its_size(tmp_path: Path) -> None:
    # Its own error names them all.
    file = header_file(tmp_path, {"a": entry("nonsense")}, bytes(8))
    with pytest.raises(SafetensorError, match="expected one of") as refusal:
        safe_open(file, framework="np")
    names = set(str(refusal.value).split("expected one of ")[1].replace("`", "").split(" at ")[0].split(", "))
    assert names == set(BITS)
    for name in names:
        found = read_header(header_file(tmp_path, {"a": entry(name, (8,), (0, BITS[name]))}, bytes(BITS[name])))
        assert found["a"].nbytes == BITS[name]


def test_a_name_that_comes_twice_is_refused_even_where_the_library_takes_it(tmp_path: Path) -> None:
    file = header_file(tmp_path, raw('{"a":ONE,"a":ONE}'), bytes(8))
    safe_open(file, framework="np")
    with pytest.raises(CheckpointError, match=r"not a safetensors file .key 'a' comes twice"):
        read_header(file)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", 100_000_001))
        out.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="a header of 100,000,001 bytes, 100,000,000 at most"):
        read_header(file)


def test_file_that_shrinks_after_it_was_opened_is_noticed(blob: Path) -> None:
    found = read_header(blob)
    os.truncate(blob, 8 + len(HEADER) + 10)
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'; download the shard again"):
        found["a"].read()


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F32", (2, 3), 24),
        ("BF16", (5,), 10),
        ("F8_E4M3", (3, 3), 9),
        ("I64", (), 8),
        ("F64", (0, 4), 0),
        ("F4", (4, 3), 6),
        ("F6_E3M2", (4,), 3),
    ],
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
            {"a": "one.safetensors", "b": "one.safetensors", "c": "three.safetensors"},
            "shard three.safetensors is missing; download it again",
        ),
    ],
    ids=["more than there is", "another shard", "no such shard"],
)
def test_index_that_lies_is_refused(sharded: Path, weight_map: dict[str, str], said: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=said) as refusal:
        open_checkpoint(sharded)
    assert str(refusal.value).startswith(f"{sharded / INDEX}: ")


@pytest.mark.parametrize(
    "shard",
    [
        "../blob.safetensors",
        "/etc/passwd",
        "sub/../../blob.safetensors",
        "..",
        ".",
        "",
        "./one.safetensors",
        "sub//one.safetensors",
        "one\0.safetensors",
    ],
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
        '{"weight_map": {"a": {"b": "one.safetensors"}}}',
        '{"weight_map": {"a": "one.safetensors"}}',
        '{"metadata": [], "weight_map": {"a": "one.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
        '{"metadata": {}, "weight_map": {}, "weight_map": {"a": "one.safetensors"}}',
        '{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}",
        b"\xff\xfe",
    ],
)
def test_damaged_index_is_refused(sharded: Path, text: str | bytes) -> None:
    (sharded / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"{INDEX}: no readable weight_map"):
        open_checkpoint(sharded)


def test_what_the_shards_hold_beyond_the_index_is_read_as_transformers_reads_it(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})
    assert sorted(open_checkpoint(sharded).tensors) == ["a", "b", "c"]


def test_shards_may_lie_in_a_folder_of_the_folder(sharded: Path) -> None:
    (sharded / "one").mkdir()
    (sharded / "two").mkdir()
    (sharded / "one.safetensors").rename(sharded / "one" / "x.safetensors")
    (sharded / "two.safetensors").rename(sharded / "two" / "x.safetensors")
    write_index(sharded, {"a": "one/x.safetensors", "b": "one/x.safetensors", "c": "two/x.safetensors"})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensors["c"].read().tolist() == [0] * 5
    # Two files of one name are two files.
    assert set(checkpoint.fingerprint()["shards"]) == {"one/x.safetensors", "two/x.safetensors"}


def test_tensor_that_lies_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"b": torch.zeros(4), "c": torch.zeros(5)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(sharded)
    one, two = sharded / "one.safetensors", sharded / "two.safetensors"
    assert str(refusal.value) == f"tensor 'b' lies in {one} and in {two}; write it again with one"


# Which weights a folder means


def test_single_file_beside_an_index_of_others_is_ambiguous(sharded: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, sharded / SINGLE)
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(sharded)
    assert str(refusal.value) == (
        f"{sharded}: holds {SINGLE} and {INDEX}; transformers reads the first, other engines the second; delete the "
        "one that is not meant"
    )


def test_index_of_the_single_file_says_the_same(tmp_path: Path, blob: Path) -> None:
    blob.rename(tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    write_index(tmp_path, {"a": SINGLE, "b": SINGLE})
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", "{}", "transformers would load that adapter on top of them; merge it into the weights"),
        ("shard-00001-model-00001-of-00002.safetensors", "", "is one process's part of a model"),
        ("config.json", '{"transformers_weights": "x.safetensors"}', "rename that file to model.safetensors and take"),
        (
            "config.json",
            '{"transformers_weights": "x.safetensors.index.json"}',
            "rename that file to model.safetensors.index.json and take the entry out",
        ),
    ],
)
def test_weights_that_transformers_would_choose_before_are_refused(
    sharded: Path, name: str, content: str, said: str
) -> None:
    (sharded / name).write_text(content)
    with pytest.raises(CheckpointError, match=said) as refusal:
        open_checkpoint(sharded)
    assert str(refusal.value).startswith(str(sharded))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_weights_under_a_name_that_transformers_does_not_look_for_are_pointed_out(
    tmp_path: Path, blob: Path, name: str
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    blob.rename(folder / name)
    with pytest.raises(CheckpointError, match=f"it has {name}, which transformers does not look for: rename it if"):
        open_checkpoint(folder)


# Links


def cached(folder: Path, hub: Path, *, shared: bool) -> Path:
    """Lay a folder out as the hub's cache does; shared: blobs of all models in one place."""
    snapshot, blobs = hub / "models--a--b" / "snapshots" / "0123abcd", hub / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        if shared and file.suffix == ".safetensors":
            (hub / "blobs" / "f0").mkdir(parents=True, exist_ok=True)
            file.rename(hub / "blobs" / "f0" / file.name)
            (blobs / file.name).symlink_to(f"../../blobs/f0/{file.name}")
        else:
            file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_followed(sharded: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = cached(sharded, tmp_path / "hub", shared=shared)
    assert open_checkpoint(snapshot).tensors["c"].read().tolist() == [0] * 5
    (tmp_path / "link").symlink_to(snapshot)  # the folder itself may be one
    assert len(open_checkpoint(tmp_path / "link").tensors) == 3


def test_links_inside_the_folder_are_followed(sharded: Path) -> None:
    (sharded / "two.safetensors").rename(sharded / "0123abcd")
    (sharded / "two.safetensors").symlink_to("0123abcd")
    assert open_checkpoint(sharded).tensors["c"].read().tolist() == [0] * 5


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "two.safetensors", "modeling_own.py", "no such file"])
@pytest.mark.parametrize("cache", [False, True])
def test_links_out_of_the_folder_are_refused_by_name(sharded: Path, tmp_path: Path, name: str, cache: bool) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    folder = cached(sharded, tmp_path / "hub", shared=False) if cache else sharded
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(folder)
    assert str(refusal.value) == (
        f"{folder / name}: is a link to {tmp_path / 'elsewhere'}, outside the folder of the checkpoint; put the file "
        "itself there"
    )


def test_links_to_folders_do_not_lead_out_either(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (sharded / "one.safetensors").rename(tmp_path / "elsewhere" / "one.safetensors")
    (sharded / "sub").symlink_to(tmp_path / "elsewhere")
    write_index(sharded, {"a": "sub/one.safetensors", "b": "sub/one.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"sub: is a link to .*elsewhere, outside the folder"):
        open_checkpoint(sharded)
    (sharded / "sub").unlink()
    (sharded / "sub").mkdir()
    (sharded / "sub" / "one.safetensors").symlink_to(tmp_path / "elsewhere" / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"one.safetensors: is a link to .*, outside the folder"):
        open_checkpoint(sharded)


def test_link_to_itself_is_refused(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").symlink_to("two.safetensors")
    with pytest.raises(CheckpointError, match=r"shard two.safetensors is missing"):
        open_checkpoint(sharded)


# The hub


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A hub with one model, and what was asked of it: the files that each call brought."""
    asked: list[list[str]] = []
    (sharded / "other.gguf").write_text("")
    (sharded / "consolidated.safetensors").write_text("")
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123abcd"

    def download(
        name: str, revision: str | None, allow_patterns: list[str] | None = None, ignore_patterns: Iterable[str] = ()
    ) -> str:
        assert (name, revision) == ("a/b", "0123abcd" if asked else None)
        snapshot.mkdir(parents=True, exist_ok=True)
        wanted = [
            file.name
            for file in sorted(sharded.iterdir())
            if (allow_patterns is None or any(file.match(pattern) for pattern in allow_patterns))
            and not any(file.match(pattern) for pattern in ignore_patterns)
        ]
        for file in wanted:
            shutil.copy(sharded / file, snapshot)
        asked.append(wanted)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_weights_are_downloaded_after_the_config_was_looked_at(hub: list[list[str]]) -> None:
    checkpoint = open_checkpoint("a/b")
    assert hub == [["config.json", INDEX], ["one.safetensors", "two.safetensors"]]
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.source == "a/b"


@pytest.mark.parametrize("name", ["mine", "org/mine"])
def test_a_folder_by_a_relative_name_is_nowhere_taken_for_a_hubs(
    name: str, hub: list[list[str]], sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sharded, tmp_path / "here" / name)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = open_checkpoint(name).source
    assert source == f"./{name}"
    assert open_checkpoint(source).source == source
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(CheckpointError, match=f"./{name}: no such folder"):
        open_checkpoint(source)
    assert hub == []


def test_what_the_config_tells_is_refused_before_weights_are_downloaded(hub: list[list[str]]) -> None:
    def refuse(folder: Path, config: dict) -> None:
        assert folder.name == "0123abcd"
        raise CheckpointError(config["model_type"])

    with pytest.raises(CheckpointError, match="tiny"):
        open_checkpoint("a/b", check=refuse)
    assert hub == [["config.json", INDEX]]


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


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EIO, 0])
def test_copying_outside_the_kernel_gives_the_same_bytes(
    tmp_path: Path, blob: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> int:
        if number:
            raise OSError(number, "no")
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write_shards(tmp_path, [[whole(info) for info in read_header(blob).values()]])
    assert (tmp_path / SINGLE).read_bytes()[-28:] == DATA


def test_source_that_shrinks_while_it_is_copied_is_noticed(tmp_path: Path, blob: Path) -> None:
    info = read_header(blob)["a"]
    os.truncate(blob, info.offset + 10)
    with pytest.raises(MoetailorError, match="ends inside a tensor; was it changed while it was read"):
        write_shards(tmp_path, [[whole(info)]])
