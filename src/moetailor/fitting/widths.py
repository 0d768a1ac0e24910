"""Experts in few bits: each matrix by GPTQ on what it gets, the down projection fitted to what the others then give.

Moments are weighted by squared gates: that is what an expert's error adds to its layer's. Shapes: n experts, T tokens,
D model width, F expert width, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch.nn import functional as F

from moetailor.checkpoint.devices import in_batches
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import Codes, FewBits
from moetailor.fitting.gptq import Seen, gptq
from moetailor.fitting.held_out import held_out
from moetailor.fitting.tokens import ROUNDED, joined, tokens_of
from moetailor.planning.view import LayerView

Rounding = Literal["gptq", "nearest"]
Matrices = Mapping[str, torch.Tensor]
# What is added to the diagonal of the moments that the down projection is fitted on, as a share of its mean.
RIDGE = 0.02


def quantized(
    layer: LayerView,
    behind: Sequence[Mapping[int, float]],
    read: Callable[[Sequence[int]], Matrices],
    storages: Mapping[str, FewBits],
    *,
    dtype: torch.dtype,
    rounding: Rounding = "gptq",
) -> Iterator[dict[str, Codes]]:
    """Yield the codes of some experts by matrix, of as many experts at a time as are computed together.

    Args:
        layer: the layer.
        behind: the slots behind which each expert runs, with the factor on their gates.
        read: returns weights and biases of some of them, stacked, by their places in `behind`.
        storages: how each matrix lies.
        dtype: of the scales.
        rounding: ``nearest`` takes the nearest codes, whatever the inputs are.
    """

    def work(some: Sequence[int]) -> dict[str, Codes]:
        matrices = {name: part.float() for name, part in read(some).items()}
        if rounding == "nearest":
            up, names = storages["up"], layer.experts.inputs
            gates = _as_one(matrices, names, up, lambda weight: up.nearest(weight, dtype))
            return {**gates, "down": storages["down"].nearest(matrices["down"], dtype)}
        half = Together.of(layer, matrices, [inputs_of(layer, behind[at]) for at in some]).half(storages, dtype)
        return {**half.codes, "down": gptq(half.down, half.seen, storages["down"], dtype)}

    return in_batches(range(len(behind)), at_once(layer), work)


def at_once(layer: LayerView) -> int:
    """Return how many experts are computed together, each step of all at once: the more, the fewer the steps."""
    counts = layer.sample.index.flatten().bincount(minlength=layer.num_experts).tolist()
    tokens = fmean(joined(counts, layer.shape.width, len(layer.sample.key)))
    return max(1, layer.experts.working_nbytes // computed_nbytes(layer.shape, tokens))


def computed_nbytes(shape: ExpertShape, tokens: float, *, compared: bool = True) -> int:
    """Return the bytes that rounding one of several experts takes.

    Args:
        shape: what it is made of.
        tokens: that say what it gets, T.
        compared: whether some widths are: one half lies there while the next is made, beside what judges it.
    """
    width, inner, inputs = shape.width, shape.intermediate, len(shape.inputs)
    matrix, square = width * inner, width**2
    # its matrices, and factors of D x D moments; or gate and up as one, what is left of them and what is handed on,
    # and their codes; or what these stand for, and factors of F x F moments
    most = max(4 * square, 3.25 * inputs * matrix + 2 * square, 1.25 * inputs * matrix + square + 5 * inner**2)
    numbers = (1 + inputs) * matrix + most + tokens * (width + inner)
    if compared:
        numbers += (1.25 * inputs + 2.25) * matrix + inner**2 + tokens * width / 4
    return int(4 * numbers)


@dataclass(frozen=True, kw_only=True)
class Half:
    """Experts of which all but the down projections are rounded.

    Attributes:
        codes: those of the matrices that are.
        matrices: all, with what the codes stand for.
        down: down projections for what they then give, [n, D, F].
        seen: what is known of that.
    """

    codes: Mapping[str, Codes]
    matrices: Matrices
    down: torch.Tensor
    seen: Seen

    def states(self, layer: LayerView, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection gets, [T, F]."""
        return layer.experts.hidden({name: part[number] for name, part in self.matrices.items()}, x)


