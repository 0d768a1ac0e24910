"""calibration/text.py: documents packed by hand, and text that cannot be used named by file and line."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moetailor.calibration.batch import Batch, load_batches, save_batches, text_fingerprint
from moetailor.calibration.text import TextOptions, read_batches
from moetailor.errors import CalibrationError
from support.letters import Letters
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
        [{"text": "a", "domain": "code"}, {"text": "b"}, {"text": "c", "domain": "code"}, {"text": "d", "domain": 7}],
    )
    batches = read(file, length=8)
    assert [batch.domains for batch in batches] == [("code", "", "7")]
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


# Text that cannot be used


def refusal_of(*data: str, max_length: int | None = None, **options: object) -> str:
    settings = {"sequences": None, "length": 4, "batch_size": 2} | options
    with pytest.raises(CalibrationError) as refusal:
        read_batches(TextOptions(data=data, **settings), Letters(), max_length=max_length)  # type: ignore[arg-type]
    return str(refusal.value)


@pytest.mark.parametrize(
    "line",
    ["{nope", '{"txt": "a"}', '{"text": null}', '{"text": 5}', '["text"]', '"text"', "5", "null", "ab"],
)
def test_line_that_is_no_document_is_named_by_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "abcdefgh"}\n\n' + line + "\n")
    assert refusal_of(str(file)).startswith(f"{file}, line 3: expected a JSON object with a string `text`")


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
    parquet.write_table(arrow.table({"text": ["abcdefgh", None]}), tmp_path / "t.parquet")
    assert refusal_of(str(tmp_path / "t.parquet")).startswith(f"{tmp_path / 't.parquet'}, row 2: ")


def test_parquet_without_text_lists_its_columns(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"content": ["a"], "id": [1]}), tmp_path / "t.parquet")
    assert refusal_of(str(tmp_path / "t.parquet")) == (
        f"{tmp_path / 't.parquet'}: has no column `text`; it has content, id"
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
    known = "known are .jsonl, .json, .txt, .parquet"
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


def test_missing_datasets_library_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal_of("some/dataset") == (
        "--data some/dataset: no such file; if it names a dataset, "
        "reading it needs the datasets library: pip install 'moetailor[datasets]'"
    )


def test_missing_parquet_library_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    said = refusal_of(str(tmp_path / "t.parquet"))
    assert said.startswith(f"{tmp_path / 't.parquet'}: ")
    assert said.endswith("pip install 'moetailor[datasets]'")


def test_second_source_is_read_before_anything_runs(tmp_path: Path) -> None:
    good = documents(tmp_path / "good.jsonl", "abcdefgh")
    (tmp_path / "bad.jsonl").write_text("{nope\n")
    assert f"{tmp_path / 'bad.jsonl'}, line 1" in refusal_of(good, str(tmp_path / "bad.jsonl"))
