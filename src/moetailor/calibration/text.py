"""Text to token batches: documents from files or a dataset, mixed by weight, packed into blocks without padding.

Shapes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from moetailor.calibration.batch import Batch, document_key
from moetailor.errors import CalibrationError

T = TypeVar("T")
DATASETS_HINT = "reading it needs the datasets library: pip install 'moetailor[datasets]'"


@dataclass(frozen=True)
class Document:
    """One text and the domain it is counted under (empty when the source names none)."""

    text: str
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text to read and how to cut it.

    Attributes:
        data: sources, each ``FILE[:weight]`` or a name for the datasets library, ``NAME[,CONFIG][@SPLIT][:weight]``.
        sequences: how many blocks to take; all there are when None.
        length: tokens of a block.
        seed: shuffles the documents of each source; file order when None.
        mask_special: leave the tokenizer's special tokens out of every statistic.
        batch_size: blocks of a batch.
    """

    data: tuple[str, ...]
    sequences: int | None = 128
    length: int = 2048
    seed: int | None = None
    mask_special: bool = False
    batch_size: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", words_of(self.data))


def words_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return words that a caller gave in whatever holds them; a single one may stand for itself."""
    return (given,) if isinstance(given, str) else tuple(given)


def read_batches(
    options: TextOptions, tokenizer: Any, *, max_length: int | None = None, words: int | None = None
) -> list[Batch]:
    """Read, tokenize, mix and pack text.

    Each document is preceded by the tokenizer's BOS token (EOS where it has no BOS), the documents follow each other,
    and the stream is cut into blocks of `length`; when the text ends first, what is left becomes a shorter block, so
    nothing is ever padded.

    Args:
        options: sources and sizes.
        tokenizer: a transformers tokenizer.
        max_length: the longest sequence the model takes, if it says.
        words: how many words the model has, if known.

    Raises:
        CalibrationError: no or too little text, an unreadable source, or blocks longer than the model takes.
    """
    check_length(options.length, max_length)
    if not options.data:
        raise CalibrationError("no text given; name at least one file with --data")
    stream = _TokenStream(tokenizer)
    need = None if options.sequences is None else options.sequences * options.length
    for document in _mixed(options, stream):
        stream.add(document)
        if need is not None and stream.length >= need:
            break
    least = min(options.length, 64)
    if stream.length < least:
        raise CalibrationError(
            f"{', '.join(options.data)}: {stream.length} tokens of text, at least {least} are needed"
        )
    batches = stream.batches(options, need)
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if words is not None and largest >= words:
        raise CalibrationError(
            f"the tokenizer gives word {largest}, the model has {words}; put the tokenizer of the original beside it"
        )
    return batches


class _TokenStream:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.domains: dict[str, int] = {}
        self.ids: list[torch.Tensor] = []
        self.documents: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.domain: list[torch.Tensor] = []
        self.length = 0

    def add(self, document: Document) -> None:
        ids = self.encode(document)
        domain = self.domains.setdefault(document.domain, len(self.domains))
        self.ids.append(torch.tensor(ids))
        self.documents.append(torch.full((len(ids),), document_key(document.text)))
        self.positions.append(torch.arange(len(ids)))
        self.domain.append(torch.full((len(ids),), domain))
        self.length += len(ids)

    def encode(self, document: Document) -> list[int]:
        ids = self.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if self.first is None else [self.first, *ids]

    def batches(self, options: TextOptions, need: int | None) -> list[Batch]:
        end = self.length if need is None else min(need, self.length)
        parts = [torch.cat(part)[:end] for part in (self.ids, self.documents, self.positions, self.domain)]
        special = (
            torch.tensor(sorted(self.tokenizer.all_special_ids))
            if options.mask_special
            else torch.empty(0, dtype=torch.long)
        )
        full = end // options.length
        starts = list(range(0, full * options.length, options.batch_size * options.length))
        cuts = [
            (start, min(start + options.batch_size * options.length, full * options.length), options.length)
            for start in starts
        ]
        if end > full * options.length:
            cuts.append((full * options.length, end, end - full * options.length))
        batches = []
        for start, stop, length in cuts:
            ids, document, position, domain = (part[start:stop].view(-1, length) for part in parts)
            batches.append(
                Batch(
                    input_ids=ids,
                    counted=~torch.isin(ids, special),
                    attention_mask=None,
                    document=document,
                    position=position,
                    domain=domain,
                    domains=tuple(self.domains),
                )
            )
        return batches


def _mixed(options: TextOptions, stream: _TokenStream) -> Iterator[Document]:
    """Take the next document from the source that is furthest behind its share of the tokens."""
    names, weights = zip(*(_split_weight(entry) for entry in options.data), strict=True)
    sources = [iter(documents(name, options.seed)) for name in names]
    taken = [0.0] * len(sources)
    alive = list(range(len(sources)))
    while alive:
        behind = min(alive, key=lambda number: (taken[number] / weights[number], number))
        document = next(sources[behind], None)
        if document is None:
            alive.remove(behind)
            continue
        before = stream.length
        yield document
        taken[behind] += stream.length - before


def _split_weight(entry: str) -> tuple[str, float]:
    name, colon, weight = entry.rpartition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:
        return entry, 1.0
    if not colon:
        return entry, 1.0
    if not value > 0:
        raise CalibrationError(f"--data {entry}: the weight {weight} is not positive")
    return name, value


def files_of(data: Iterable[str]) -> list[Path]:
    """Return the files among the sources of a text."""
    names = (Path(_split_weight(entry)[0]) for entry in data)
    return [path for path in names if path.exists()]


def check_length(length: int, max_length: int | None) -> None:
    """Refuse blocks longer than a model takes, if it says.

    Raises:
        CalibrationError: see the message.
    """
    if max_length is not None and length > max_length:
        raise CalibrationError(
            f"--length {length} is more than the model takes ({max_length}); use at most {max_length}"
        )


def documents(name: str, seed: int | None = None) -> Iterable[Document]:
    """Return the texts of one source.

    Args:
        name: a file, or a name for the datasets library.
        seed: shuffles them; file order when None.

    Raises:
        CalibrationError: the source cannot be read or holds no text.
    """
    path = Path(name)
    if not path.exists():
        return _hub_documents(name, seed)
    if path.is_dir():
        raise CalibrationError(f"--data {name}: is a folder; give .jsonl, .txt or .parquet files")
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".txt": _txt, ".parquet": _parquet}
    if path.suffix not in readers:
        raise CalibrationError(f"--data {name}: ends in {path.suffix or 'nothing'}; known are {', '.join(readers)}")
    found = [document for document in readers[path.suffix](path) if document.text.strip()]
    if not found:
        raise CalibrationError(f"--data {name}: holds no text")
    if seed is not None:
        random.Random(seed).shuffle(found)
    return found


def read_lines(path: Path, read: Callable[[Any], T], expected: str) -> Iterator[T]:
    """Yield what each line of a JSONL file is read as; blank lines are left out.

    Args:
        path: the file.
        read: makes something of a line's JSON.
        expected: what a line should be, for the message.

    Raises:
        CalibrationError: a line is not what was expected, or the file is not UTF-8.
    """
    with _utf8(path), open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                made = read(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(f"{path}, line {number}: expected {expected} ({error!r})") from None
            yield made


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _jsonl(path: Path) -> Iterator[Document]:
    return read_lines(path, _document, "a JSON object with a string `text`")


def _txt(path: Path) -> Iterator[Document]:
    with _utf8(path):
        yield Document(path.read_text(encoding="utf-8"))


def _parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(f"{path}: {DATASETS_HINT}") from None
    try:
        table = parquet.ParquetFile(path)
    except ValueError as error:
        raise CalibrationError(f"{path}: not a Parquet file ({str(error).strip().splitlines()[0]})") from None
    columns = [name for name in ("text", "domain") if name in table.schema_arrow.names]
    if "text" not in columns:
        raise CalibrationError(f"{path}: has no column `text`; it has {', '.join(table.schema_arrow.names)}")
    rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        try:
            yield _document(row)
        except TypeError as error:
            raise CalibrationError(f"{path}, row {number}: {error}") from None


def _hub_documents(name: str, seed: int | None) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(f"--data {name}: no such file; if it names a dataset, {DATASETS_HINT}") from None
    rest, _, split = name.partition("@")
    dataset, _, config = rest.partition(",")
    try:
        rows = load_dataset(dataset, config or None, split=split or "train", streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=10_000)
        yield from (_document(row) for row in rows)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"--data {name}: neither a file nor a dataset that can be read ({reason})") from None


def _document(row: dict) -> Document:
    if not isinstance(row["text"], str):
        raise TypeError("text is not a string")
    return Document(row["text"], str(row.get("domain") or ""))
