"""Documents: what a row of text data says, as the tokenizer's template writes it, and its tokens.

One code for all stages, so that a row means the same wherever it is read. In the order of precedence:

- ``messages`` are written by the tokenizer's chat template. Without one, each turn is ``role: content`` on a line of
  its own, with the EOS token after each assistant's turn.
- ``prompt`` and ``completion`` follow each other as they are, then the EOS token.
- ``text`` stands as it is.

All but chat templates begin with the tokenizer's BOS token (EOS where it has no BOS). A special token that is written
here is left out where the text has the same one already, before it or after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from moetailor.calibration.batch import document_key
from moetailor.calibration.sources import BLOCK, blocks, expected, plain_text, rows
from moetailor.errors import CalibrationError

# Characters of one call of the tokenizer, and of a plain text that its key is made of.
LONGEST, KEYED = 2**16, 2**20
# Tokens of a long document that are handed over at once.
PORTION = 2**14
# Where text is cut, the best place first. A single line end between words changes no token of byte-level tokenizers.
CUTS = tuple(re.compile(cut) for cut in (r"(?<=\S)\n(?=\w)", r"\n(?=\S)", r"(?=\s)", r"\Z"))


class Span(NamedTuple):
    """A part of a document: text, or a special token, and whether it counts in training."""

    content: str | int
    counts: bool


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        spans: its parts in order; those of a large file are read as they are taken.
        key: a 64-bit hash of its text, as int64.
        domain: what it is counted under, empty when the source names none.
    """

    spans: Iterable[Span]
    key: int
    domain: str = ""


def documents(
    name: str, tokenizer: Any, *, seed: int | None = None, training: bool = False, text_column: str | None = None
) -> Iterator[Document]:
    """Yield the documents of one source.

    Args:
        name: a file, or a name for the datasets library.
        tokenizer: a transformers tokenizer.
        seed: shuffles them; file order when None.
        training: keep what the assistant says apart from what precedes it, as when a model answers a prompt, and refuse
            conversations of which nothing counts.
        text_column: the column that holds the text of a row; the usual ones when None.

    Raises:
        CalibrationError: the source cannot be read, holds no text, or a row is none, with its file and line.
    """
    if path := plain_text(name):
        if not any(block.strip() for block in blocks(path)):
            raise CalibrationError(f"--data {name}: holds no text")
        key = document_key("".join(islice(blocks(path), KEYED // BLOCK)))
        yield Document(chain(_first(tokenizer, True), (Span(block, True) for block in pieces(blocks(path)))), key)
        return
    for row in rows(name, seed, text_column):
        with expected(row.where):
            spans = _spans(row.fields, tokenizer, training)
            key = document_key("".join(span.content for span in spans if isinstance(span.content, str)))
        domain = row.fields.get("domain")
        yield Document(spans, key, "" if domain is None else str(domain))


class Encoder:
    """Turns documents into tokens, one after the other.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # The last token, and whether it is a special one that was written here.
        self.last: int | None = None
        self.own = False

    def portions(self, document: Document) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield the tokens of a document and whether each counts: all at once, or portions of a long one."""
        ids: list[int] = []
        counts: list[bool] = []
        for content, counted in document.spans:
            own = isinstance(content, int)
            for tokens in [[content]] if own else map(self._tokens, pieces(content)):
                # Two of a kind, one of which was written here: the other says it already.
                if (own or self.own) and tokens[:1] == [self.last]:
                    tokens = tokens[1:]
                self.own = own
                self.last = tokens[-1] if tokens else self.last
                ids += tokens
                counts += [counted] * len(tokens)
                if len(ids) >= PORTION:
                    yield ids, counts
                    ids, counts = [], []
        if ids:
            yield ids, counts

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cut a text, whole or in blocks, at line ends into pieces that are not too long for the tokenizer."""
    given = (text[at : at + LONGEST] for at in range(0, len(text), LONGEST)) if isinstance(text, str) else text
    left = ""
    for block in given:
        left += block
        while len(left) > LONGEST:
            found = (list(cut.finditer(left, LONGEST // 2, LONGEST)) for cut in CUTS)
            end = next(cuts[-1].end() for cuts in found if cuts)
            yield left[:end]
            left = left[end:]
    if left:
        yield left


def _spans(row: dict[str, Any], tokenizer: Any, training: bool) -> list[Span]:
    if "messages" in row:
        return _messages(row["messages"], tokenizer, training)
    if "completion" in row or ("prompt" in row and "text" not in row):
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        return [*_first(tokenizer, False), Span(prompt, False), Span(completion, True), *_end(tokenizer)]
    return [*_first(tokenizer, True), Span(_string(row, "text"), True)]


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is not a string")
    return row[name]


def _messages(messages: Any, tokenizer: Any, training: bool) -> list[Span]:
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise TypeError("messages is not a list of objects")
    turns = [{"role": _string(turn, "role"), "content": _string(turn, "content")} for turn in messages]
    if training and not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("no turn of the assistant")
    if getattr(tokenizer, "chat_template", None):
        return _templated(turns, tokenizer) if training else [Span(_written(turns, tokenizer), True)]
    spans = _first(tokenizer, False)
    for number, turn in enumerate(turns):
        spans.append(Span("\n" * (number > 0) + f"{turn['role']}: ", False))
        spans.append(Span(turn["content"], turn["role"] == "assistant"))
        spans += _end(tokenizer) if turn["role"] == "assistant" else []
    return spans


def _templated(turns: list[dict[str, str]], tokenizer: Any) -> list[Span]:
    """Return a conversation as the chat template writes it; what it writes for an assistant's turn counts."""
    whole = _written(turns, tokenizer)
    spans, done = [], 0
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _written(turns[:number], tokenizer, prompt=True) if number else ""
        after = _written(turns[: number + 1], tokenizer)
        # Some templates drop what an assistant thought once the conversation goes on.
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(
                f"the chat template writes turn {number + 1} otherwise once others follow; end the row with it"
            )
        spans += [Span(whole[done : len(before)], False), Span(after[len(before) :], True)]
        done = len(after)
    return [*spans, Span(whole[done:], False)]


def _written(turns: list[dict[str, str]], tokenizer: Any, *, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # whatever a template does
        raise ValueError(f"the chat template refuses it: {error}") from None


def _first(tokenizer: Any, counts: bool) -> list[Span]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [Span(first, counts)]


def _end(tokenizer: Any) -> list[Span]:
    return [] if tokenizer.eos_token_id is None else [Span(tokenizer.eos_token_id, True)]
