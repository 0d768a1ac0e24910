"""A console for text from anywhere: nothing in it steers the terminal or is markup."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

# What steers a terminal or turns the order of letters round, and halves of characters, which no terminal takes.
STEERING = {
    **dict.fromkeys((*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)), None),
    **dict.fromkeys(range(0x2066, 0x206A), None),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
    **{ord(letter): letter for letter in "\n\t"},
}


class PlainConsole(Console):
    """A console on which no text, whichever file it comes from, steers the terminal or is taken for markup."""

    def __init__(self, **options: Any) -> None:
        # No emoji: `:-1:` is a name of one, and may stand in a path.
        super().__init__(highlight=False, emoji=False, markup=False, **options)

    def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
        """Yield what rich draws, texts without letters that steer."""
        for segment in super().render(*args, **options):
            yield segment if segment.control else Segment(segment.text.translate(STEERING), segment.style)
