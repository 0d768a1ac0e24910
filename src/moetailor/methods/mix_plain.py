"""The menu of `auto` without bits: remaps, constants, linear maps, the layer's base alone or with parts of low rank.

All that is stored lies as experts lay. A base is the mean of the layer's experts. Other experts are taken where they
answer the tokens best, with a scale. One integer program chooses, since bases and remaps tie experts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from moetailor.answers import Answer, Constant, Drop, Keep, Linear, LowRank, Remap
from moetailor.checkpoint.experts import ExpertShape
from moetailor.fitting import linear_maps, low_rank
from moetailor.fitting.averages import Matrices
from moetailor.fitting.constants import on_new_text
from moetailor.fitting.distances import functional_distances
from moetailor.fitting.menu import Menu, cheapest
from moetailor.fitting.whitened import approximate
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView

LINEAR = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
# In 32nds of the rank at which a low-rank part has as many numbers as the matrix, D F / (D + F).
LOW = (*range(17), 20, 24, 28)
RIDGE = 0.01
# Other experts that may answer a slot, the sampled tokens of each expert that they are compared on, and the fewest on
# which the loss is measured then.
NEAR, COMPARED, FEW = 2, 64, 8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the slots of a layer may become.

    Attributes:
        answers: the answers that each expert may become, in the order of the menu's entries; the last is the expert
            itself, for which the menu has no entry.
        menu: what they cost, in nats times `weight`.
        weight: what errors of each expert weigh, [E].
        scores: what a constant in place of each expert costs, in nats.
    """

    answers: list[list[Answer]]
    menu: Menu
    weight: torch.Tensor
    scores: tuple[float, ...]

    def plan(self, entries: Sequence[int]) -> LayerPlan:
        """Return the plan in which each expert becomes its answer of a number."""
        low = [expert for expert, at in enumerate(entries) if isinstance(self.answers[expert][at], LowRank)]
        # A base with a single member takes as many bytes as that expert, which loses nothing.
        entries = [len(self.menu.price) if low == [expert] else at for expert, at in enumerate(entries)]
        chosen = [answers[at] for answers, at in zip(self.answers, entries, strict=True)]
        base = next((expert for expert, answer in enumerate(chosen) if isinstance(answer, LowRank)), 0)
        slots = [replace(answer, base=base) if isinstance(answer, LowRank) else answer for answer in chosen]
        errors = self.menu.errors / self.weight[:, None]
        expected = _cost(errors, entries)
        return LayerPlan(slots=tuple(slots), scores=self.scores, expected=expected)

    def cost(self, entries: Sequence[int]) -> float:
        """Return what such a plan costs on the menu."""
        return _cost(self.menu.errors, entries)

    def without_base(self) -> Choice:
        """Return the same without low-rank answers."""
        low = torch.tensor([isinstance(answer, LowRank) for answer in self.answers[0][:-1]])
        return replace(self, menu=replace(self.menu, errors=self.menu.errors.masked_fill(low, torch.inf)))


def _cost(errors: torch.Tensor, entries: Sequence[int]) -> float:
    return sum(float(errors[expert, at]) for expert, at in enumerate(entries) if at < errors.shape[1])


def choice(layer: LayerView, weight: torch.Tensor) -> Choice:
    """Return what the slots of a layer may become, errors in nats.

    Args:
        layer: the layer.
        weight: what errors of each expert weigh, [E].
    """
    slots, experts, base = _menu(layer), range(layer.num_experts), base_of(layer)

    def measure(experts: Sequence[int]) -> torch.Tensor:
        return torch.stack([_errors(layer, expert, base, slots) for expert in experts])

    errors = layer.each_expert(kept_under(layer), measure)
    others, scales, shares = _nearest(layer)
    sums, dead = layer.sums, layer.sums.count == 0
    lost = on_new_text(sums, (sums.gate_sq_norm_sq / sums.tokens)[:, None] * shares)
    errors = on_new_text(sums, errors)
    # A slot that no token reached is dropped: what another expert would do there is not known.
    lost[dead] = torch.inf
    drop = torch.where(dead & (layer.groups == 1), 0.0, torch.inf)[:, None].double()
    sensitivity = layer.sensitivity or 0.0
    menu = Menu(
        errors=weight[:, None] * sensitivity * torch.cat([errors, lost, drop], 1),
        price=[*(_nbytes(layer, slot) for slot in slots), *[0] * (others.shape[1] + 1)],
        expert_nbytes=layer.expert_bytes,
        must_keep=layer.protected,
        requires=F.pad(others, (len(slots), 1), value=-1),
    )
    answers = [
        [*slots, *map(_answered, others[expert].tolist(), scales[expert].tolist()), Drop(), Keep()]
        for expert in experts
    ]
    return Choice(answers=answers, menu=menu, weight=weight, scores=tuple((sensitivity * errors[:, 0]).tolist()))


def kept_under(layer: LayerView) -> dict[str, Any]:
    """Return what the rows that are kept of the experts of a layer depend on, see `choice`."""
    return {"answers": list(map(str, _menu(layer))), "ridge": RIDGE}


