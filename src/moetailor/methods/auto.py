"""Auto: for every slot of every layer the answer that costs least, within one budget of bytes for the whole model.

Not from a paper. The menu of a slot: its own expert, nothing where no token reached it, another expert with a scale, a
constant, a linear map of some rank (`linear`), or the layer's base, alone or with a part of low rank (`lightmoe`). Each
answer is priced in bytes, and in what it adds to the squared error of its layer's output on tokens that it was not
fitted on, times what such an error costs the predictions, as calibration measured it (`--sensitivity`). Which answers
to take is then one knapsack over all slots of all layers, so layers and experts get as much as they are worth. In it a
domain of the calibration text that has few tokens counts for more than these, or what they alone need would go first.
``--remove`` stands for the bytes that MoNE writes at that ratio. With ``bits`` experts may stay in few bits, too.

Left out: experts made of several, which lose to a base with parts of low rank at all bytes that were measured, and take
as long to price as to build.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch.nn import functional as F

from moetailor.answers import Answer, Constant, Drop, Keep, Linear, LowRank, Packed, Remap, Width
from moetailor.calibration.domains import balanced
from moetailor.checkpoint.files import DTYPES
from moetailor.errors import PlanError
from moetailor.fitting import linear_maps, low_rank
from moetailor.fitting.averages import Matrices
from moetailor.fitting.distances import functional_distances
from moetailor.fitting.held_out import held_out_masks
from moetailor.fitting.menu import Menu, cheapest
from moetailor.fitting.whitened import approximate
from moetailor.fitting.widths import WIDTHS, held_out_errors
from moetailor.methods.method import AtLeast, JointMethod
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView

LINEAR = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
LOW = (*range(0, 33, 2), 36, 40, 44, 48, 56, 64, 96, 128, 192, 256)
RIDGE = 0.01
# Other experts that may answer a slot, the sampled tokens of each expert that they are compared on, and the fewest on
# which the loss is measured then.
NEAR, COMPARED, FEW = 2, 64, 8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the slots of a layer may become.

    Attributes:
        answers: the answers that each expert may become, or the widths that it may stay in, in the order of the menu's
            entries; the last is the expert itself, for which the menu has no entry.
        menu: what they cost, in nats times `weight`.
        weight: what errors of each expert weigh, [E].
        scores: what a constant in place of each expert costs, in nats.
    """

    answers: list[list[Answer | Width]]
    menu: Menu
    weight: torch.Tensor
    scores: tuple[float, ...]

    def plan(self, entries: Sequence[int]) -> LayerPlan:
        """Return the plan in which each expert becomes its answer of a number."""
        low = [expert for expert, at in enumerate(entries) if isinstance(self.answers[expert][at], LowRank)]
        # A base with a single member takes as many bytes as that expert, which loses nothing.
        entries = [len(self.menu.price) if low == [expert] else at for expert, at in enumerate(entries)]
        found = [answers[at] for answers, at in zip(self.answers, entries, strict=True)]
        widths = {expert: width for expert, width in enumerate(found) if isinstance(width, Width)}
        chosen = [Keep() if isinstance(answer, Width) else answer for answer in found]
        base = next((expert for expert, answer in enumerate(chosen) if isinstance(answer, LowRank)), 0)
        slots = [replace(answer, base=base) if isinstance(answer, LowRank) else answer for answer in chosen]
        errors = self.menu.errors / self.weight[:, None]
        expected = _cost(errors, entries)
        return LayerPlan(slots=tuple(slots), scores=self.scores, expected=expected, widths=widths)

    def cost(self, entries: Sequence[int]) -> float:
        """Return what such a plan costs on the menu."""
        return _cost(self.menu.errors, entries)

    def without_base(self) -> Choice:
        """Return the same without low-rank answers."""
        low = torch.tensor([isinstance(answer, LowRank) for answer in self.answers[0][:-1]])
        return replace(self, menu=replace(self.menu, errors=self.menu.errors.masked_fill(low, torch.inf)))


