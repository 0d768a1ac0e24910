"""Training data: instructions and plain text to blocks of tokens, and which of the tokens count.

Shapes: N blocks, L tokens of a block.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset

from moetailor.calibration.spans import Encoder, documents
from moetailor.calibration.text import check_vocabulary, length_of, words_of
from moetailor.errors import CalibrationError, did_you_mean

LossOn = Literal["completion", "all"]
# The label of a token that does not count, by the convention of torch and transformers.
IGNORED = -100
# Tokens of a block where nothing else is said and the model takes as many.
LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Which examples to read and how to cut them.

    Attributes:
        data: sources, read one after the other, as calibration reads them.
        length: tokens of a block; 1024, or as many as the model takes if it takes fewer, when None.
        loss_on: count ``completion`` tokens only (what the assistant says), or ``all``. Rows of ``text`` count whole.
        text_column: the column of a row that holds its text; the usual ones when None.
    """

    data: tuple[str, ...]
    length: int | None = None
    loss_on: LossOn = "completion"
    text_column: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", words_of(self.data))


class Blocks(Dataset):
    """Blocks of tokens, a dataset for torch: item n is {"input_ids": [L], "labels": [L]}.

    Args:
        input_ids: token ids, [N, L].
        labels: the same where a token counts, else `IGNORED`, [N, L]; none is predicted from the block before, so the
            first of each block is always ignored.
    """

    def __init__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        self.input_ids = input_ids
        self.labels = labels.clone()
        self.labels[:, 0] = IGNORED

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[number], "labels": self.labels[number]}

    @property
    def counted(self) -> int:
        """Tokens that count."""
        return int((self.labels != IGNORED).sum())

    def fingerprint(self) -> str:
        """Return a hash of all tokens and labels."""
        return hashlib.sha256(torch.stack([self.input_ids, self.labels]).numpy().tobytes()).hexdigest()[:32]


def read_blocks(
    options: ExampleOptions, tokenizer: Any, *, max_length: int | None = None, vocab_size: int | None = None
) -> Blocks:
    """Read, tokenize and pack examples.

    The examples follow each other without padding and the stream is cut into blocks of `length`: a block may hold
    several examples, which see each other, and an example may go on in the next block. What is left at the end is
    dropped, and so are blocks in which no token counts.

    Rows are written as `spans` says. What counts is tokenized apart from what precedes it, as when a model answers a
    prompt.

    Args:
        options: sources and sizes.
        tokenizer: a transformers tokenizer.
        max_length: the longest sequence the model takes, if it says.
        vocab_size: of the model, if known.

    Raises:
        CalibrationError: no or too few examples, a row that is none, with its file and line, or blocks longer than the
            model takes.
    """
    if options.loss_on not in get_args(LossOn):
        raise CalibrationError(f"--loss-on {options.loss_on!r}" + did_you_mean(options.loss_on, get_args(LossOn)))
    if options.length is not None and options.length < 2:
        raise CalibrationError(f"--length {options.length} predicts nothing; use at least 2")
    length = length_of(options.length, max_length, LENGTH)
    if not options.data:
        raise CalibrationError("no examples given; name at least one file with --data")
    ids, counts = _stream(options, tokenizer)
    full = len(ids) // length * length
    if not full:
        raise CalibrationError(
            f"{', '.join(options.data)}: {len(ids)} tokens of examples, one block has {length}; give more, or "
            "a shorter --length"
        )
    check_vocabulary(int(ids.max()), vocab_size)
    input_ids = ids[:full].view(-1, length)
    blocks = Blocks(input_ids, input_ids.masked_fill(~counts[:full].view_as(input_ids), IGNORED))
    live = (blocks.labels != IGNORED).any(1)
    if not bool(live.any()):
        raise CalibrationError(
            f"{', '.join(options.data)}: no token of the {len(blocks)} blocks counts; give more, or use --loss-on all"
        )
    return Blocks(blocks.input_ids[live], blocks.labels[live])


def files_of(examples: ExampleOptions | Blocks | None) -> list[Path]:
    """Return the files among the sources of examples."""
    data = examples.data if isinstance(examples, ExampleOptions) else ()
    return [path for path in map(Path, data) if path.exists()]


def _stream(options: ExampleOptions, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of all examples and whether each counts."""
    encoder = Encoder(tokenizer)
    ids, counts = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.bool)]
    for name in options.data:
        for document in documents(name, tokenizer, training=True, text_column=options.text_column):
            for tokens, counted in encoder.portions(document):
                ids.append(torch.tensor(tokens))
                counts.append(torch.tensor(counted) | (options.loss_on == "all"))
    return torch.cat(ids), torch.cat(counts)