def low_ranks(shape: ExpertShape) -> list[int]:
    """Return the ranks of own parts that are priced."""
    even = shape.width * shape.intermediate // (shape.width + shape.intermediate)
    return sorted({even * part // 32 for part in LOW})


def _menu(layer: LayerView) -> list[Answer]:
    """Return what a slot may become beside its own expert, as far as it is smaller; a constant first."""
    answers: list[Answer] = [Linear(rank) if rank else Constant() for rank in LINEAR]
    answers += [LowRank(0, rank) for rank in low_ranks(layer.shape)]
    return [answer for answer in answers if _nbytes(layer, answer) < layer.expert_bytes]


def _nbytes(layer: LayerView, answer: Answer) -> int:
    """Return the bytes of an answer, without the base."""
    if isinstance(answer, LowRank):
        return low_rank.low_rank_nbytes(layer, answer.rank)
    return answers_nbytes([answer], layer.shape, layer.dtype)


def _answered(expert: int, scale: float) -> Remap:
    return Remap(expert, float(f"{scale:.6g}"))


def _nearest(layer: LayerView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for each expert the others that answer its tokens best, their scales, and the share of the gated output
    energy that is lost on tokens that chose neither, [E, NEAR] each.
    """
    distances, scales = functional_distances([layer], COMPARED, scaled=True, limits=(-torch.inf, torch.inf))
    lost, others = distances.fill_diagonal_(torch.inf).sort(dim=1, stable=True)
    near = min(NEAR, layer.num_experts - 1)  # the last one is itself
    others, scales = others[:, :near], scales.gather(1, others[:, :near])
    for expert in range(layer.num_experts):
        for at, (other, scale) in enumerate(zip(others[expert].tolist(), scales[expert].tolist(), strict=True)):
            lost[expert, at] = _missed(layer, expert, other, scale)
    return others, scales, lost[:, :near]


def _missed(layer: LayerView, expert: int, other: int, scale: float) -> float:
    """Return the share of an expert's gated output energy that another one misses, on tokens not yet compared."""
    token, gate = (part[COMPARED : 2 * COMPARED] for part in layer.routed(expert))
    token, gate = (token, gate) if len(token) >= FEW else layer.routed(expert)
    weight = gate.double().square()[:, None].to(layer.experts.device)
    y = layer.outputs(expert, token).double()
    apart = y - scale * layer.experts.outputs(other, layer.inputs(token)).double()
    energy = float((weight * y.square()).sum())
    return float((weight * apart.square()).sum()) / energy if energy > 0 and len(token) >= FEW else 1.0


def mixed(choices: Sequence[Choice], nbytes: int) -> list[LayerPlan]:
    """Return the best plans with a base in every layer, or without any where that costs less.

    Args:
        choices: what the slots of each layer may become.
        nbytes: bytes that experts and stand-ins of all layers may take.
    """
    if not choices:
        return []
    menus = [choice.menu for choice in choices]
    bases = sum(menu.expert_nbytes for menu in menus)
    found = [cheapest([choice.without_base().menu for choice in choices], nbytes)]
    kept = [max(1, len(menu.must_keep)) for menu in menus]
    least = sum(
        min(menu.price) * (len(menu.errors) - count) + menu.expert_nbytes * count
        for menu, count in zip(menus, kept, strict=True)
    )
    if least + bases <= nbytes:
        found.append(cheapest(menus, nbytes - bases))
    best = min(found, key=lambda chosen: sum(choice.cost(at) for choice, at in zip(choices, chosen, strict=True)))
    return [choice.plan(entries) for choice, entries in zip(choices, best, strict=True)]


def base_of(layer: LayerView) -> Matrices:
    """Return the base of a layer: the mean of all its experts, whichever of them it will serve."""
    return low_rank.base_of(layer, 0, range(layer.num_experts), "mean")


def _errors(layer: LayerView, expert: int, base: Matrices, slots: Sequence[Answer]) -> torch.Tensor:
    """Return what each answer adds to the layer's error, on tokens that it was not fitted on, float64 [slots]."""
    ranks = [getattr(answer, "rank", 0) for answer in slots if not isinstance(answer, LowRank)]
    low = [answer.rank for answer in slots if isinstance(answer, LowRank)]
    maps = linear_maps.held_out_errors(layer, expert, ranks, RIDGE)
    token, gate = layer.routed(expert)
    matrices = layer.experts.expert(expert)
    total, constant = torch.zeros(len(low), dtype=torch.float64), 0.0
    for chooses in linear_maps.folds(layer, token):
        if not bool(chooses.any()) or bool(chooses.all()):
            continue
        weight = gate.double().square()[:, None].to(layer.experts.device)
        y = layer.outputs(expert, token).double()
        mean = (weight * y)[~chooses].sum(0) / weight[~chooses].sum().clamp_min(1e-300)
        constant += float((weight[chooses] * (y[chooses] - mean).square()).sum())
        moments = low_rank.moments_of(layer, expert, matrices, chooses)
        parts = {part: approximate(low_rank.apart(matrices, base, part), c) for part, c in moments.items()}
        x = layer.inputs(token[chooses]).to(matrices["up"])
        for at, rank in enumerate(low):
            reduced = base | {part: (base[part] + found.matrix(rank)).to(base[part]) for part, found in parts.items()}
            given = F.linear(layer.experts.hidden(reduced, x), reduced["down"], reduced.get("down_bias"))
            total[at] += float((weight[chooses] * (y[chooses] - given.double()).square()).sum())
    # As for maps: the constant's error over all tokens, times the share of it that is left on the held-out ones.
    shares = total / constant if constant > 0 else torch.ones_like(total)
    return torch.cat([maps, maps[0] * shares])
