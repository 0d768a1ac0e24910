"""Auto's menu: every expert in some few bits, as a constant, as a linear map, or as it lay; one knapsack over all.

Bases with parts of low rank and remaps are not on it: with widths there, the former were never chosen, and the latter
saved a fortieth of the KL where hardly an expert is left and nothing elsewhere (docs/log.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetailor.answers import FLOATS, VQ_BITS, WHOLE, Answer, Constant, Keep, Kind, Linear, Packed, Width
from moetailor.calibration.effects import Prices
from moetailor.checkpoint.files import DTYPES
from moetailor.errors import PlanError
from moetailor.fitting import linear_maps
from moetailor.fitting.constants import on_new_text
from moetailor.fitting.knapsack import Shelf, cheapest
from moetailor.fitting.noise import held_out_errors
from moetailor.fitting.widths import at_once
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView

# Bits of gate and up, and of the down projection, which wants about two more.
PAIRS = ((8, 8), (6, 8), (6, 6), (5, 6), (5, 5), (4, 6), (4, 5), (4, 4), (3, 5), (3, 4), (3, 3), (2, 4), (2, 3), (2, 2))
# By codebooks also these.
VQ_PAIRS = ((1, 3), (1, 2), (1, 1))
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
RIDGE = 0.01
# Solutions are sought at most so many times from each start.
ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Priced:
    """What the experts of a layer may become.

    Attributes:
        index: number of the decoder layer.
        entries: the answers, or the widths in which an expert stays; where there is `Keep`, it is the last.
        nbytes: bytes of each entry, int64 [entries].
        errors: squared error a token that each adds to the layer's output, float64 [E, entries]; infinite for those
            that an expert cannot become.
        weight: what errors of each expert weigh, [E].
        scores: nats that a constant in place of each expert costs.
        alike: experts that each row stands for.
    """

    index: int
    entries: Sequence[Answer | Width]
    nbytes: torch.Tensor
    errors: torch.Tensor
    weight: torch.Tensor
    scores: tuple[float, ...]
    alike: int = 1

    @property
    def rounded(self) -> torch.Tensor:
        """Which errors are noise, bool [entries]."""
        return torch.tensor([isinstance(entry, Width) for entry in self.entries])

    @property
    def stays(self) -> torch.Tensor:
        """Entries in which an expert stays, bool [entries]."""
        return torch.tensor([isinstance(entry, Width | Keep) for entry in self.entries])

    def weighed(self) -> torch.Tensor:
        """Return the errors by what they weigh."""
        return self.errors * self.weight[:, None]

    def sums(self, errors: torch.Tensor, taken: Sequence[int]) -> tuple[float, float]:
        """Return the coarse errors and the noise of some entries in all."""
        at, rounded = torch.tensor(taken), self.rounded
        each = errors.gather(1, at[:, None])[:, 0]
        return float(each[~rounded[at]].sum()), float(each[rounded[at]].sum())

    def staying(self) -> Priced:
        """Return the same where all experts stay."""
        entries = [entry for entry, stays in zip(self.entries, self.stays.tolist(), strict=True) if stays]
        return replace(self, entries=entries, nbytes=self.nbytes[self.stays], errors=self.errors[:, self.stays])

    def uniform(self) -> Priced:
        """Return the same for a layer whose experts all stay in one width, the same for each of their matrices."""
        one = [isinstance(entry, Keep) or (isinstance(entry, Width) and not entry.down) for entry in self.entries]
        return replace(
            self,
            entries=[entry for entry, allowed in zip(self.entries, one, strict=True) if allowed],
            nbytes=len(self.errors) * self.nbytes[one],
            errors=(self.errors * self.weight[:, None])[:, one].sum(0, keepdim=True),
            weight=torch.ones(1, dtype=self.weight.dtype),
            alike=len(self.errors),
        )

    def plan(self, taken: Sequence[int], expected: float) -> LayerPlan:
        """Return the plan with some entries.

        Args:
            taken: the entry of each row.
            expected: nats that it should cost.
        """
        found = [self.entries[at] for at in taken for _ in range(self.alike)]
        slots = tuple(Keep() if isinstance(entry, Width) else entry for entry in found)
        widths = {expert: entry for expert, entry in enumerate(found) if isinstance(entry, Width)}
        return LayerPlan(slots=slots, scores=self.scores, expected=expected, widths=widths)


def ways_to_stay(bits: str, *, group: int, codes: Kind) -> list[Width | Keep]:
    """Return how experts that stay may lie: in the widths of which all bits are listed, and for 16 as they lay.

    Args:
        bits: such as ``8,4``, or ``8+4`` where commas stand between methods; all and 16 when it is empty.
        group: of each width, see `Width`.
        codes: of each width; ``vq`` where there are few enough bits for it.

    Raises:
        PlanError: bits that are not on the menu, or none but 16.
    """
    pairs = ((FLOATS[codes].bits,) * 2,) if codes in FLOATS else PAIRS + VQ_PAIRS * (codes == "vq")
    known = [bits for bits, down in pairs if bits == down]
    listed = set(map(int, re.split("[,+]", bits))) if re.fullmatch(r"\d{1,3}([,+]\d{1,3})*", bits) else set()
    if bits and (not listed & set(known) or listed - {*known, WHOLE.bits}):
        told = f"list some of {', '.join(map(str, known))}, such as 8,4; with {WHOLE.bits} experts may stay as they lay"
        raise PlanError(f"widths={bits}: {told}")
    found: list[Width | Keep] = []
    for one, other in pairs:
        kind = "uint" if codes == "vq" and one > VQ_BITS else codes
        if not bits or {one, other} <= listed:
            found.append(Width(bits=one, down=other * (other != one), group=group, codes=kind))
    return [*found, Keep()] if not bits or WHOLE.bits in listed else found


def priced(layer: LayerView, weight: torch.Tensor, stays: Sequence[Width | Keep]) -> Priced:
    """Return what the experts of a layer may become.

    Args:
        layer: the layer.
        weight: what errors of each expert weigh, [E].
        stays: how those that stay may lie, from `ways_to_stay`.
    """
    widths = [entry for entry in stays if isinstance(entry, Width)]
    ranks = ranks_of(layer)
    maps: list[Answer] = [Constant(), *(Linear(rank, int8=True) for rank in ranks)]
    entries = [*maps, *stays]
    nbytes = [_nbytes(layer, entry) for entry in entries]
    dead = layer.sums.count == 0

    def measure(experts: Sequence[int]) -> torch.Tensor:
        linear = [linear_maps.held_out_errors(layer, expert, [0, *ranks], RIDGE) for expert in experts]
        return torch.cat([torch.stack(linear), held_out_errors(layer, experts, widths, dtype=DTYPES[layer.dtype])], 1)

    errors, noise = layer.each_expert(kept_under(layer, stays), measure, at_once(layer)).split(
        [1 + len(ranks), len(widths)], 1
    )
    scores = ((layer.sensitivity or 0.0) * errors[:, 0]).tolist()
    errors, noise = on_new_text(layer.sums, errors), on_new_text(layer.sums, noise)
    # An expert that no token reached stays: that may be the text's doing, and few bits cost little.
    errors[dead] = torch.inf
    errors[sorted(layer.protected)] = torch.inf
    return Priced(
        index=layer.index,
        entries=entries,
        nbytes=torch.tensor(nbytes),
        errors=torch.cat([errors, noise, torch.zeros(len(errors), len(stays) - len(widths)).double()], 1),
        weight=weight,
        scores=tuple(scores),
    )


def ranks_of(layer: LayerView) -> list[int]:
    """Return the ranks of the maps that are smaller than an expert."""
    return [rank for rank in RANKS if _nbytes(layer, Linear(rank, int8=True)) < layer.expert_bytes]


def kept_under(layer: LayerView, stays: Sequence[Width | Keep]) -> dict[str, Any]:
    """Return what the rows that are kept of the experts of a layer depend on, see `priced`."""
    widths = [f"{width.text} g{width.group}" for width in stays if isinstance(width, Width)]
    return {"ranks": ranks_of(layer), "ridge": RIDGE, "widths": widths}


def mixed(layers: Sequence[Priced], prices: Prices, nbytes: int) -> list[LayerPlan]:
    """Return the plans that cost the predictions least.

    Args:
        layers: what the experts of each may become.
        prices: what errors cost.
        nbytes: bytes that experts and stand-ins of all layers may take.

    Raises:
        TooSmallError: the smallest entries take more.
    """
    weighed = {layer.index: layer.weighed() for layer in layers}

    def sums(taken: Sequence[Sequence[int]], errors: Mapping[int, torch.Tensor]) -> dict[int, tuple[float, float]]:
        return {each.index: each.sums(errors[each.index], at) for each, at in zip(layers, taken, strict=True)}

    def solved(moved: float) -> list[list[int]]:
        shelves = []
        for layer in layers:
            coarse, noise = prices.slopes(layer.index, moved)
            slope = torch.where(layer.rounded, noise, coarse).double()
            errors = weighed[layer.index]
            # What cannot be taken cannot where errors cost nothing either.
            errors = torch.where(errors.isinf(), errors, errors * slope)
            shelves.append(Shelf(errors=errors, nbytes=layer.nbytes, stays=layer.stays))
        return cheapest(shelves, nbytes)

    # The root in what errors cost is concave: with its slope at some point in its place no solution gets worse, but one
    # can be the best nearby only.
    found: list[tuple[float, list[list[int]]]] = []
    for start in _starts(layers):
        taken = [[layer.entries.index(start)] * len(layer.errors) for layer in layers]
        for _ in range(ROUNDS):
            before, taken = taken, solved(prices.moved(sums(taken, weighed)))
            found.append((prices.sum(sums(taken, weighed)), taken))
            if taken == before:
                break
    _, taken = min(found, key=lambda each: each[0])
    expected = prices.expected(sums(taken, {layer.index: layer.errors for layer in layers}))
    return [layer.plan(at, expected[layer.index]) for layer, at in zip(layers, taken, strict=True)]


def _starts(layers: Sequence[Priced]) -> list[Width]:
    """Return the entries that solutions are sought from: every other width that is the same for all matrices."""
    alike = {e for layer in layers for e in layer.entries if isinstance(e, Width) and not e.down}
    return sorted(alike, key=lambda width: width.bits)[::2]


def _nbytes(layer: LayerView, entry: Answer | Width) -> int:
    if isinstance(entry, Keep):
        return layer.expert_bytes
    return answers_nbytes([entry if isinstance(entry, Answer) else Packed.of(entry)], layer.shape, layer.dtype)
