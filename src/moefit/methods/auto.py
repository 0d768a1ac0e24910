"""Auto: for every slot of every layer the answer that loses least, within one budget of bytes for the whole model.

Not from a paper. The menu of a slot: its own expert, a constant, a linear map of some rank (`linear`), or the layer's
base, alone or with an own part of some rank (`lightmoe`). Each answer is priced in bytes, and in what it adds to the
squared error of its layer's output on tokens that it was not fitted on. Which answers to take is then one knapsack
over all slots of all layers, so layers and experts get as much as they are worth. ``--remove`` stands for the bytes
that MoNE writes at that ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch.nn import functional as F

from moefit.fitting.held_out import choosing
from moefit.fitting.menu import Menu, cheapest
from moefit.fitting.whitened import approximate
from moefit.methods import lightmoe, linear
from moefit.methods.merge import Matrices
from moefit.methods.registry import method
from moefit.planning.plan import stand_in_nbytes
from moefit.planning.slots import LayerPlan, Slot
from moefit.planning.view import LayerView

LINEAR = (0, 2, 4, 8, 16, 32, 64, 128)
LOW = (0, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
RIDGE = 0.01


def build(layer: LayerView, plan: LayerPlan, **_: object) -> dict[str, torch.Tensor]:
    """Return what `linear` and `lightmoe` build for their kinds of slots."""
    found = linear.build(layer, plan, ridge=RIDGE, shrinkage=0.0) if plan.stand_ins else {}
    return found | (lightmoe.built_on(layer, plan, [_base(layer)], "svd") if plan.bases else {})


@method(
    "auto",
    removed="constant",
    needs={"tokens", "count", "gate", "gate_sq", "gate_sq_output", "gate_sq_norm_sq"},
    weights=True,
    scoped=True,
    slow=True,
    builds={"constant", "linear", "lowrank"},
    build=build,
)
def auto(
    layers: Sequence[LayerView], keeps: Sequence[int], *, weights: Literal["flat", "relative"] = "relative"
) -> Iterator[LayerPlan]:
    """Choose for every slot what loses least for its bytes: its expert, a constant, a linear map, or a base and a part.

    Args:
        layers: the layers.
        keeps: experts that MoNE would keep in each; what they and its novices take is the budget.
        weights: an error counts the same in every layer (``flat``) or as a share of what constants would lose there
            (``relative``).
    """
    answers, menus = [], []
    for layer in layers:
        slots, base = _menu(layer), _base(layer)
        errors = torch.stack([_errors(layer, expert, base, slots) for expert in range(layer.num_experts)])
        scale = float(errors[:, 0].sum()) if weights == "relative" else 1.0
        price = [_nbytes(layer, slot) for slot in slots]
        menus.append(
            Menu(errors=errors / max(scale, 1e-300), price=price, whole=layer.expert_bytes, kept=layer.protected)
        )
        answers.append([*slots, Slot("expert")])
        layer.close()
    nbytes = sum(layer.nbytes or _novices(layer, keep) for layer, keep in zip(layers, keeps, strict=True))
    for slots, menu, taken in zip(answers, menus, _taken(nbytes, menus, answers), strict=True):
        named = next((expert for expert, at in enumerate(taken) if slots[at].kind == "lowrank"), None)
        chosen = [_answer(slots[at], expert, named) for expert, at in enumerate(taken)]
        yield LayerPlan(slots=tuple(chosen), scores=tuple(menu.errors[:, 0].tolist()))


def _menu(layer: LayerView) -> list[Slot]:
    """Return what a slot may become beside its own expert, as far as it is smaller; a constant first."""
    slots = [Slot("linear", rank=rank) if rank else Slot("constant") for rank in LINEAR]
    slots += [Slot("lowrank", rank=rank) for rank in LOW]
    return [slot for slot in slots if _nbytes(layer, slot) < layer.expert_bytes]


def _nbytes(layer: LayerView, slot: Slot) -> int:
    """Return the bytes of an answer, without the base."""
    if slot.kind == "lowrank":
        return lightmoe.own_bytes(layer, slot.rank)
    return stand_in_nbytes([slot.rank], False, layer.sample.hidden.shape[1], layer.itemsize)


def _answer(slot: Slot, expert: int, base: int | None) -> Slot:
    return Slot(slot.kind, {"expert": expert, "lowrank": base}.get(slot.kind), rank=slot.rank)


def _novices(layer: LayerView, keep: int) -> int:
    """Return the bytes of kept experts and novices for the others."""
    return keep * layer.expert_bytes + (layer.num_experts - keep) * _nbytes(layer, Slot("constant"))


def _taken(nbytes: int, menus: Sequence[Menu], answers: Sequence[Sequence[Slot]]) -> list[list[int]]:
    """Return the best choice with a base in every layer, or without any where that loses less."""
    if not menus:
        return []
    bases = sum(menu.whole for menu in menus)
    choices = [cheapest([_without_low(menu, slots) for menu, slots in zip(menus, answers, strict=True)], nbytes)]
    whole = [max(1, len(menu.kept)) for menu in menus]
    least = sum(
        min(menu.price) * (len(menu.errors) - count) + menu.whole * count
        for menu, count in zip(menus, whole, strict=True)
    )
    if least + bases <= nbytes:
        choices.append(cheapest(menus, nbytes - bases))
    return min(choices, key=lambda choice: sum(map(_lost, menus, choice)))


def _without_low(menu: Menu, slots: Sequence[Slot]) -> Menu:
    """Return the same menu with low-rank entries that nobody can pay."""
    beyond = (len(menu.errors) + 1) * menu.whole
    price = [beyond if slot.kind == "lowrank" else price for slot, price in zip(slots, menu.price, strict=False)]
    return replace(menu, price=price)


def _lost(menu: Menu, taken: Sequence[int]) -> float:
    return sum(float(menu.errors[expert, at]) for expert, at in enumerate(taken) if at < menu.errors.shape[1])


def _base(layer: LayerView) -> Matrices:
    """Return the base of a layer: the average of all its experts by gate mass, whichever of them it will serve."""
    return lightmoe.base_of(layer, 0, range(layer.num_experts), "average")


def _errors(layer: LayerView, expert: int, base: Matrices, slots: Sequence[Slot]) -> torch.Tensor:
    """Return what each answer adds to the layer's error, on tokens that it was not fitted on, float64 [slots]."""
    ranks = [slot.rank for slot in slots if slot.kind != "lowrank"]
    low = [slot.rank for slot in slots if slot.kind == "lowrank"]
    maps = linear.held_out_errors(layer, expert, ranks, RIDGE)
    token, gate = layer.routed(expert)
    one = layer.experts.one(expert)
    total, constant = torch.zeros(len(low), dtype=torch.float64), 0.0
    for held in choosing(token, linear.SCARCE * layer.sample.hidden.shape[1]):
        if not bool(held.any()) or bool(held.all()):
            continue
        weight = gate.double().square()[:, None].to(layer.experts.device)
        y = layer.outputs(expert, token).double()
        mean = (weight * y)[~held].sum(0) / weight[~held].sum().clamp_min(1e-300)
        constant += float((weight[held] * (y[held] - mean).square()).sum())
        parts = {}
        for part in lightmoe.parts_of(layer):
            moment = lightmoe.moment_of(layer, expert, one, part, ~held)
            parts[part] = approximate(one[part].double() - base[part].double(), moment)
        x = layer.sample.hidden[token[held]].to(one["up"])
        for at, rank in enumerate(low):
            small = base | {part: (base[part] + found.matrix(rank)).to(base[part]) for part, found in parts.items()}
            given = F.linear(layer.experts.hidden(small, x), small["down"], small.get("down_bias"))
            total[at] += float((weight[held] * (y[held] - given.double()).square()).sum())
    # As for maps: the constant's error over all tokens, times the share of it that is left on the held-out ones.
    shares = total / constant if constant > 0 else torch.ones_like(total)
    return torch.cat([maps, maps[0] * shares])