def _cost(errors: torch.Tensor, entries: Sequence[int]) -> float:
    return sum(float(errors[expert, at]) for expert, at in enumerate(entries) if at < errors.shape[1])


@register
@dataclass(frozen=True, kw_only=True)
class Auto(JointMethod):
    """Choose for every slot what costs the predictions least for its bytes, over all layers together.

    Attributes:
        balance: how domains of the calibration text share the budget: 0 by their tokens, 1 all alike.
        bits: put experts in few bits on the menu, in place of low ranks over bases, which then are never chosen.
    """

    balance: Annotated[float, AtLeast(0)] = 0.75
    bits: bool = False

    name = "auto"
    replaces_with = Constant
    needs = frozenset({"tokens", "count", "gate", "gate_sq", "gate_sq_output", "gate_sq_norm_sq", "sensitivity"})
    reads_weights = True
    builds = frozenset({"constant", "linear", "low_rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance > 1:
            raise PlanError(f"balance={self.balance}: at 1 all domains count alike; give a number from 0 to 1")

    @property
    def decides_counts(self) -> bool:
        """Always."""
        return True

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide for all layers, in the bytes of kept experts and novices for the others."""
        choices = []
        for layer in layers:
            choices.append(_choice(layer, self.balance, self.bits))
            layer.close()
        nbytes = sum(layer.nbytes or _novices(layer, keep) for layer, keep in zip(layers, keeps, strict=True))
        for choice, entries in zip(choices, _cheapest(nbytes, choices), strict=True):
            yield choice.plan(entries)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the tensors of constants and linear maps, and of low-rank experts over the layer's base."""
        found = linear_maps.build_maps(layer, plan, RIDGE) if plan.of(Constant) or plan.of(Linear) else {}
        return found | (low_rank.built_on(layer, plan, [_base(layer)], "fitted") if plan.of(LowRank) else {})


def _choice(layer: LayerView, balance: float, bits: bool = False) -> Choice:
    """Return what the slots of a layer may become, errors in nats."""
    slots, experts = _menu(layer, low=not bits), range(layer.num_experts)
    if bits:
        ranks = [getattr(answer, "rank", 0) for answer in slots]
        errors = torch.stack([linear_maps.held_out_errors(layer, expert, ranks, RIDGE) for expert in experts])
    else:
        base = _base(layer)
        errors = torch.stack([_errors(layer, expert, base, slots) for expert in experts])
    widths = WIDTHS if bits else ()
    noise = errors[:, :1] * (held_out_errors(layer, widths, dtype=DTYPES[layer.dtype]) if bits else errors[:, :0])
    others, scales, shares = _nearest(layer)
    sums, dead = layer.sums, layer.sums.count == 0
    lost = (sums.gate_sq_norm_sq / sums.tokens)[:, None] * shares
    # A slot that no token reached is dropped: what another expert would do there is not known.
    lost[dead] = torch.inf
    drop = torch.where(dead & (layer.groups == 1), 0.0, torch.inf)[:, None].double()
    assert layer.sensitivity is not None
    scores = (layer.sensitivity * errors[:, 0]).tolist()
    if bits:
        assert layer.rounding is not None
        # That no token reached it may be the text's doing, and in the fewest bits it costs little.
        errors[dead], drop = torch.inf, torch.full_like(drop, torch.inf)
    protected = sorted(layer.protected)
    errors[protected], lost[protected], drop[protected] = torch.inf, torch.inf, torch.inf
    answers = [
        [
            *slots,
            *widths,
            *map(_answered, others[expert].tolist(), scales[expert].tolist()),
            Drop(),
            Keep(),
        ]
        for expert in experts
    ]
    requires = F.pad(others, (len(slots) + len(widths), 1), value=-1)
    weight = _weight(layer, balance)
    coarse, fine = layer.sensitivity, layer.rounding or 0.0
    menu = Menu(
        errors=weight[:, None] * torch.cat([coarse * errors, fine * noise, coarse * lost, drop], 1),
        price=[
            *(_nbytes(layer, slot) for slot in slots),
            *(_nbytes(layer, Packed.of(width)) for width in widths),
            *[0] * (others.shape[1] + 1),
        ],
        expert_nbytes=layer.expert_bytes,
        must_keep=() if bits else layer.protected,
        requires=requires,
        keeping=range(len(slots), len(slots) + len(widths)),
    )
    return Choice(answers=answers, menu=menu, weight=weight, scores=tuple(scores))


def _weight(layer: LayerView, balance: float) -> torch.Tensor:
    """Return what errors of each expert weigh when domains are balanced: the mean of its tokens' weights by squared
    gates, 1 where no token reached it, float64 [E].
    """
    gate_sq, index = layer.sample.gate.double().square(), layer.sample.index.long().flatten()
    weighed = gate_sq * balanced(layer.domains, balance)[:, None]
    total, mass = (torch.zeros(layer.num_experts).double().index_add(0, index, q.flatten()) for q in (weighed, gate_sq))
    return torch.where(mass > 0, total / mass, 1.0)


def _menu(layer: LayerView, *, low: bool = True) -> list[Answer]:
    """Return what a slot may become beside its own expert, as far as it is smaller; a constant first."""
    answers: list[Answer] = [Linear(rank) if rank else Constant() for rank in LINEAR]
    answers += [LowRank(0, rank) for rank in LOW] if low else []
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
    apart = y - scale * layer.experts.outputs(other, layer.sample.hidden[token]).double()
    energy = float((weight * y.square()).sum())
    return float((weight * apart.square()).sum()) / energy if energy > 0 and len(token) >= FEW else 1.0


def _novices(layer: LayerView, keep: int) -> int:
    """Return the bytes of kept experts and novices for the others."""
    return keep * layer.expert_bytes + (layer.num_experts - keep) * _nbytes(layer, Constant())


def _cheapest(nbytes: int, choices: Sequence[Choice]) -> list[list[int]]:
    """Return the best answers with a base in every layer, or without any where that costs less."""
    if not choices:
        return []
    menus = [choice.menu for choice in choices]
    bases = sum(menu.expert_nbytes for menu in menus)
    found = [cheapest([choice.without_base().menu for choice in choices], nbytes)]
    if not any(isinstance(answer, LowRank) for answer in choices[0].answers[0]):
        return found[0]
    kept = [max(1, len(menu.must_keep)) for menu in menus]
    least = sum(
        min(menu.price) * (len(menu.errors) - count) + menu.expert_nbytes * count
        for menu, count in zip(menus, kept, strict=True)
    )
    if least + bases <= nbytes:
        found.append(cheapest(menus, nbytes - bases))
    return min(found, key=lambda chosen: sum(choice.cost(at) for choice, at in zip(choices, chosen, strict=True)))


def _base(layer: LayerView) -> Matrices:
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
    for chooses in held_out_masks(token, linear_maps.SCARCE * layer.sample.hidden.shape[1]):
        if not bool(chooses.any()) or bool(chooses.all()):
            continue
        weight = gate.double().square()[:, None].to(layer.experts.device)
        y = layer.outputs(expert, token).double()
        mean = (weight * y)[~chooses].sum(0) / weight[~chooses].sum().clamp_min(1e-300)
        constant += float((weight[chooses] * (y[chooses] - mean).square()).sum())
        parts = {}
        for part in low_rank.parts_of(layer):
            moment = low_rank.moment_of(layer, expert, matrices, part, ~chooses)
            parts[part] = approximate(low_rank.apart(matrices, base, part), moment)
        x = layer.sample.hidden[token[chooses]].to(matrices["up"])
        for at, rank in enumerate(low):
            reduced = base | {part: (base[part] + found.matrix(rank)).to(base[part]) for part, found in parts.items()}
            given = F.linear(layer.experts.hidden(reduced, x), reduced["down"], reduced.get("down_bias"))
            total[at] += float((weight[chooses] * (y[chooses] - given.double()).square()).sum())
    # As for maps: the constant's error over all tokens, times the share of it that is left on the held-out ones.
    shares = total / constant if constant > 0 else torch.ones_like(total)
    return torch.cat([maps, maps[0] * shares])
