"""Rows of text data, read as they are asked for: JSONL, plain text, Parquet, or a dataset of the datasets library.

A file of any size costs what is taken from it. In file order nothing is read ahead. With a seed a file is read by the
handful: some of its places, drawn at random and shuffled together, then the next ones. One handful is 4 MiB, so smaller
files are shuffled whole. The same seed gives the same rows in the same order.
"""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moetailor.calibration.packed import DATASETS_HINT, PACKED, opened
from moetailor.errors import CalibrationError, reason_of

EXPECTED = "a row with `messages`, with `prompt` and `completion`, or with `text` (or what --text-column names)"
TEXT_FIELDS = ("messages", "prompt", "completion", "text")
FIELDS = (*TEXT_FIELDS, "domain")
# Endings of files that may be packed.
LINES = (".jsonl", ".json", ".txt")
# Bytes of one place of a shuffled file, and how many places are a handful.
PLACE, HANDFUL = 2**16, 64
# Rows of a dataset that are shuffled together, and characters of a block of plain text.
BUFFER, BLOCK = 10_000, 2**16


@dataclass(frozen=True)
class Row:
    """What one row of a source says, and where it stands, for messages."""

    fields: dict[str, Any]
    where: Callable[[], str]

    @property
    def blank(self) -> bool:
        """Whether its text is there and empty."""
        given = [self.fields[name] for name in TEXT_FIELDS if name in self.fields]
        return bool(given) and all(isinstance(text, str) and not text.strip() for text in given)


class _Columns:
    """The columns that are read.

    Args:
        text: the one that holds text; the usual ones, whatever they hold, when None.
    """

    def __init__(self, text: str | None) -> None:
        self.text = text
        self.named = {name: name for name in FIELDS} if text is None else {"domain": "domain", text: "text"}

    def row(self, fields: dict[str, Any], where: Callable[[], str]) -> Row:
        """Return a row with what it gives: null says nothing."""
        if self.text is not None and self.text not in fields:
            raise CalibrationError(f"{where()}: has no column {self.text!r}; it has {', '.join(map(repr, fields))}")
        found = {known: fields[name] for name, known in self.named.items() if fields.get(name) is not None}
        return Row(found if self.text is None else {"text": "", **found}, where)


