"""Training data: instructions and plain text to blocks of tokens, and which of the tokens count.

Shapes: N blocks, L tokens of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset

from moetailor.calibration.text import check_length, documents, read_lines, words_of
from moetailor.errors import CalibrationError, did_you_mean

LossOn = Literal["completion", "all"]
# The label of a token that does not count, by the convention of torch and transformers.
IGNORED = -100
EXPECTED = "a JSON object with `messages`, with `prompt` and `completion`, or with `text`"


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Which examples to read and how to cut them.

    Attributes:
        data: sources, read one after the other: JSONL whose rows have ``messages`` (a list of ``role`` and
            ``content``), ``prompt`` and ``completion``, or ``text``; or plain text, Parquet or a name for the datasets
            library, as calibration reads them.
        length: tokens of a block.
        loss_on: count ``completion`` tokens only (what the assistant says), or ``all``. Rows of ``text`` count whole.
    """

    data: tuple[str, ...]
    length: int = 1024
    loss_on: LossOn = "completion"

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


class Span(NamedTuple):
    """A part of an example: text, or the ids of special tokens, and whether it counts."""

    content: str | list[int]
    counts: bool


def read_blocks(
    options: ExampleOptions, tokenizer: Any, *, max_length: int | None = None, words: int | None = None
) -> Blocks:
    """Read, tokenize and pack examples.

    The examples follow each other without padding and the stream is cut into blocks of `length`: a block may hold
    several examples, which see each other, and an example may go on in the next block. What is left at the end is
    dropped, and so are blocks in which no token counts.

    - ``messages`` are written by the tokenizer's chat template. Without one, each turn is ``role: content`` on a line
      of its own, with the EOS token after each assistant's turn.
    - ``prompt`` and ``completion`` follow each other as they are, then the EOS token.
    - ``text`` stands as it is.

    All but chat templates begin with the tokenizer's BOS token (EOS where it has no BOS). What counts is tokenized
    apart from what precedes it, as when a model answers a prompt.

    Args:
        options: sources and sizes.
        tokenizer: a transformers tokenizer.
        max_length: the longest sequence the model takes, if it says.
        words: how many words the model has, if known.

    Raises:
        CalibrationError: no or too few examples, a row that is none, with its file and line, or blocks longer than the
            model takes.
    """
    if options.loss_on not in get_args(LossOn):
        raise CalibrationError(f"--loss-on {options.loss_on!r}" + did_you_mean(options.loss_on, get_args(LossOn)))
    if options.length < 2:
        raise CalibrationError(f"--length {options.length} predicts nothing; use at least 2")
    check_length(options.length, max_length)
    if not options.data:
        raise CalibrationError("no examples given; name at least one file with --data")
    ids: list[int] = []
    counts: list[bool] = []
    for name in options.data:
        for span in _spans(name, tokenizer, options.loss_on == "all"):
            tokens = span.content if isinstance(span.content, list) else _tokens(tokenizer, span.content)
            ids += tokens
            counts += [span.counts] * len(tokens)
    full = len(ids) // options.length * options.length
    if not full:
        raise CalibrationError(
            f"{', '.join(options.data)}: {len(ids)} tokens of examples, one block has {options.length}; give more, or "
            "a shorter --length"
        )
    if words is not None and max(ids) >= words:
        raise CalibrationError(
            f"the tokenizer gives word {max(ids)}, the model has {words}; put the tokenizer of the original beside it"
        )
    input_ids = torch.tensor(ids[:full]).view(-1, options.length)
    blocks = Blocks(input_ids, input_ids.masked_fill(~torch.tensor(counts[:full]).view_as(input_ids), IGNORED))
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


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _spans(name: str, tokenizer: Any, everything: bool) -> Iterator[Span]:
    """Yield the parts of all examples of one source."""
    path = Path(name)
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        for document in documents(name):
            yield from _text(document.text, tokenizer)
        return
    empty = True
    for spans in read_lines(path, lambda row: _row(row, tokenizer), EXPECTED):
        empty = False
        yield from (Span(span.content, span.counts or everything) for span in spans)
    if empty:
        raise CalibrationError(f"--data {name}: holds no examples")


def _row(row: Any, tokenizer: Any) -> list[Span]:
    if not isinstance(row, dict):
        raise TypeError("not an object")
    if "messages" in row:
        return _messages(row["messages"], tokenizer)
    if "prompt" in row or "completion" in row:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        return [*_first(tokenizer), Span(prompt, False), Span(completion, True), *_end(tokenizer)]
    return _text(_string(row, "text"), tokenizer)


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is not a string")
    return row[name]


def _text(text: str, tokenizer: Any) -> list[Span]:
    return [*(Span(span.content, True) for span in _first(tokenizer)), Span(text, True)]


def _messages(messages: Any, tokenizer: Any) -> list[Span]:
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise TypeError("messages is not a list of objects")
    turns = [{"role": _string(turn, "role"), "content": _string(turn, "content")} for turn in messages]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("no turn of the assistant")
    if getattr(tokenizer, "chat_template", None):
        return _templated(turns, tokenizer)
    spans = _first(tokenizer)
    for number, turn in enumerate(turns):
        spans.append(Span("\n" * (number > 0) + f"{turn['role']}: ", False))
        spans.append(Span(turn["content"], turn["role"] == "assistant"))
        spans += _end(tokenizer) if turn["role"] == "assistant" else []
    return spans


def _templated(turns: list[dict[str, str]], tokenizer: Any) -> list[Span]:
    """Return a conversation as the chat template writes it; what it writes for an assistant's turn counts."""

    def write(until: int, prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(turns[:until], tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from None

    whole = write(len(turns))
    spans, done = [], 0
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = write(number, prompt=True) if number else "", write(number + 1)
        # Some templates drop what an assistant thought once the conversation goes on.
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(
                f"the chat template writes turn {number + 1} otherwise once others follow; end the row with it"
            )
        spans += [Span(whole[done : len(before)], False), Span(after[len(before) :], True)]
        done = len(after)
    return [*spans, Span(whole[done:], False)]


def _first(tokenizer: Any) -> list[Span]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [Span([first], False)]


def _end(tokenizer: Any) -> list[Span]:
    return [] if tokenizer.eos_token_id is None else [Span([tokenizer.eos_token_id], True)]
