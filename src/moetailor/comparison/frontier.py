"""Quality against bytes: which rows no other beats in both, and whether plain bits would do, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moetailor.words import nats, share

Row = Mapping[str, Any]
# Nats a token that nobody misses (perplexity grows by a tenth of a percent), and so many that nothing is advised.
ENOUGH, TOO_MUCH = 1e-3, 0.1
# Bytes that differ by less than this share are as many.
SAME = 0.02


def front(cells: Sequence[Row]) -> list[int]:
    """Return the numbers of the rows that no other beats in bytes and KL, from the smallest up; of equals the first.

    Rows of one size differ by an expert, or by what a method could not use: so little smaller is not smaller.

    Args:
        cells: as in results.json; those that failed are on no front.
    """
    found: list[int] = []
    measured = [number for number, cell in enumerate(cells) if cell["error"] is None]
    for number in sorted(measured, key=lambda n: (cells[n]["nbytes"], kl_of(cells[n]))):
        if not found or kl_of(cells[number]) < kl_of(cells[found[-1]]):
            while found and cells[found[-1]]["nbytes"] > (1 - SAME) * cells[number]["nbytes"]:
                found.pop()
            found.append(number)
    return found


def kl_of(cell: Row) -> float:
    """Return the KL of a row on all text; infinite for a failed one."""
    return float("inf") if cell["error"] else cell["fidelity"][""]["kl"]["mean"]


def recommendation(cells: Sequence[Row], sizes: Sequence[int], whole: int) -> str | None:
    """Say whether bits alone would do, down to which size, and what to take below; None where none were measured.

    That one row loses less than another is said where their 95% intervals do not overlap.

    Args:
        cells: as in results.json.
        sizes: bytes that were asked for.
        whole: bytes of the original.
    """
    measured = [cell for cell in cells if cell["error"] is None]
    plain = sorted((cell for cell in measured if not cell["removes"]), key=lambda cell: cell["nbytes"])
    others = [cell for cell in measured if cell["removes"]]
    if not plain:
        return None
    # Engines load no codebooks.
    loaded = [cell for cell in plain if cell["parameters"].get("codes") != "vq"]
    enough = next((cell for cell in loaded if _interval(cell)["high"] < ENOUGH), None)
    four = _best([cell for cell in loaded if cell["parameters"].get("bits") == 4])
    said = [] if four is None else [_would_do(four, others, whole)]
    if enough is None:
        said.append(f"No bits alone stay under {nats(ENOUGH)}.")
    elif enough is not four:
        at = share(enough["nbytes"], whole)
        said.append(f"Bits alone stay under {nats(ENOUGH)} down to {at} of the bytes ({_loss(enough)}).")
    below = [size for size in sorted(sizes, reverse=True) if enough is None or size < enough["nbytes"]]
    said += _below(below, plain, others, whole)
    return " ".join(said)


def _would_do(four: Row, others: Sequence[Row], whole: int) -> str:
    """Say what 4 bits alone lose, and what the best of the others in as few bytes does."""
    they = "They" if four["name"] == "4 bits" else f"At best ({four['name']}) they"
    at = share(four["nbytes"], whole)
    said = f"Would 4 bits do? {they} lose {nats(kl_of(four))} nats a token at {at} of the bytes"
    rival = _best([cell for cell in others if cell["nbytes"] <= four["nbytes"]])
    if _interval(four)["high"] < ENOUGH:
        return f"{said}, under {nats(ENOUGH)}: yes."
    if rival is None or not _less(rival, four):
        return f"{said}, and nothing as small was seen to lose less."
    return f"{said}; {rival['name']} loses {nats(kl_of(rival))} at {share(rival['nbytes'], whole)}."


def _below(sizes: Sequence[int], plain: Sequence[Row], others: Sequence[Row], whole: int) -> list[str]:
    """Say for each size what loses least, and what the best bits alone do there."""
    said, worse, beyond, unknown = [], [], [], []
    for size in sizes:
        bits, other = (_best([cell for cell in rows if cell["nbytes"] <= size]) for rows in (plain, others))
        at = f"at {share(size, whole)}"
        if bits is other is None:
            unknown.append(share(size, whole))
        elif all(kl_of(cell) >= TOO_MUCH for cell in (bits, other) if cell):
            beyond.append(share(size, whole))
        elif other is not None and (bits is None or _less(other, bits)):
            said.append(f"{at} by {_loss(other)} ({_loss(bits) if bits else 'no bits alone are so small'})")
            lost = [] if bits is None else _lost(other, bits)
            worse += [f"{at} {other['name']} loses more than {bits['name']} on {name}" for name in lost if bits]
        elif bits is not None:
            said.append(f"{at} by {_loss(bits)}")
    found = [f"Least is lost {', '.join(said)}."] if said else []
    found += [f"But {', '.join(worse)}."] if worse else []
    found += [f"Nothing stays under {nats(TOO_MUCH)} at {', '.join(beyond)}."] if beyond else []
    return found + ([f"No row was measured at {', '.join(unknown)}."] if unknown else [])


def _lost(other: Row, bits: Row) -> list[str]:
    """Return the domains on which bits alone lose less."""
    both = [name for name in bits["fidelity"] if name and name in other["fidelity"]]
    return [name for name in both if _less(bits, other, name)]


def _best(cells: Sequence[Row]) -> Row | None:
    return min(cells, key=kl_of, default=None)


def _less(one: Row, other: Row, domain: str = "") -> bool:
    """Return whether one row loses less than another, by their intervals."""
    return _interval(one, domain)["high"] < _interval(other, domain)["low"]


def _interval(cell: Row, domain: str = "") -> Mapping[str, float]:
    return cell["fidelity"][domain]["kl"]


def _loss(cell: Row) -> str:
    return f"{cell['name']}: {nats(kl_of(cell))}"
