"""Refit: drop experts, and fit the down projections of those that stay to what all of them gave.

Not from a paper. The slots of dropped experts go, so the result is an ordinary checkpoint. Which experts stay is NAEE's
question, answered by exchanging one expert at a time; the router then sends every token to the best of those that stay.
With their gate and up projections as they are, the layer's output is linear in their down projections, so these are
fitted in closed form, one expert after the other for a few rounds, each to what the others leave of the original's
output:

    min over W_e of sum_t |F(x_t) - sum_(j != e) g'_tj f_j(x_t) - g'_te W_e h_e(x_t)|^2 + lambda |(W_e - W_e0) S|^2

with g' the gates among those that stay. One token in eight is never fitted: these tokens say how strong the ridge is,
and whether an expert is better left as it was.

With `neurons=chosen` more experts stay in the same bytes, each with the neurons whose absence costs least (`camera`),
and W_e has a column for each of these. How many neurons is tried on a few layers, one round each: fewer, as long as
that leaves less error on the held-out tokens. All layers get as many, which config.json can say.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from moetailor import ranks
from moetailor.answers import Answer, Drop, Fitted, Keep, Narrow
from moetailor.answers.narrow import cut
from moetailor.errors import MoetailorWarning
from moetailor.fitting.averages import stacked
from moetailor.fitting.held_out import held_out
from moetailor.fitting.work import of_outputs, of_refitted
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.refitted import fitted
from moetailor.methods.registry import register
from moetailor.methods.subsets import PORTION, best_subset
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work

logger = logging.getLogger(__name__)

# Shares of their neurons that experts may keep, tried in this order, and on how many layers.
SHARES = (0.85, 0.7, 0.55, 0.4)
PROBED = 4
# Neurons are a multiple of this, for kernels; of the next one where experts have fewer than sixteen times as many.
MULTIPLES = (64, 8)
# Subsets that are drawn before experts are exchanged.
SAMPLES = 100


@register
@dataclass(frozen=True, kw_only=True)
class Refit(Method):
    """Drop experts and fit the down projections of those that stay to the output of all: native, and fitted.

    Attributes:
        neurons: ``all`` of the experts that stay, or as many as are ``chosen`` for more experts to stay in the same
            bytes, where config.json has an entry for the width of experts alone and no expert is protected.
        rounds: how often each of them is fitted.
        swaps: so many times the best exchange of a kept expert for a dropped one is made, as long as one helps.
        tokens: sampled tokens that subsets are compared on.
        seed: another seed starts at other subsets.
    """

    neurons: Literal["all", "chosen"] = "all"
    rounds: Annotated[int, AtLeast(1)] = 3
    swaps: Annotated[int, AtLeast(0)] = 64
    tokens: Annotated[int, AtLeast(1)] = 1024
    seed: int = 0

    name = "refit"
    needs = frozenset({"tokens", "gate_sq_norm_sq"})
    reads_weights = True
    slow = True
    scores = False
    uses = frozenset({"sensitivity"})
    builds = frozenset({"fitted", "narrow"})

    @property
    def decides_counts(self) -> bool:
        """Where it decides on neurons, too."""
        return self.neurons == "chosen"

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Choose the experts of one layer, which keep all their neurons."""
        return self._plan(layer, keep, layer.shape.intermediate)

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Choose the experts of the layers, and how many neurons they keep."""
        alike = len({(layer.num_experts, layer.shape, keep) for layer, keep in zip(layers, keeps, strict=True)}) == 1
        if self.neurons == "all" or not alike or any(not layer.narrows or layer.protected for layer in layers):
            yield from super().plan_layers(layers, keeps)
            return
        keep, neurons = self._chosen(layers, keeps[0])

        def planned(layer: LayerView) -> LayerPlan:
            found = self._plan(layer, keep, neurons)
            layer.close()
            return found

        yield from ranks.each(layers, planned)

    def _plan(self, layer: LayerView, keep: int, neurons: int) -> LayerPlan:
        """Choose the experts of one layer that stay with so many neurons."""
        every, stays = layer.num_experts, Fitted() if neurons == layer.shape.intermediate else Narrow(neurons)
        options = {"samples": SAMPLES, "swaps": self.swaps, "tokens": self.tokens, "seed": self.seed}
        kept = range(every) if keep == every else best_subset(layer, keep, self.name, exhaustive=0, **options)
        if len(kept) == every and stays == Fitted():
            return untouched(every)

        def slot(number: int) -> Answer:
            if number not in kept:
                return Drop()
            return Keep() if number in layer.protected else stays

        return LayerPlan(slots=tuple(slot(number) for number in range(every)))

    def _chosen(self, layers: Sequence[LayerView], keep: int) -> tuple[int, int]:
        """Return how many experts stay, and how many neurons of each, for layers that are alike.

        Args:
            layers: the layers.
            keep: experts that would stay whole.
        """
        ways = list(_ways(layers[0], keep))
        if len(ways) == 1:
            return ways[0]
        few = min(PROBED, len(layers))
        probed = [layers[round(number * (len(layers) - 1) / max(few - 1, 1))] for number in range(few)]
        best, least = ways[0], float("inf")
        for experts, neurons in ways:

            def lost(layer: LayerView, keep: int = experts, neurons: int = neurons) -> float:
                missing_TD = fitted(layer, self._plan(layer, keep, neurons), rounds=1).missing
                error = _cost(layer) * float(missing_TD[held_out(torch.arange(len(missing_TD)))].square().sum(1).mean())
                layer.close()
                return error

            error = sum(ranks.each(probed, lost))
            logger.info(f"refit: {experts} experts of {neurons} neurons lose {error:.3g} on held-out tokens")
            if error >= least:
                break
            best, least = (experts, neurons), error
        return best

    def work(self, layer: LayerSize) -> Work:
        """Return the work of the search for a subset, with half of the experts and an exchange for every fourth."""
        experts, tokens = layer.experts, min(self.tokens, layer.sampled)
        found = experts * of_outputs(layer.shape, tokens) + Work(products=2 * tokens * experts**2 * layer.shape.width)
        tried = min(self.swaps, experts // 4) * experts**2 // 4 * tokens
        found += Work(products=2 * tried * experts**2, elements=12 * tried * experts, steps=20 * experts)
        # Y Y^T of every token, and five times the gates of the subsets that are tried at once
        at_once = min(max(SAMPLES, experts**2 // 4) * tokens * experts, PORTION)
        return found + Work(nbytes=4 * tokens * experts**2 + 20 * at_once)

    def trying(self, layers: Sequence[LayerSize]) -> Work:
        """Return the work of three ways on the layers where they are tried, with half of the experts."""
        if self.neurons == "all" or not layers:
            return Work()
        layer, ways = layers[0], 3 * min(PROBED, len(layers))
        fits = of_refitted(layer, max(layer.experts // 2, 1), layer.shape.intermediate, 1)
        return ways * (self.work(layer) + fits)

    def building(self, layer: LayerSize, plan: LayerPlan) -> Work:
        """Return the work of the fits."""
        narrow = next(iter(plan.of(Narrow).values()), None)
        neurons = layer.shape.intermediate if narrow is None else narrow.neurons
        return of_refitted(layer, max(len(plan.pool), 1), neurons, self.rounds) if plan.computed else Work()

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the experts that stay with their down projections fitted, some with fewer neurons."""
        stays, downs = self._downs(layer, plan)
        experts = [*downs]
        made = (
            cut(layer.experts.expert(expert), stays[expert]) | {"down": downs.pop(expert).to(layer.experts.dtype)}
            for expert in experts
        )
        found = stacked(made, len(experts))
        return {f"narrow_{name}": stack for name, stack in found.items()} if plan.of(Narrow) else found

    def _downs(
        self, layer: LayerView, plan: LayerPlan
    ) -> tuple[dict[int, torch.Tensor | slice], dict[int, torch.Tensor]]:
        """Return neurons and down projections; what is only there to fit them goes before the experts are stacked."""
        fit = fitted(layer, plan, self.rounds)
        fitted_TE = fit.gates[~held_out(torch.arange(len(fit.gates)))]
        neurons = {expert: down.shape[1] for expert, down in fit.downs.items()}
        reached = {expert: int((fitted_TE[:, expert] > 0).sum()) for expert in neurons}
        if scarce := [reached[expert] for expert in neurons if reached[expert] < neurons[expert]]:
            warnings.warn(
                f"layer {layer.index}: {len(scarce)} of {len(neurons)} experts were fitted on fewer tokens "
                f"({min(scarce)} at least) than they have neurons ({max(neurons.values())}); "
                "keep more with `moetailor calibrate --sample-tokens`",
                MoetailorWarning,
                stacklevel=4,
            )
        return fit.stays, fit.downs


