"""Text to token batches: documents of all sources, mixed by weight, packed into blocks without padding.

Shapes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.sources import named_as_file
from moetailor.calibration.spans import Document, Encoder, documents
from moetailor.errors import CalibrationError

# Tokens of a block where nothing else is said and the model takes as many.
LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text to read and how to cut it.

    Attributes:
        data: sources, each ``FILE[:weight]`` or a name for the datasets library, ``NAME[,CONFIG][@SPLIT][:weight]``.
        sequences: how many blocks to take; all there are when None.
        length: tokens of a block; 2048, or as many as the model takes if it takes fewer, when None.
        seed: shuffles the documents of each source: a file up to 4 MiB as a whole, a larger one by 64 places of 64 KiB
            at a time, drawn from all of it (whole row groups of Parquet; in .gz 4 MiB after 4 MiB); file order when
            None.
        mask_special: leave the tokenizer's special tokens out of every statistic.
        batch_size: blocks of a batch.
        text_column: the column of a row that holds its text; the usual ones when None.

    Raises:
        CalibrationError: a number that means nothing.
    """

    data: tuple[str, ...]
    sequences: int | None = 128
    length: int | None = None
    seed: int | None = None
    mask_special: bool = False
    batch_size: int = 4
    text_column: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", words_of(self.data))
        for name in ("sequences", "length", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise CalibrationError(f"--{name.replace('_', '-')} {value}: is not 1 or more")


def words_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return words that a caller gave in whatever holds them; a single one may stand for itself."""
    return (given,) if isinstance(given, str) else tuple(given)


def read_batches(
    options: TextOptions, tokenizer: Any, *, max_length: int | None = None, vocab_size: int | None = None
) -> list[Batch]:
    """Read, tokenize, mix and pack text, no more of it than was asked for.

    Rows are written as `spans` says. The documents follow each other, and the stream is cut into blocks of `length`;
    when the text ends first, what is left becomes a shorter block, so nothing is ever padded.

    Args:
        options: sources and sizes.
        tokenizer: a transformers tokenizer.
        max_length: the longest sequence the model takes, if it says.
        vocab_size: of the model, if known.

    Raises:
        CalibrationError: no or too little text, an unreadable source, or blocks longer than the model takes.
    """
    length = length_of(options.length, max_length)
    if not options.data:
        raise CalibrationError("no text given; name at least one file with --data")
    stream = _TokenStream(tokenizer)
    need = None if options.sequences is None else options.sequences * length
    for portion in _mixed(options, stream):
        stream.add(portion)
        if need is not None and stream.length >= need:
            break
    least = min(length, 64)
    if stream.length < least:
        raise CalibrationError(
            f"{', '.join(options.data)}: {stream.length} tokens of text, at least {least} are needed"
        )
    batches = stream.batches(options, length, need)
    check_vocabulary(max(int(batch.input_ids.max()) for batch in batches), vocab_size)
    return batches


class Portion(NamedTuple):
    """Tokens of a document, or of a part of a long one: the first of them is token `start` of it."""

    document: Document
    start: int
    ids: list[int]


class _TokenStream:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.domains: dict[str, int] = {}
        self.ids: list[torch.Tensor] = []
        self.documents: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.domain: list[torch.Tensor] = []
        self.length = 0

    def add(self, portion: Portion) -> None:
        count = len(portion.ids)
        domain = self.domains.setdefault(portion.document.domain, len(self.domains))
        self.ids.append(torch.tensor(portion.ids))
        self.documents.append(torch.full((count,), portion.document.key))
        self.positions.append(torch.arange(portion.start, portion.start + count))
        self.domain.append(torch.full((count,), domain))
        self.length += count

    def batches(self, options: TextOptions, length: int, need: int | None) -> list[Batch]:
        end = self.length if need is None else min(need, self.length)
        parts = [torch.cat(part)[:end] for part in (self.ids, self.documents, self.positions, self.domain)]
        special = (
            torch.tensor(sorted(self.tokenizer.all_special_ids))
            if options.mask_special
            else torch.empty(0, dtype=torch.long)
        )
        whole = end // length * length
        starts = range(0, whole, options.batch_size * length)
        cuts = [(start, min(start + options.batch_size * length, whole), length) for start in starts]
        if end > whole:
            cuts.append((whole, end, end - whole))
        batches = []
        for start, stop, each in cuts:
            ids, document, position, domain = (part[start:stop].view(-1, each) for part in parts)
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


def _mixed(options: TextOptions, stream: _TokenStream) -> Iterator[Portion]:
    """Take the next portion from the source that is furthest behind its share of the tokens."""
    names, weights = zip(*(_split_weight(entry) for entry in options.data), strict=True)
    found = [documents(name, stream.tokenizer, seed=options.seed, text_column=options.text_column) for name in names]
    # The first of each is read before anything is done, also of a source that will not be needed.
    sources = [_portions(chain([next(each)], each), stream.encoder) for each in found]
    taken = [0.0] * len(sources)
    alive = list(range(len(sources)))
    while alive:
        behind = min(alive, key=lambda number: (taken[number] / weights[number], number))
        portion = next(sources[behind], None)
        if portion is None:
            alive.remove(behind)
            continue
        taken[behind] += len(portion.ids)
        yield portion


def _portions(found: Iterable[Document], encoder: Encoder) -> Iterator[Portion]:
    for document in found:
        start = 0
        for ids, _ in encoder.portions(document):
            yield Portion(document, start, ids)
            start += len(ids)


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
    """Return the files among the sources of a text, which is not read.

    Raises:
        CalibrationError: one that is named as files are is not there.
    """
    paths = [Path(_split_weight(entry)[0]) for entry in data]
    if missing := next((path for path in paths if named_as_file(path) and not path.exists()), None):
        raise CalibrationError(f"--data {missing}: no such file")
    return [path for path in paths if path.exists()]


def check_vocabulary(largest: int, vocab_size: int | None) -> None:
    """Refuse the tokens of another model's tokenizer.

    Args:
        largest: the largest token of a text.
        vocab_size: of the model, if known.

    Raises:
        CalibrationError: the model has no such token.
    """
    if vocab_size is not None and largest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives token {largest}, the model has {vocab_size}; put the original's tokenizer beside it"
        )


def length_of(length: int | None, max_length: int | None, usual: int | None = None) -> int:
    """Return the tokens of a block.

    Args:
        length: those that are asked for; None for the usual ones, or as many as the model takes if it takes fewer.
        max_length: the longest sequence the model takes, if it says.
        usual: see above; `LENGTH` when None.

    Raises:
        CalibrationError: blocks are longer than the model takes.
    """
    if length is None:
        usual = LENGTH if usual is None else usual
        return min(usual, max_length or usual)
    if max_length is not None and length > max_length:
        raise CalibrationError(
            f"--length {length} is more than the model takes ({max_length}); use at most {max_length}"
        )
    return length