@dataclass(frozen=True, kw_only=True)
class Together:
    """Experts that are rounded together, and what does not depend on the width.

    Attributes:
        layer: the layer.
        matrices: theirs, stacked.
        inputs: of each, [T, D], and what an error weighs there, [T].
        given: what the down projection of each gets, [T, F].
        seen: what is known of the inputs.
    """

    layer: LayerView
    matrices: Matrices
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    given: Sequence[torch.Tensor]
    seen: Seen

    @classmethod
    def of(cls, layer: LayerView, matrices: Matrices, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Together:
        """Run the experts on their tokens."""
        each = [{name: part[number] for name, part in matrices.items()} for number in range(len(inputs))]
        given = [layer.experts.hidden(own, x) for own, (x, _) in zip(each, inputs, strict=True)]
        seen = Seen.of(torch.stack([_moment(x, x, weight) for x, weight in inputs]))
        return cls(layer=layer, matrices=matrices, inputs=inputs, given=given, seen=seen)

    def half(self, storages: Mapping[str, FewBits], dtype: torch.dtype) -> Half:
        """Round gate and up projections, and fit down projections to what they then give.

        Args:
            storages: how each matrix lies; gate and up alike.
            dtype: of the scales.
        """
        names, down, storage = self.layer.experts.inputs, self.matrices["down"], storages["up"]
        codes = _as_one(self.matrices, names, storage, lambda weight: gptq(weight, self.seen, storage, dtype))
        rounded = dict(self.matrices) | {
            name: storage.numbers(part, self.layer.shape.width).float() for name, part in codes.items()
        }
        own, cross = (down.new_empty(len(down), down.shape[2], down.shape[2]) for _ in range(2))
        for number, (x, weight) in enumerate(self.inputs):
            now = self.layer.experts.hidden({name: part[number] for name, part in rounded.items()}, x)
            own[number], cross[number] = _moment(now, now, weight), _moment(self.given[number], now, weight)
        return Half(codes=codes, matrices=rounded, down=_refitted(down, own, cross), seen=Seen.of(own))


def _as_one(
    matrices: Matrices, names: Sequence[str], storage: FewBits, rounded: Callable[[torch.Tensor], Codes]
) -> dict[str, Codes]:
    """Return the codes of matrices with the same inputs, rounded as one: so engines run them."""
    outputs = matrices[names[0]].shape[1]
    each = outputs + -outputs % storage.high
    both = torch.cat([F.pad(matrices[name], (0, 0, 0, each - outputs)) for name in names], 1)
    codes = rounded(both)
    return {name: codes.rows(at * each, at * each + outputs) for at, name in enumerate(names)}


def inputs_of(
    layer: LayerView, slots: Mapping[int, float], *, held_out_too: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs that say what an expert gets, float32 [T, D], and what its error weighs there, [T].

    Args:
        layer: the layer.
        slots: see `tokens_of`.
        held_out_too: whether with the tokens that are held out.
    """
    found, device = tokens_of(layer, slots, ROUNDED), layer.experts.device
    taken = torch.ones_like(found.place, dtype=torch.bool) if held_out_too else ~held_out(found.place)
    return layer.inputs(found.place[taken]).float(), found.weight[taken].float().to(device)


def _moment(one: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return sum w x y^T."""
    return (one * weight[:, None]).T @ other


def _refitted(down: torch.Tensor, own: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Return the down projection that gives for the new inner states what the old one gave for the old ones.

    Args:
        down: [n, D, F].
        own: moments of the new states h', sum g^2 h' h'^T, [n, F, F].
        cross: sum g^2 h h'^T, [n, F, F].
    """
    # W* = W (C_hh' + l I) (C_h'h' + l I)^-1
    more = RIDGE * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    ridge = more[:, None, None] * torch.eye(own.shape[-1], device=own.device)
    factor = torch.linalg.cholesky(own + ridge)
    return torch.cholesky_solve((down @ (cross + ridge)).transpose(1, 2), factor).transpose(1, 2)
