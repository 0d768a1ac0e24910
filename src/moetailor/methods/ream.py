"""REAM: merge what REAP would drop into the experts that stay (arXiv:2604.04356).

Published: the most salient experts (by REAP) stay; going from the most salient one down, each takes its nearest free
experts until its group is full, so most stay alone and the least salient are packed together. Nearness is the mean of
the cosine of gated outputs and that of router logits. Neurons are matched (Hungarian, by hidden activations and
weights reduced to 64 principal components), experts averaged by saliency, the router is cut to the rows that stay, and
each layer is fitted on what the merged ones before it give.

The released code (SamsungSAILMontreal/ream, commit 84a3030) gates twice: it takes REAP's mean of outputs that are
already multiplied by their gates, so saliency, which ranks the experts and weighs them in the average, is the mean of
g^2 |f|. Its gates are the softmax over all experts whatever the router does with them, an expert that no token reached
has the least saliency of the others, and likeness is that of mean gated outputs.

Here: as published, with the saliency of the released code, which merges better, and the gates that the model used; an
expert that no token reached weighs nothing. The last step is `moetailor apply --propagate compressed`. The result is
native where groups of the router do not stand against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.nn import functional as F

from moetailor.answers import Drop
from moetailor.fitting.align import match, neuron_distance, neuron_weights
from moetailor.fitting.averages import averages
from moetailor.fitting.distances import output_gram
from moetailor.methods.choose import drop_lowest
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView

COMPONENTS = 64
# The sum over routed tokens whose mean is the saliency.
SALIENCIES = {"gate_squared": "gate_sq_norm", "gate": "gated_norm"}


@register
@dataclass(frozen=True, kw_only=True)
class Ream(Method):
    """Merge the least salient experts into the most salient ones that are like them, and drop their slots.

    Attributes:
        saliency: ``gate_squared`` is the mean of g^2 |f| (released code), ``gate`` the mean of g |f| (paper, as REAP).
        group: the most experts that become one.
        tokens: sampled tokens that every expert is run on, for likeness and for matching neurons.
    """

    saliency: Literal["gate_squared", "gate"] = "gate_squared"
    group: Annotated[int, AtLeast(2)] = 16
    tokens: Annotated[int, AtLeast(1)] = 1024

    name = "ream"
    paper = "arXiv:2604.04356"
    needs = frozenset({"count", "gate_sq_norm", "gated_norm"})
    reads_weights = True
    builds = frozenset({"merged"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Group the experts of one layer."""
        # S_e = sum_t g_te^2 |f_e(x_t)| / N_e, or REAP's sum_t g_te |f_e(x_t)| / N_e
        salience = layer.mean(SALIENCIES[self.saliency])
        kept = drop_lowest(layer, salience, keep).pool
        likeness = _likeness(layer, self.tokens)
        centres, free = list(range(layer.num_experts)), set(range(layer.num_experts)) - set(kept)
        for centroid in sorted(set(kept) - layer.protected, key=lambda expert: (-float(salience[expert]), expert)):
            ranked = sorted(free, key=lambda expert: (-float(likeness[centroid, expert]), expert))
            for expert in ranked[: self.group - 1]:
                centres[expert] = centroid
            free -= set(ranked[: self.group - 1])
        # What no group had room for is dropped.
        return _with_dropped(merge_into(centres, salience.tolist(), drop=True), free)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the saliency-weighted average of each group, neurons matched to those of its centroid."""

        def order(layer: LayerView, centre: int, member: int) -> torch.Tensor:
            return match(_activations(layer, centre, member, self.tokens) + _weights(layer, centre, member))

        return averages(layer, plan, layer.mean(SALIENCIES[self.saliency]), order)


def _with_dropped(plan: LayerPlan, dropped: set[int]) -> LayerPlan:
    slots = tuple(Drop() if number in dropped else answer for number, answer in enumerate(plan.slots))
    return LayerPlan(slots=slots, scores=plan.scores)


def _likeness(layer: LayerView, tokens: int) -> torch.Tensor:
    """Return the mean of two cosines of each pair of experts, of gated outputs and of router logits, [E, E].

    Gated outputs are those of all experts on the same tokens, each times the router's probability of the expert.
    """
    logits = layer.sample.logits[:tokens].double()
    gated = output_gram(layer, tokens, logits.softmax(1))
    norm = gated.diagonal().clamp_min(1e-300).sqrt()
    columns = F.normalize(logits, dim=0)
    return (gated / norm[:, None] / norm + columns.T @ columns) / 2


def _activations(layer: LayerView, centre: int, member: int, tokens: int) -> torch.Tensor:
    x_TD = layer.sample.hidden[:tokens]
    rows = [layer.experts.hidden(layer.experts.expert(expert), x_TD).T for expert in (centre, member)]
    return _scaled(neuron_distance(*rows))


def _weights(layer: LayerView, centre: int, member: int) -> torch.Tensor:
    rows = torch.cat([neuron_weights(layer.experts.expert(expert)).double() for expert in (centre, member)])
    _, _, basis = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    reduced = rows @ basis[:COMPONENTS].T
    return _scaled(neuron_distance(*reduced.chunk(2)))


def _scaled(cost: torch.Tensor) -> torch.Tensor:
    """Return distances with a mean of 1, so that two kinds of them weigh the same."""
    distance = cost.sqrt()
    return distance / distance.mean().clamp_min(1e-300)
