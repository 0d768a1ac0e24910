"""Rows of text data, read as they are asked for: JSONL, plain text, Parquet, or a dataset of the datasets library.

A file of any size costs what is taken from it. In file order nothing is read ahead. With a seed a file is read by the
handful: some of its places, drawn at random and shuffled together, then the next ones. One handful is 4 MiB, so smaller
files are shuffled whole. The same seed gives the same rows in the same order.
"""

from __future__ import annotations

import gzip
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

from moetailor.errors import CalibrationError, reason_of

DATASETS_HINT = "reading it needs the datasets library: pip install 'moetailor[datasets]'"
EXPECTED = "a row with `messages`, with `prompt` and `completion`, or with `text`"
TEXT_FIELDS = ("messages", "prompt", "completion", "text")
FIELDS = (*TEXT_FIELDS, "domain")
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


def _row(fields: dict[str, Any], where: Callable[[], str]) -> Row:
    """Return a row with what it gives: null says nothing."""
    return Row({name: value for name, value in fields.items() if name in FIELDS and value is not None}, where)


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


def rows(name: str, seed: int | None = None) -> Iterator[Row]:
    """Yield the rows of a source; rows of blank text are left out.

    Args:
        name: a file, or a name for the datasets library.
        seed: shuffles them; file order when None.

    Raises:
        CalibrationError: the source cannot be read or holds no text.
    """
    draw, empty = random.Random(seed), True
    for handful in _open(name, seed):
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
    return path if path.is_file() and _ending(path).removesuffix(".gz") == ".txt" else None


def blocks(path: Path) -> Iterator[str]:
    """Yield a plain text, plain or in gzip, block by block.

    Raises:
        CalibrationError: it is not UTF-8 or not gzip.
    """
    with _readable(path), _opened(path, "rt", encoding="utf-8") as text:
        while block := text.read(BLOCK):
            yield block


def _ending(path: Path) -> str:
    packed = ".gz" if path.suffix.lower() == ".gz" else ""
    return (path.with_suffix("") if packed else path).suffix.lower() + packed


def _open(name: str, seed: int | None) -> Iterator[Iterable[Row]]:
    """Return the handfuls of a source."""
    path = Path(name)
    if not path.exists():
        return iter([_dataset(name, seed)])
    if path.is_dir():
        raise CalibrationError(f"--data {name}: is a folder; give .jsonl, .txt or .parquet files")
    if not path.is_file():
        raise CalibrationError(f"--data {name}: is no ordinary file, and is read more than once; save it as one first")
    readers = {".jsonl": _lines, ".json": _lines, ".parquet": _parquet}
    readers |= {".jsonl.gz": _packed_lines, ".json.gz": _packed_lines}
    if _ending(path) not in readers:
        known = ".jsonl, .json, .txt, .parquet, .jsonl.gz, .json.gz, .txt.gz"
        raise CalibrationError(f"--data {name}: ends in {_ending(path) or 'nothing'}; known are {known}")
    return readers[_ending(path)](path, seed)


def _lines(path: Path, seed: int | None) -> Iterator[Iterable[Row]]:
    size = path.stat().st_size
    if seed is None:
        yield _lines_of(path, 0, None)
        return
    places = list(range(0, size, PLACE))
    random.Random(f"places {seed}").shuffle(places)
    for at in range(0, len(places), HANDFUL):
        yield (row for start in sorted(places[at : at + HANDFUL]) for row in _lines_of(path, start, start + PLACE))


def _lines_of(path: Path, start: int, stop: int | None) -> Iterator[Row]:
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
        yield from _json_lines(path, lines, start, stop)


def _packed_lines(path: Path, seed: int | None) -> Iterator[Iterable[Row]]:
    """Read what has no middle to begin in: neighbours are shuffled."""
    with _readable(path), gzip.open(path, "rb") as lines:
        while lines.peek(1):
            yield _json_lines(path, lines, lines.tell(), None if seed is None else lines.tell() + HANDFUL * PLACE)


def _json_lines(path: Path, lines: Any, start: int, stop: int | None) -> Iterator[Row]:
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
                yield _row(fields, where)


def _line_number(path: Path, offset: int) -> str:
    """Say which line begins at a byte; asked for in messages only, since it reads all lines before."""
    before = 0
    with _opened(path, "rb") as lines:
        while offset > 0 and (block := lines.read(min(offset, 2**20))):
            before, offset = before + block.count(b"\n"), offset - len(block)
    return f"{path}, line {before + 1}"


def _parquet(path: Path, seed: int | None) -> Iterator[Iterable[Row]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(f"{path}: {DATASETS_HINT}") from None
    with _readable(path):
        file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    columns = [name for name in FIELDS if name in names]
    if not {"messages", "text"} & set(columns) and not {"prompt", "completion"} <= set(columns):
        raise CalibrationError(
            f"{path}: has no column `messages` or `text`, nor both `prompt` and `completion`; it has {', '.join(names)}"
        )
    groups = list(range(file.num_row_groups))
    if seed is not None:
        random.Random(f"places {seed}").shuffle(groups)
    while groups:
        taken, nbytes = [], 0
        while groups and (seed is None or nbytes < HANDFUL * PLACE):
            taken.append(groups.pop(0))
            nbytes += file.metadata.row_group(taken[-1]).total_byte_size
        yield _parquet_rows(path, file, columns, sorted(taken))


def _parquet_rows(path: Path, file: Any, columns: list[str], groups: list[int]) -> Iterator[Row]:
    for group in groups:
        number = sum(file.metadata.row_group(before).num_rows for before in range(group))
        with _readable(path):
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield _row(fields, partial("{}, row {}".format, path, number))


def _dataset(name: str, seed: int | None) -> Iterator[Row]:
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
            yield _row(fields, partial("--data {}, row {}".format, name, number))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        told = f"neither a file nor a dataset that can be read ({reason_of(error)})"
        raise CalibrationError(f"--data {name}: {told}") from None


def _opened(path: Path, mode: str, **options: Any) -> Any:
    return gzip.open(path, mode, **options) if path.suffix.lower() == ".gz" else open(path, mode, **options)


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
