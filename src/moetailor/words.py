"""Numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

# How much of a model's behaviour a KL leaves, in nats a token and in words.
GRADES = {1e-3: "hardly noticed", 1e-2: "small", 5e-2: "noticed", 0.2: "large", float("inf"): "severe"}


def unit(number: int) -> tuple[float, str]:
    """Return the size and the name of the unit that suits a number of bytes (10^3 steps)."""
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return size, name
    return 1.0, "bytes"


def nbytes(number: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    size, name = unit(number)
    return f"{number} {name}" if name == "bytes" else f"{number / size:.2f} {name}"


def spans(numbers: Iterable[int], between: str = " ") -> str:
    """Return ascending numbers with runs drawn together, such as ``1 4-7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return between.join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def nats(number: float) -> str:
    """Return a KL with two digits and without a power of ten, such as ``0.00021``."""
    return f"{Decimal(f'{number:.2g}'):f}"


def share(part: int, whole: int) -> str:
    """Return a share in whole percents, such as ``44%``."""
    return f"{part / whole:.0%}"


def pieces(name: str) -> list[str]:
    """Return the pieces of a method's name between which a line may end, such as ``refit:``, ``neurons=`` and
    ``chosen``.
    """
    return re.findall(r"[^:=]+[:=]?|[:=]", name)


def grade(kl: float) -> str:
    """Return what a KL means, in words."""
    return next(words for limit, words in GRADES.items() if kl < limit)
