"""calibration/text.py, spans.py and sources.py: documents packed by hand, text that cannot be used named by line."""

import gzip
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from moetailor.calibration import sources
from moetailor.calibration.batch import Batch, document_key, load_batches, save_batches, text_fingerprint
from moetailor.calibration.calibrate import calibrate
from moetailor.calibration.spans import pieces
from moetailor.calibration.text import TextOptions, length_of, read_batches
from moetailor.errors import CalibrationError
from moetailor.recovery.examples import ExampleOptions, read_blocks
from support.letters import EOS, Letters
from support.reference import REFERENCE


def jsonl(file: Path, rows: Sequence[object]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def documents(file: Path, *texts: str, domain: str | None = None) -> str:
    extra = {} if domain is None else {"domain": domain}
    return jsonl(file, [{"text": text, **extra} for text in texts])


def read(*data: str, tokenizer: object = None, **options: object) -> list[Batch]:
    settings = {"sequences": None, "length": 4, "batch_size": 2} | options
    return read_batches(TextOptions(data=data, **settings), tokenizer or Letters())  # type: ignore[arg-type]


def stream(batches: list[Batch]) -> list[int]:
    """Return the tokens of all batches in order."""
    return torch.cat([batch.input_ids.flatten() for batch in batches]).tolist()


# Packing


def test_documents_are_packed_without_padding(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", "abc", "de", "f")
    # 1 abc 1 de 1 f is nine tokens: two blocks of four, and one is left.
    batches = read(file)
    assert [batch.input_ids.tolist() for batch in batches] == [[[1, 10, 11, 12], [1, 13, 14, 1]], [[15]]]
    assert [batch.position.tolist() for batch in batches] == [[[0, 1, 2, 3], [0, 1, 2, 0]], [[1]]]
    keys = torch.cat([batch.document.flatten() for batch in batches]).tolist()
    assert keys[:4] == [keys[0]] * 4
    assert keys[4:7] == [keys[4]] * 3
    assert keys[7:] == [keys[7]] * 2
    assert len({keys[0], keys[4], keys[7]}) == 3
    assert all(batch.attention_mask is None and bool(batch.counted.all()) for batch in batches)


def test_blocks_are_batched_and_the_rest_comes_last(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", "abcdefghijk")  # twelve tokens
    assert [tuple(batch.input_ids.shape) for batch in read(file, length=5)] == [(2, 5), (1, 2)]
    assert [tuple(batch.input_ids.shape) for batch in read(file, length=4)] == [(2, 4), (1, 4)]
    assert [tuple(batch.input_ids.shape) for batch in read(file, length=2, batch_size=4)] == [(4, 2), (2, 2)]


def test_text_is_cut_at_the_sequences_asked_for(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", "abcdefghijk", "lmnop")
    assert stream(read(file, sequences=2, length=3)) == [1, 10, 11, 12, 13, 14]
    # Fewer than asked for when the text ends: 18 tokens.
    assert len(stream(read(file, sequences=9, length=3))) == 18


@pytest.mark.parametrize(("bos", "eos", "first"), [(1, 2, [1]), (None, 2, [2]), (0, 2, [0]), (None, None, [])])
def test_documents_begin_with_the_first_special_token_there_is(
    tmp_path: Path, bos: int | None, eos: int | None, first: list[int]
) -> None:
    file = documents(tmp_path / "t.jsonl", "abcd")
    assert stream(read(file, tokenizer=Letters(bos, eos))) == [*first, 10, 11, 12, 13]


def test_masked_special_tokens_do_not_count(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", "abc", "de")
    (batch, rest) = read(file, mask_special=True)
    assert batch.counted.tolist() == [[False, True, True, True]]
    assert rest.counted.tolist() == [[False, True, True]]


def test_domains_are_numbered_as_they_come(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "t.jsonl",
        [{"text": "a", "domain": "code"}, {"text": "b"}, {"text": "c", "domain": "code"}, {"text": "d", "domain": 0}],
    )
    batches = read(file, length=8)
    assert [batch.domains for batch in batches] == [("code", "", "0")]
    assert batches[0].domain.tolist() == [[0, 0, 1, 1, 0, 0, 2, 2]]


def test_domains_come_back_from_a_file(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"text": "ab", "domain": "code"}, {"text": "c", "domain": "prosa \u00fc"}])
    batches = read(file, length=2, batch_size=1)
    known = save_batches(batches, tmp_path / "text.safetensors")
    for back, batch in zip(load_batches(tmp_path / "text.safetensors", known), batches, strict=True):
        assert back.domains == batch.domains == ("code", "prosa ü")
        assert torch.equal(back.domain, batch.domain)


def test_blank_lines_and_blank_documents_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "ab"}\n\n{"text": "  "}\n   \n{"text": "c"}')
    assert stream(read(str(file))) == [1, 10, 11, 1, 12]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab cd")
    assert stream(read(str(tmp_path / "t.txt"))) == [1, 10, 11, 9, 12, 13]


def test_parquet_gives_the_same_batches_as_jsonl(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"text": ["abc", "de"], "domain": ["x", "y"], "other": [1, 2]}
    parquet.write_table(arrow.table(rows), tmp_path / "t.parquet")
    lines = jsonl(tmp_path / "t.jsonl", [{"text": "abc", "domain": "x"}, {"text": "de", "domain": "y"}])
    for ours, theirs in zip(read(str(tmp_path / "t.parquet")), read(lines), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.domain, theirs.domain)
        assert ours.domains == theirs.domains


def test_same_document_has_the_same_key_wherever_it_lies(tmp_path: Path) -> None:
    one = read(documents(tmp_path / "a.jsonl", "abc"))
    two = read(documents(tmp_path / "b.jsonl", "de", "abc"), length=7)
    assert two[0].document[0, 3:].tolist() == one[0].document[0].tolist()


def test_real_tokenizer_gives_its_text_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = "Alice was beginning to get very tired of sitting by her sister on the bank."
    (batch, *rest) = read(documents(tmp_path / "t.jsonl", text), tokenizer=tokenizer, length=8)
    ids = stream([batch, *rest])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


# Mixing and order


def test_sources_are_mixed_by_their_share_of_the_tokens(tmp_path: Path) -> None:
    # Ten tokens each. Taken / weight decides, the first of equals goes first: A at 0, 10/3, 20/3, 10, B at 0, 10.
    first = documents(tmp_path / "a.jsonl", *["a" * 9] * 9)
    second = documents(tmp_path / "b.jsonl", *["b" * 9] * 9)
    batches = read(f"{first}:3", second, sequences=8, length=10)
    assert "".join("ab"[batch.input_ids[row, 1] == 11] for batch in batches for row in range(2)) == "abaaabaa"


def test_source_that_ends_leaves_the_rest_to_the_others(tmp_path: Path) -> None:
    first = documents(tmp_path / "a.jsonl", "a" * 9)
    second = documents(tmp_path / "b.jsonl", *["b" * 9] * 3)
    assert stream(read(f"{first}:9", f"{second}:1", length=10))[1::10] == [10, 11, 11, 11]


def test_order_of_the_file_without_seed_and_a_repeatable_one_with(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", *"abcdefghijklmnop")
    plain = stream(read(file, length=2))[1::2]
    assert plain == list(range(10, 26))
    shuffled = [stream(read(file, length=2, seed=seed))[1::2] for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert all(sorted(order) == plain != order for order in shuffled)


# Special tokens that the text has already

TEXTS = [
    # (BOS, EOS, texts, tokens)
    (1, 2, ["^abc", "de"], [1, 10, 11, 12, 1, 13, 14]),
    (1, 2, ["^abc$", "^de$"], [1, 10, 11, 12, 2, 1, 13, 14, 2]),
    (1, 2, ["abc^", "de"], [1, 10, 11, 12, 1, 13, 14]),
    (None, 2, ["abc$", "de", "f$", "$gh"], [2, 10, 11, 12, 2, 13, 14, 2, 15, 2, 16, 17]),
    (2, 2, ["$abc$", "de"], [2, 10, 11, 12, 2, 13, 14]),
    (None, None, ["abc$", "$de"], [10, 11, 12, 2, 2, 13, 14]),
    # What the text itself has twice stays: it is not ours.
    (1, 2, ["^^ab", "c$$", "de"], [1, 1, 10, 11, 1, 12, 2, 2, 1, 13, 14]),
]


@pytest.mark.parametrize(("bos", "eos", "texts", "tokens"), TEXTS)
def test_special_token_of_the_text_gets_no_second_one(
    tmp_path: Path, bos: int | None, eos: int | None, texts: list[str], tokens: list[int]
) -> None:
    file, tokenizer = documents(tmp_path / "t.jsonl", *texts), Letters(bos, eos)
    assert stream(read(file, tokenizer=tokenizer, length=len(tokens))) == tokens
    blocks = read_blocks(ExampleOptions(data=(file,), length=len(tokens)), tokenizer)
    assert blocks.input_ids.tolist() == [tokens]


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("ab", "cd", [1, 10, 11, 12, 13, 2]),
        ("^ab", "cd$", [1, 10, 11, 12, 13, 2]),
        ("^", "cd$", [1, 12, 13, 2]),
        ("ab", "$", [1, 10, 11, 2]),
    ],
)
def test_prompt_and_completion_are_read_alike_everywhere(
    tmp_path: Path, prompt: str, completion: str, tokens: list[int]
) -> None:
    row = {"prompt": prompt, "completion": completion, "domain": "tasks"}
    file = jsonl(tmp_path / "t.jsonl", [row, row])
    (batch,) = read(file, length=2 * len(tokens))
    assert batch.input_ids.tolist() == [tokens * 2]
    assert batch.position.tolist() == [[*range(len(tokens))] * 2]
    assert batch.domains == ("tasks",)
    blocks = read_blocks(ExampleOptions(data=(file,), length=len(tokens)), Letters())
    assert blocks.input_ids.tolist() == [tokens] * 2
    # The end counts, whoever wrote it.
    assert blocks.labels[:, -1].tolist() == [EOS] * 2


def template(turns: list[dict]) -> str:
    return "^" + "".join(f"{turn['role'][0].upper()}{turn['content']}$" for turn in turns)


def test_messages_are_written_by_the_chat_template(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    rows = [{"messages": talk, "domain": "chat"}, {"messages": talk[:1]}, {"text": "d"}]
    (batch,) = read(jsonl(tmp_path / "t.jsonl", rows), tokenizer=Letters(template=template), length=15)
    # ^Uab$Ac$ ^Uab$ ^d: what the template writes gets nothing before it.
    assert batch.input_ids[0].tolist() == [1, 9, 10, 11, 2, 9, 12, 2, 1, 9, 10, 11, 2, 1, 13]
    assert batch.domain[0].tolist() == [0] * 8 + [1] * 7
    assert batch.domains == ("chat", "")
    assert len(batch.document.unique()) == 3


def test_conversation_that_cannot_be_labelled_can_be_calibrated_on(tmp_path: Path) -> None:
    def last_thought(turns: list[dict]) -> str:
        return "".join(turn["content"] + "t" * (turn is turns[-1]) for turn in turns)

    talk = [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "cd"}]
    file, tokenizer = jsonl(tmp_path / "t.jsonl", [{"messages": talk}]), Letters(template=last_thought)
    assert stream(read(file, tokenizer=tokenizer)) == [10, 11, 12, 13, 29]
    with pytest.raises(CalibrationError, match="writes turn 1 otherwise"):
        read_blocks(ExampleOptions(data=(file,), length=2), tokenizer)


def test_messages_without_a_template_are_lines(tmp_path: Path) -> None:
    talk = [{"role": "a", "content": "b"}, {"role": "assistant", "content": "c"}] * 2
    # ^a: b, a line end, assistant: c$, a line end, a: b ...
    assistant = [10 + ord(letter) - ord("a") for letter in "assistant"]
    turns = [10, 9, 9, 11, 9, *assistant, 9, 9, 12, 2]
    file = jsonl(tmp_path / "t.jsonl", [{"messages": talk}])
    assert stream(read(file, length=32)) == [1, *turns, 9, *turns]


def test_whatever_a_template_raises_is_named_by_line(tmp_path: Path) -> None:
    rows = [{"text": "abcdef"}, {"messages": [{"role": "user", "content": "a"}]}]
    file = jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(CalibrationError, match=r"line 2: .*the chat template refuses it: division by zero"):
        read(file, tokenizer=Letters(template=lambda turns: str(1 / 0)))


def test_one_of_several_ways_to_say_a_text_is_taken(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}]
    rows = [
        {"messages": talk, "text": "b", "prompt": "c", "completion": "d"},
        {"prompt": "e", "completion": "f", "text": "g"},
        {"prompt": "what the text was made by", "text": "h"},
    ]
    file = jsonl(tmp_path / "t.jsonl", rows)
    assert stream(read(file, tokenizer=Letters(template=template))) == [1, 9, 10, 2, 1, 14, 15, 2, 1, 17]


# Large files


def numbered(file: Path, count: int) -> str:
    """Write documents of one block of four each, whose letters are a number in base 26."""
    return documents(
        file, *("".join(chr(97 + number // 26**place % 26) for place in (2, 1, 0)) for number in range(count))
    )


def numbers(batches: list[Batch]) -> list[int]:
    ids = torch.cat([batch.input_ids for batch in batches])
    return ((ids[:, 1:] - 10) * torch.tensor([676, 26, 1])).sum(1).tolist()


def shrink(monkeypatch: pytest.MonkeyPatch, place: int = 100, handful: int = 4) -> None:
    """Shuffle by places so small that a small file has many."""
    monkeypatch.setattr(sources, "PLACE", place)
    monkeypatch.setattr(sources, "HANDFUL", handful)


@pytest.mark.parametrize("place", [1, 7, 17, 100, 1000])
def test_shuffled_by_places_each_row_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    file = numbered(tmp_path / "t.jsonl", 200)  # 16 bytes each, 3,200 in all
    shrink(monkeypatch, place)
    first, again, other = (numbers(read(file, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(200))


def test_a_handful_comes_from_all_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = numbered(tmp_path / "t.jsonl", 2000)
    shrink(monkeypatch, place=160, handful=20)
    found = numbers(read(file, seed=0, sequences=200, length=4))
    # Twenty places of ten rows; were they neighbours, the rows would span 200.
    assert len({number // 10 for number in found}) in (20, 21)
    assert max(found) - min(found) > 1000


def test_files_of_one_handful_are_shuffled_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = numbered(tmp_path / "t.jsonl", 500)
    shrink(monkeypatch, place=100, handful=80)
    order = list(range(500))
    random.Random(3).shuffle(order)
    assert numbers(read(file, seed=3)) == order


@pytest.mark.parametrize("seed", [None, 0])
def test_no_more_is_read_than_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    file = Path(numbered(tmp_path / "t.jsonl", 5000))
    shrink(monkeypatch)
    opened, read_bytes = open, 0

    def counting(path: object, *args: object, **options: object) -> object:
        stream = opened(path, *args, **options)  # type: ignore[call-overload]

        class Counted:
            def __enter__(self) -> "Counted":
                return self

            def __exit__(self, *args: object) -> None:
                stream.close()

            def __getattr__(self, name: str) -> object:
                method = getattr(stream, name)

                def call(*args: object) -> object:
                    nonlocal read_bytes
                    got = method(*args)
                    read_bytes += len(got) if isinstance(got, bytes) else 0
                    return got

                return call

        return Counted()

    monkeypatch.setattr(sources, "open", counting, raising=False)
    assert len(numbers(read(str(file), seed=seed, sequences=5))) == 5
    assert 0 < read_bytes < 2000 < file.stat().st_size == 80_000


def test_lines_longer_than_a_place_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a" * 3, "b" * 1000, "c" * 3, "d" * 500, "e" * 3]
    file = documents(tmp_path / "t.jsonl", *texts)
    shrink(monkeypatch, place=50, handful=3)
    found = stream(read(file, seed=0, tokenizer=Letters(None, None)))
    assert sorted(found) == sorted(10 + ord(letter) - ord("a") for letter in "".join(texts))


@pytest.mark.parametrize("seed", [None, 0])
def test_wrong_line_of_a_large_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    file = Path(numbered(tmp_path / "t.jsonl", 300))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"\n" + b"".join(lines[:250]) + b"{nope\n" + b"".join(lines[250:]))
    shrink(monkeypatch)
    assert refusal_of(str(file), seed=seed).startswith(f"{file}, line 252: expected")
    file.write_bytes(b"".join(lines[:250]) + b'{"text": "\xff"}\n')
    assert refusal_of(str(file), seed=seed) == f"{file}, line 251: not UTF-8 text (invalid start byte)"


def test_what_lies_behind_the_text_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    file = Path(documents(tmp_path / "t.jsonl", *["abc"] * 10))
    with file.open("a") as lines:
        lines.write("{nope\n")
    assert len(read(str(file), sequences=10)) == 5
    assert refusal_of(str(file)).startswith(f"{file}, line 11: ")


def prose(tokens: int) -> str:
    """Return some text of the repository, with empty lines, indents and punctuation before line ends."""
    lines = (REFERENCE / "calibration.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    return (text * (1 + 4 * tokens // len(text)))[: 4 * tokens]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "txt.zst", "jsonl"])
def test_long_text_has_the_tokens_that_it_has_whole(tmp_path: Path, kind: str) -> None:
    tokenizer, text = AutoTokenizer.from_pretrained(REFERENCE), prose(100_000)
    longest, ids = 0, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def counting(text: str, **options: object) -> dict:
        nonlocal longest
        longest = max(longest, len(text))
        return tokenizer(text, **options)

    file = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        documents(file, text)
    else:
        file.write_bytes(text.encode() if kind == "txt" else packed_as(kind[4:], text.encode()))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "all_special_ids")}
    wrapped = type("Counting", (), special | {"__call__": staticmethod(counting)})()
    batches = read(str(file), tokenizer=wrapped, length=1000)
    assert stream(batches)[1:] == ids
    assert torch.cat([batch.position.flatten() for batch in batches]).tolist() == list(range(len(ids) + 1))
    assert longest <= 2**16
    # The key of a text is that of its first MiB.
    assert {int(batch.document.unique()) for batch in batches} == {document_key(text[: 2**20])}


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "a b" * 60_000, "\n" * 99_999 + "a", "ab\r\n" * 40_000, " " * 70_000 + "x"]
)
def test_long_text_without_good_places_to_cut_is_cut(tmp_path: Path, text: str) -> None:
    found = list(pieces(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= 2**16
    assert "".join(pieces(iter(text[at : at + 999] for at in range(0, len(text), 999)))) == text


def test_a_long_text_leaves_the_others_their_share(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a " * 300_000)
    second = documents(tmp_path / "b.jsonl", *["b" * 999] * 400)
    batches = read(str(tmp_path / "a.txt"), second, sequences=300, length=1000)
    ids = torch.tensor(stream(batches))
    share = int((ids == 11).sum()) / len(ids)
    # Portions have up to 65,536 tokens here.
    assert 0.35 < share < 0.65
    # The long text goes on where it was, without another BOS.
    from_long = torch.cat([b.position.flatten() for b in batches])[(ids == 10) | (ids == 9)]
    assert from_long.tolist() == list(range(1, len(from_long) + 1))


def packed_as(ending: str, content: bytes) -> bytes:
    if ending == "gz":
        return gzip.compress(content)
    arrow = pytest.importorskip("pyarrow")
    return arrow.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_packed_lines_are_read_like_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    file = Path(numbered(tmp_path / "t.jsonl", 300))
    packed = tmp_path / f"t.jsonl.{ending}"
    packed.write_bytes(packed_as(ending, file.read_bytes()))
    assert stream(read(str(packed))) == stream(read(str(file)))
    assert stream(read(str(packed), seed=5)) == stream(read(str(file), seed=5))
    # Larger than a handful, neighbours are shuffled: 25 rows of 16 bytes, then the next ones.
    shrink(monkeypatch)
    found = numbers(read(str(packed), seed=5))
    assert sorted(found) == list(range(300)) != found
    assert sorted(found[:25]) == list(range(25))


@pytest.mark.parametrize("text", ["t.jsonl", "t.txt"])
@pytest.mark.parametrize(
    ("ending", "damage"),
    # A frame of Zstandard need not have a checksum, and so what is flipped in it is not noticed.
    [("gz", "cut"), ("gz", "none"), ("gz", "flipped"), ("zst", "cut"), ("zst", "none")],
)
def test_damaged_packing_is_named(tmp_path: Path, text: str, ending: str, damage: str) -> None:
    name = f"{text}.{ending}"
    rows = "".join(json.dumps({"text": f"abc {number}"}) + "\n" for number in range(1000))
    whole = packed_as(ending, rows.encode())
    wrong = {"cut": whole[:-40], "none": b'{"text": "abc"}\n', "flipped": whole[:500] + b"\xff" * 9 + whole[509:]}
    (tmp_path / name).write_bytes(wrong[damage])
    assert refusal_of(str(tmp_path / name)).startswith(f"{tmp_path / name}: no whole {ending} file (")


@pytest.mark.parametrize("seed", [None, 4])
def test_row_groups_of_parquet_are_read_as_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["".join(chr(97 + number // 26**place % 26) for place in (2, 1, 0)) for number in range(1000)]
    file = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"text": texts, "domain": ["x"] * 1000}), file, row_group_size=50)
    whole = numbers(read(str(file), seed=seed))
    assert sorted(whole) == list(range(1000))
    assert whole == numbers(read(numbered(tmp_path / "t.jsonl", 1000), seed=seed))
    shrink(monkeypatch, place=1, handful=1)  # each group a handful of its own
    groups: list[int] = []
    taken = parquet.ParquetFile.iter_batches

    def counting(self: object, **options: object) -> object:
        groups.extend(options["row_groups"])  # type: ignore[arg-type]
        return taken(self, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counting)
    assert len(numbers(read(str(file), seed=seed, sequences=70))) == 70
    assert len(groups) == 2
    assert sorted(numbers(read(str(file), seed=seed))) == list(range(1000))


def test_parquet_holds_conversations_too(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}], "text": None},
        {"messages": None, "text": "de"},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    given = [{name: value for name, value in row.items() if value is not None} for row in rows]
    lines = jsonl(tmp_path / "t.jsonl", given)
    for tokenizer in (Letters(), Letters(template=template)):
        ours, theirs = (stream(read(str(file), tokenizer=tokenizer)) for file in (tmp_path / "t.parquet", lines))
        assert ours == theirs


# Batches of the caller and fingerprints


def test_batch_of_ids_counts_every_token() -> None:
    batch = Batch.of(torch.tensor([[3, 4], [3, 5], [3, 4]]))
    assert batch.counted.tolist() == [[True, True]] * 3
    assert batch.position.tolist() == [[0, 1]] * 3
    first, second, third = batch.document[:, 0].tolist()
    assert first == third != second


def test_batch_of_padded_ids_counts_what_is_not_padding() -> None:
    ids = torch.tensor([[3, 4, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = Batch.of(ids, mask)
    assert batch.counted.tolist() == mask.bool().tolist()
    assert batch.attention_mask is mask
    assert Batch.of(ids, torch.ones_like(ids)).attention_mask is None


def test_fingerprint_counts_and_notices_one_token() -> None:
    mask = torch.tensor([[1, 1, 0]])
    found = text_fingerprint([Batch.of(torch.tensor([[3, 4, 0]]), mask), Batch.of(torch.tensor([[5, 6]]))])
    assert (found["tokens"], found["counted"]) == (5, 4)
    same = text_fingerprint([Batch.of(torch.tensor([[3, 4, 0]]), mask), Batch.of(torch.tensor([[5, 6]]))])
    other = text_fingerprint([Batch.of(torch.tensor([[3, 4, 0]]), mask), Batch.of(torch.tensor([[5, 7]]))])
    assert same == found
    assert other["hash"] != found["hash"]


def test_text_of_other_domains_is_another_text() -> None:
    plain = Batch.of(torch.tensor([[3, 4, 5, 6]]))
    code = replace(plain, domain=torch.tensor([[0, 0, 1, 1]]), domains=("code", "prose"))
    numbered = replace(plain, domain=torch.tensor([[1, 1, 0, 0]]), domains=("prose", "code"))
    moved = replace(code, domain=torch.tensor([[0, 0, 0, 1]]))
    named = replace(code, domains=("code", "poems"))
    found = [text_fingerprint([batch])["hash"] for batch in (plain, code, numbered, moved, named)]
    assert found[1] == found[2]
    assert len(set(found)) == 4


# Text that cannot be used


def refusal_of(*data: str, max_length: int | None = None, **options: object) -> str:
    settings = {"sequences": None, "length": 4, "batch_size": 2} | options
    with pytest.raises(CalibrationError) as refusal:
        read_batches(TextOptions(data=data, **settings), Letters(), max_length=max_length)  # type: ignore[arg-type]
    return str(refusal.value)


@pytest.mark.parametrize(
    "line",
    [
        "{nope",
        '{"txt": "a"}',
        '{"text": null}',
        '{"text": 5}',
        '["text"]',
        '"text"',
        "5",
        "null",
        "ab",
        '{"text": "\\ud800"}',
        '{"prompt": "a"}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        "[" * 100_000,
    ],
)
def test_line_that_is_no_document_is_named_by_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "abcdefgh"}\n\n' + line + "\n")
    assert refusal_of(str(file)).startswith(f"{file}, line 3: expected a row with `messages`, with `prompt` and")


@pytest.mark.parametrize("name", ["t.jsonl", "t.txt"])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b'{"text": "abcdefgh"}\n{"text": "\xff\xfe"}\n')
    said = refusal_of(str(file))
    assert said.startswith(f"{file}")
    assert "UTF-8" in said


def test_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"nothing of the kind")
    assert refusal_of(str(tmp_path / "t.parquet")).startswith(f"{tmp_path / 't.parquet'}: ")


def test_parquet_with_a_row_without_text_is_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "t.parquet"
    for groups in (1, 2, 9):
        parquet.write_table(arrow.table({"text": ["abcdefgh"] * 4 + [None]}), file, row_group_size=groups)
        assert refusal_of(str(file)).startswith(f"{file}, row 5: expected a row with")


def test_parquet_without_text_lists_its_columns(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"content": ["a"], "id": [1]}), tmp_path / "t.parquet")
    assert refusal_of(str(tmp_path / "t.parquet")) == (
        f"{tmp_path / 't.parquet'}: has no column `messages` or `text`, nor both `prompt` and `completion`; "
        "it has content, id; --text-column names another"
    )


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n'])
def test_empty_text_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(content)
    assert refusal_of(str(file)) == f"--data {file}: holds no text"


def test_tiny_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", "ab")
    assert refusal_of(file) == f"{file}: 3 tokens of text, at least 4 are needed"
    assert refusal_of(file, length=2048) == f"{file}: 3 tokens of text, at least 64 are needed"


def test_text_of_exactly_the_least_is_enough(tmp_path: Path) -> None:
    assert stream(read(documents(tmp_path / "t.jsonl", "a" * 63), length=2048))[1:] == [10] * 63


def test_blocks_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    file = documents(tmp_path / "t.jsonl", "abcdefgh")
    said = refusal_of(file, length=65, max_length=64)
    assert said == "--length 65 is more than the model takes (64); use at most 64"
    assert read_batches(TextOptions(data=(file,), length=4, sequences=1), Letters(), max_length=4)


def test_no_text_at_all_is_refused() -> None:
    assert refusal_of() == "no text given; name at least one file with --data"


def test_folder_and_unknown_ending_are_refused(tmp_path: Path) -> None:
    assert refusal_of(str(tmp_path)) == f"--data {tmp_path}: is a folder; give .jsonl, .txt or .parquet files"
    (tmp_path / "t.csv").write_text("text")
    (tmp_path / "bare").write_text("text")
    known = "known are .parquet, .jsonl, .json, .txt, and the last three with .gz or .zst"
    assert refusal_of(str(tmp_path / "t.csv")) == f"--data {tmp_path / 't.csv'}: ends in .csv; {known}"
    assert refusal_of(str(tmp_path / "bare")) == f"--data {tmp_path / 'bare'}: ends in nothing; {known}"


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "0.0"])
def test_weight_that_is_not_positive_is_refused(tmp_path: Path, weight: str) -> None:
    entry = documents(tmp_path / "t.jsonl", "abcdefgh") + f":{weight}"
    assert refusal_of(entry) == f"--data {entry}: the weight {weight} is not positive"


def test_missing_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    missing = tmp_path / "no" / "such.jsonl"
    assert refusal_of(str(missing)).startswith(f"--data {missing}: neither a file nor a dataset that can be read (")


def test_whatever_breaks_while_a_dataset_is_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP libraries have exceptions of their own; a row that is none keeps its own words."""

    class HungUp(Exception):
        """What an HTTP library raises."""

    def broken(*given: object, **more: object) -> Iterator[dict]:
        yield {"text": "abcdefgh"}
        raise HungUp("the server hung up")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=broken))
    said = "neither a file nor a dataset that can be read (HungUp: the server hung up)"
    assert refusal_of("some/dataset") == f"--data some/dataset: {said}"
    rows = SimpleNamespace(load_dataset=lambda *given, **more: iter([{"text": 3}]))
    monkeypatch.setitem(sys.modules, "datasets", rows)
    assert refusal_of("some/dataset").startswith("--data some/dataset, row 1: ")


def test_missing_datasets_library_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal_of("some/dataset") == (
        "--data some/dataset: no such file; if it names a dataset, "
        "reading it needs the datasets library: pip install 'moetailor[datasets]'"
    )


def test_a_line_of_a_packed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl.zst").write_bytes(packed_as("zst", b'{"text": "ab"}\n' * 99 + b"{\n"))
    assert refusal_of(str(tmp_path / "t.jsonl.zst")).startswith(f"{tmp_path / 't.jsonl.zst'}, line 100: expected a row")


def test_missing_zstandard_library_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("t.jsonl.zst", "t.txt.zst"):
        (tmp_path / name).write_bytes(b"")
        assert refusal_of(str(tmp_path / name)) == (
            f"{tmp_path / name}: reading it needs the datasets library: pip install 'moetailor[datasets]'"
        )


def test_a_column_is_read_as_the_text(tmp_path: Path) -> None:
    """In place of the usual ones, whichever are there; domains are read as ever; null is no text."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"content": text, "text": "zz", "messages": None, "domain": "d"} for text in ("abcd", None, "ef")]
    usual = documents(tmp_path / "usual.jsonl", "abcd", "ef", domain="d")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    expected = read(usual)
    for file in (jsonl(tmp_path / "t.jsonl", rows), str(tmp_path / "t.parquet")):
        found = read(file, text_column="content")
        assert (stream(found), found[0].domains) == (stream(expected), ("d",))
    blocks = read_blocks(ExampleOptions(data=(file,), length=4, text_column="content"), Letters())
    assert blocks.input_ids.flatten().tolist() == stream(expected)[: len(blocks) * 4]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"body": "abcd", "id": 1}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    file = jsonl(tmp_path / "t.jsonl", rows)
    assert refusal_of(file, text_column="content") == f"{file}, line 1: has no column 'content'; it has 'body', 'id'"
    said = refusal_of(str(tmp_path / "t.parquet"), text_column="content")
    assert said == f"{tmp_path / 't.parquet'}: has no column 'content'; it has body, id"
    assert "--text-column names another" in refusal_of(str(tmp_path / "t.parquet"))
    assert "(or what --text-column names)" in refusal_of(file)