def _ways(layer: LayerView, keep: int) -> Iterator[tuple[int, int]]:
    """Yield how many experts may stay with how many neurons each, in the bytes of some whole ones: fewer and fewer
    neurons, until all experts stay.

    Args:
        layer: one of the layers, which are alike.
        keep: the whole experts.
    """
    width, every, experts = layer.shape.intermediate, layer.num_experts, keep
    multiple = next((each for each in MULTIPLES if width >= 16 * each), MULTIPLES[-1])
    room = (layer.nbytes or keep * layer.expert_bytes) + keep * layer.slot_bytes
    one, two = (answers_nbytes([Narrow(neurons)], layer.shape, layer.dtype) for neurons in (1, 2))

    def most(experts: int) -> int:
        """Return how many neurons so many experts may keep."""
        return (1 + (room // experts - layer.slot_bytes - one) // (two - one)) // multiple * multiple

    yield keep, width
    for share in SHARES:
        if experts == every:
            return
        neurons = int(share * width) // multiple * multiple
        more = room // (one + (neurons - 1) * (two - one) + layer.slot_bytes) // layer.groups * layer.groups
        if neurons and experts < more:
            experts = min(more, every)
            if (left := most(experts)) < width:
                yield experts, left


def _cost(layer: LayerView) -> float:
    """Return what an error of a layer costs: nats where calibration priced it, else as a part of what experts give."""
    if layer.sensitivity is not None:
        return layer.sensitivity
    return float(layer.sums.tokens / layer.sums.gate_sq_norm_sq.sum())