@contextmanager
def expected(where: Callable[[], str], what: str = EXPECTED) -> Iterator[None]:
    """Say where a row stands that is not what was expected.

    Args:
        where: says it, when it is asked.
        what: what was expected.

    Raises:
        CalibrationError: what was done meanwhile went wrong with the row.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where()}: not UTF-8 text ({error.reason})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CalibrationError(f"{where()}: expected {what} ({error!r})") from None


def rows(name: str, seed: int | None = None, text_column: str | None = None) -> Iterator[Row]:
    """Yield the rows of a source; rows of blank text are left out.

    Args:
        name: a file, or a name for the datasets library.
        seed: shuffles them; file order when None.
        text_column: the column that holds the text; the usual ones when None.

    Raises:
        CalibrationError: the source cannot be read or holds no text.
    """
    draw, empty = random.Random(seed), True
    for handful in _open(name, seed, _Columns(text_column)):
        found = (row for row in handful if not row.blank)
        if seed is not None:
            found = list(found)
            draw.shuffle(found)
        for row in found:
            empty = False
            yield row
    if empty:
        raise CalibrationError(f"--data {name}: holds no text")


def plain_text(name: str) -> Path | None:
    """Return the path of a source that is one plain text."""
    path = Path(name)
    return path if path.is_file() and _ending(path) in {f".txt{packed}" for packed in ("", *PACKED)} else None


def blocks(path: Path) -> Iterator[str]:
    """Yield a plain text, packed or not, block by block.

    Raises:
        CalibrationError: it is not UTF-8, or not packed as its name says.
    """
    with _readable(path), io.TextIOWrapper(opened(path), encoding="utf-8") as text:
        while block := text.read(BLOCK):
            yield block


def named_as_file(path: Path) -> bool:
    """Say whether a source is named as files of text are, and as no dataset is."""
    return path.is_absolute() or _ending(path) in {".parquet", *(kind + p for kind in LINES for p in ("", *PACKED))}


def _ending(path: Path) -> str:
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (path.with_suffix("") if packed else path).suffix.lower() + packed


def _open(name: str, seed: int | None, columns: _Columns) -> Iterator[Iterable[Row]]:
    """Return the handfuls of a source."""
    path = Path(name)
    if not path.exists():
        return iter([_dataset(name, seed, columns)])
    if path.is_dir():
        raise CalibrationError(f"--data {name}: is a folder; give .jsonl, .txt or .parquet files")
    if not path.is_file():
        raise CalibrationError(f"--data {name}: is no ordinary file, and is read more than once; save it as one first")
    readers = {".jsonl": _lines, ".json": _lines, ".parquet": _parquet}
    readers |= {lines + packed: _packed_lines for lines in (".jsonl", ".json") for packed in PACKED}
    if _ending(path) not in readers:
        known = f".parquet, .jsonl, .json, .txt, and the last three with {' or '.join(PACKED)}"
        raise CalibrationError(f"--data {name}: ends in {_ending(path) or 'nothing'}; known are {known}")
    return readers[_ending(path)](path, seed, columns)


def _lines(path: Path, seed: int | None, columns: _Columns) -> Iterator[Iterable[Row]]:
    size = path.stat().st_size
    if seed is None:
        yield _lines_of(path, 0, None, columns)
        return
    places = list(range(0, size, PLACE))
    random.Random(f"places {seed}").shuffle(places)
    for at in range(0, len(places), HANDFUL):
        yield (
            row for start in sorted(places[at : at + HANDFUL]) for row in _lines_of(path, start, start + PLACE, columns)
        )


def _lines_of(path: Path, start: int, stop: int | None, columns: _Columns) -> Iterator[Row]:
    """Yield the rows whose lines begin in a part of a file."""
    with open(path, "rb") as lines:
        if start:
            # The byte before tells whether a line begins at the first one; lines longer than the part are not read.
            lines.seek(start - 1)
            begins = lines.read(PLACE + 1).find(b"\n") + 1
            if not begins:
                return
            start += begins - 1
            lines.seek(start)
        yield from _json_lines(path, lines, start, stop, columns)


def _packed_lines(path: Path, seed: int | None, columns: _Columns) -> Iterator[Iterable[Row]]:
    """Read what has no middle to begin in: neighbours are shuffled."""
    with _readable(path), opened(path) as lines:
        while lines.peek(1):
            stop = None if seed is None else lines.tell() + HANDFUL * PLACE
            yield _json_lines(path, lines, lines.tell(), stop, columns)


def _json_lines(path: Path, lines: Any, start: int, stop: int | None, columns: _Columns) -> Iterator[Row]:
    """Yield the rows whose lines begin between two bytes, from where the file stands."""
    with _readable(path):
        while (stop is None or start < stop) and (line := lines.readline()):
            where = partial(_line_number, path, start)
            start += len(line)
            if line.strip():
                with expected(where):
                    fields = json.loads(line.decode())
                    if not isinstance(fields, dict):
                        raise TypeError("not an object")
                yield columns.row(fields, where)


def _line_number(path: Path, offset: int) -> str:
    """Say which line begins at a byte; asked for in messages only, since it reads all lines before."""
    before = 0
    with opened(path) as lines:
        while offset > 0 and (block := lines.read(min(offset, 2**20))):
            before, offset = before + block.count(b"\n"), offset - len(block)
    return f"{path}, line {before + 1}"


def _parquet(path: Path, seed: int | None, columns: _Columns) -> Iterator[Iterable[Row]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(f"{path}: {DATASETS_HINT}") from None
    with _readable(path):
        file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    read = [name for name in columns.named if name in names]
    if columns.text is not None and columns.text not in read:
        raise CalibrationError(f"{path}: has no column {columns.text!r}; it has {', '.join(names)}")
    if columns.text is None and not {"messages", "text"} & set(read) and not {"prompt", "completion"} <= set(read):
        raise CalibrationError(
            f"{path}: has no column `messages` or `text`, nor both `prompt` and `completion`; "
            f"it has {', '.join(names)}; --text-column names another"
        )
    groups = list(range(file.num_row_groups))
    if seed is not None:
        random.Random(f"places {seed}").shuffle(groups)
    while groups:
        taken, nbytes = [], 0
        while groups and (seed is None or nbytes < HANDFUL * PLACE):
            taken.append(groups.pop(0))
            nbytes += file.metadata.row_group(taken[-1]).total_byte_size
        yield _parquet_rows(path, file, columns, read, sorted(taken))


def _parquet_rows(path: Path, file: Any, columns: _Columns, read: list[str], groups: list[int]) -> Iterator[Row]:
    for group in groups:
        number = sum(file.metadata.row_group(before).num_rows for before in range(group))
        with _readable(path):
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=read):
                for fields in batch.to_pylist():
                    number += 1
                    yield columns.row(fields, partial("{}, row {}".format, path, number))


def _dataset(name: str, seed: int | None, columns: _Columns) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(f"--data {name}: no such file; if it names a dataset, {DATASETS_HINT}") from None
    rest, _, split = name.partition("@")
    dataset, _, config = rest.partition(",")
    if not dataset or (dataset.isidentifier() and find_spec(f"datasets.packaged_modules.{dataset}")):
        # The library takes its readers' names for the files of the working directory.
        raise CalibrationError(f"--data {name}: names neither a file nor a dataset")
    try:
        found = load_dataset(dataset, config or None, split=split or "train", streaming=True)
        if seed is not None:
            found = found.shuffle(seed=seed, buffer_size=BUFFER)
        for number, fields in enumerate(found, start=1):
            yield columns.row(fields, partial("--data {}, row {}".format, name, number))
    except CalibrationError:  # a row of it
        raise
    except Exception as error:  # whatever the libraries of the day raise, for files and for HTTP
        told = f"neither a file nor a dataset that can be read ({reason_of(error)})"
        raise CalibrationError(f"--data {name}: {told}") from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say which file is damaged; what its reader raises is a ValueError, too."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text ({error.reason})") from None
    except (ValueError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, with a reason of its own
        raise CalibrationError(
            f"{path}: no whole {_ending(path).rpartition('.')[2]} file ({reason_of(error)})"
        ) from None