def test_missing_parquet_library_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    said = refusal_of(str(tmp_path / "t.parquet"))
    assert said.startswith(f"{tmp_path / 't.parquet'}: ")
    assert said.endswith("pip install 'moetailor[datasets]'")


def test_second_source_is_read_before_anything_runs(tmp_path: Path) -> None:
    good = documents(tmp_path / "good.jsonl", "abcdefgh")
    (tmp_path / "bad.jsonl").write_text("{nope\n")
    # Also where the first source alone would do.
    for sequences in (None, 1):
        said = refusal_of(good, str(tmp_path / "bad.jsonl"), sequences=sequences)
        assert said.startswith(f"{tmp_path / 'bad.jsonl'}, line 1: ")


@pytest.mark.parametrize("name", ["json", "text", "csv", "parquet", "@train", ",", ""])
def test_names_that_mean_the_files_at_hand_are_no_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The datasets library would read whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    for kind in ("json", "txt", "csv"):
        (tmp_path / f"notes.{kind}").write_text('{"text": "private"}\n')
    with pytest.raises(CalibrationError, match="names neither a file nor a dataset" if name else "is a folder"):
        read(name)


def test_a_pipe_is_not_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.txt")
    with pytest.raises(CalibrationError, match=r"text\.txt: is no ordinary file"):
        read(str(tmp_path / "text.txt"))


def test_null_says_nothing_whatever_the_file(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"messages": None, "text": "abcd"}, {"messages": None, "text": "efgh"}]
    lines = jsonl(tmp_path / "t.jsonl", rows)
    kind = pyarrow.schema([("messages", pyarrow.list_(pyarrow.string())), ("text", pyarrow.string())])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=kind), tmp_path / "t.parquet")
    assert stream(read(lines)) == stream(read(str(tmp_path / "t.parquet")))


@pytest.mark.parametrize(
    ("asked", "taken", "expected"),
    [(None, 512, 512), (None, 4096, 2048), (None, None, 2048), (64, 512, 64), (64, None, 64)],
)
def test_blocks_are_as_long_as_usual_or_as_the_model_takes(asked: int | None, taken: int | None, expected: int) -> None:
    assert length_of(asked, taken) == expected


def test_what_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(CalibrationError, match="--length 513 is more than the model takes"):
        length_of(513, 512)


def test_a_run_without_a_length_is_the_run_with_the_one_that_it_takes(tmp_path: Path) -> None:
    """The reference model takes 512 positions; the second call finds the first one's work."""
    options = {"data": (str(REFERENCE / "heldout.jsonl"),), "sequences": 1}
    first = calibrate(REFERENCE, tmp_path / "calib", text=TextOptions(**options))
    assert first.fingerprint["text"]["shapes"] == [[1, 512]]
    again = calibrate(REFERENCE, tmp_path / "calib", text=TextOptions(**options, length=512))
    assert "text_column" not in first.fingerprint["options"]
    assert again.fingerprint == first.fingerprint
