"""LightMoE: replace weak experts by a shared base and a part of low rank for each (arXiv:2603.12645).

Published: in each layer the experts with the least gate mass, up to a share that a layer with larger router logits
lowers, become W_base + B A. A base is the gate-weighted average of a group; groups gather around the members with the
most gate mass by the cosine of router logits; B starts at zero. The originals are faded out while bases and the parts
of low rank are fine-tuned (`moetailor recover --anneal`), and ratios are of all parameters, so ``--remove 50%`` halves
the checkpoint. Which gates, which cosine and which start of A are not said: here the gates that enter the layer's sum,
the cosine over sampled tokens, and a normal distribution with the variance of 1 / inputs.

Here: the same by default. Beyond it, by parameters: bases by least squares on what experts see, parts of low rank that
start as the best approximation of what the base lacks on these inputs, down projections fitted in closed form to what
the other matrices then leave, and ranks by how much each takes away. `keep` counts what is stored: kept experts and
bases.

The form of D2-MoE (arXiv:2502.17298), one base and a part of low rank for every expert, is ``--keep 2`` with
``bases=1``, ``select=count``, ``start=svd`` and a rank that fits the bytes: one expert of a layer stays whole, and the
base is weighted by gate mass, where D2-MoE takes Fisher information; the base is not pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch.nn import functional as F

from moetailor.answers import Keep, LowRank
from moetailor.errors import PlanError
from moetailor.fitting.cluster import nearest
from moetailor.fitting.low_rank import apart, base_of, bases_of, built_on, low_rank_nbytes, moments_of
from moetailor.fitting.whitened import approximate, energy
from moetailor.methods.choose import refuse_protected, top
from moetailor.methods.method import AtLeast, JointMethod
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class LightMoE(JointMethod):
    """Replace the experts with the least gate mass by shared bases with parts of low rank, made for recovery.

    Attributes:
        bases: bases of a layer.
        rank: rank of the low-rank parts.
        select: ``adaptive`` (paper) replaces a share of each layer's gate mass that falls with the size of its router
            logits, ``uniform`` the same share in every layer, ``count`` the same number of experts.
        alpha: how much the share falls.
        clip: how far it may be from the common one, as a part of that.
        base: the gate-weighted ``average`` (paper), the plain ``mean``, the ``least_squares`` fit to what the members
            see, or the ``dominant`` member itself.
        start: low-rank parts start at ``zero`` (paper), as the ``svd`` of what the base lacks, weighted by the inputs,
            or ``fitted``: the same, but for a down projection that makes up for what the other matrices lost.
        ranks: ``given`` uses `rank` everywhere; ``chosen`` spends as many rows where they take most away.
    """

    bases: Annotated[int, AtLeast(1)] = 3
    rank: Annotated[int, AtLeast(0)] = 16
    select: Literal["adaptive", "uniform", "count"] = "adaptive"
    alpha: Annotated[float, AtLeast(0)] = 0.3
    clip: Annotated[float, AtLeast(0)] = 0.2
    base: Literal["average", "mean", "least_squares", "dominant"] = "average"
    start: Literal["zero", "svd", "fitted"] = "zero"
    ranks: Literal["given", "chosen"] = "given"

    name = "lightmoe"
    paper = "arXiv:2603.12645"
    replaces_with = LowRank
    needs = frozenset({"gate", "gate_sq_norm_sq"})
    reads_weights = True
    remove_counts_bytes = True
    trained = True
    builds = frozenset({"low_rank"})

    @property
    def decides_counts(self) -> bool:
        """Whether layers replace shares of their gate mass."""
        return self.select != "count"

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide for all layers; what a layer keeps counts its bases too."""
        for layer in layers:
            if low_rank_nbytes(layer, self.rank) >= layer.expert_bytes:
                raise PlanError(
                    f"rank={self.rank}: such a low-rank part is no smaller than an expert of layer {layer.index} "
                    f"({layer.expert_bytes:,} bytes); ask for a lower rank"
                )
        counts = [self._replaced(layer, keep) for layer, keep in zip(layers, keeps, strict=True)]
        if layers and self.select != "count":
            factors = _factors(layers, self.alpha, self.clip) if self.select == "adaptive" else [1.0] * len(layers)
            counts = self._by_mass(layers, factors, counts)
        for layer, (count, bases) in zip(layers, counts, strict=True):
            plan = _grouped(layer, count, bases, self.rank)
            yield _with_chosen_ranks(layer, plan, self.rank, self.base) if self.ranks == "chosen" and count else plan
            layer.close()

    def _replaced(self, layer: LayerView, keep: int) -> tuple[int, int]:
        """Return how many experts are replaced, and by how many bases, when `keep` of both are stored."""
        refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
        if keep >= layer.num_experts:
            return 0, 0
        bases = max(1, min(self.bases, keep - max(1, len(layer.protected))))
        if keep - bases < max(1, len(layer.protected)):
            raise PlanError(
                f"layer {layer.index}: {keep} experts stay and {len(layer.protected)} of them are protected, which "
                "leaves no room for a base; keep more or protect fewer"
            )
        return layer.num_experts - keep + bases, bases

    def _by_mass(
        self, layers: Sequence[LayerView], factors: Sequence[float], counts: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return how many experts each layer replaces when phat is the lowest that meets the bytes of all layers.

        Args:
            layers: the layers.
            factors: p_j / phat of each.
            counts: replaced experts and bases of each when all replace as many.
        """
        if not any(count for count, _ in counts):
            return list(counts)
        mass = [_mass(layer).sort().values.cumsum(0) for layer in layers]

        def at(phat: float) -> list[tuple[int, int]]:
            found = []
            for layer, total, factor, (_, bases) in zip(layers, mass, factors, counts, strict=True):
                # the shortest prefix, in ascending G, whose gate mass exceeds p_j
                count = int((total <= factor * phat).sum()) + 1
                count = min(count, layer.num_experts - max(1, len(layer.protected)))
                bases = bases or self.bases
                found.append((count, min(bases, count)) if count > bases else (0, 0))
            return found

        def nbytes(phat: float) -> int:
            return sum(
                (layer.num_experts - count + bases) * layer.expert_bytes + count * low_rank_nbytes(layer, self.rank)
                for layer, (count, bases) in zip(layers, at(phat), strict=True)
            )

        allowed, low, high = sum(layer.nbytes for layer in layers), 0.0, 2.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if nbytes(middle) <= allowed else (middle, high)
        return at(high)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the tensors of the low-rank experts of the plan, see `LowRank`."""
        bases = [base_of(layer, named, list(members), self.base) for named, members in bases_of(plan).items()]
        return built_on(layer, plan, bases, self.start)

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return kept experts, and the others over as many bases as the count leaves room for."""
        if keep >= experts:
            return untouched(experts)
        bases = max(1, min(self.bases, keep - 1))
        kept = keep - bases
        named = [min(number, kept + bases - 1) for number in range(kept, experts)]
        return LayerPlan(slots=(*(Keep(),) * kept, *(LowRank(base, self.rank) for base in named)))


def _mass(layer: LayerView) -> torch.Tensor:
    """Return G_i = sum_x g_i / sum_j sum_x g_j, [E]; protected experts come last in its order."""
    mass = layer.sums.gate / layer.sums.gate.sum().clamp_min(1e-300)
    mass[list(layer.protected)] += 2
    return mass


def _factors(layers: Sequence[LayerView], alpha: float, clip: float) -> list[float]:
    """Return p_j / phat = clip(exp(-alpha (norm_j - 1)), 1 - clip, 1 + clip) of each layer."""
    norms = torch.stack([layer.sample.logits.norm(dim=1).double().mean() for layer in layers])
    factor = torch.exp(-alpha * (norms / norms.mean().clamp_min(1e-300) - 1))
    return factor.clamp(1 - clip, 1 + clip).tolist()


def _grouped(layer: LayerView, count: int, bases: int, rank: int) -> LayerPlan:
    """Return the plan that replaces some experts, grouped around those of them with the most gate mass."""
    mass = _mass(layer)
    kept = set(top(layer, mass, layer.num_experts - count))
    replaced = [expert for expert in range(layer.num_experts) if expert not in kept]
    if not replaced:
        return untouched(layer.num_experts)
    dominant = sorted(sorted(replaced, key=lambda expert: (-float(mass[expert]), expert))[:bases])
    columns = F.normalize(layer.sample.logits.double(), dim=0)
    base = nearest(1 - columns.T @ columns, dominant)
    slots = [Keep() if number in kept else LowRank(base[number], rank) for number in range(layer.num_experts)]
    return LayerPlan(slots=tuple(slots), scores=tuple(layer.sums.gate.tolist()))


def _with_chosen_ranks(layer: LayerView, plan: LayerPlan, rank: int, base: str) -> LayerPlan:
    """Return the plan with the rows of all low-rank parts spent one by one where they take most away.

    What the r-th row of an expert takes away is priced by sum g^2 |y|^2 times the sum over its matrices of
    s_r^2 / tr W C W^T, with s_r the singular values of (W_n - W_base) L.
    """
    gains = []
    for named, members in bases_of(plan).items():
        matrices = base_of(layer, named, list(members), base)
        for member in members:
            expert, gain = layer.experts.expert(member), torch.zeros(1, dtype=torch.float64)
            for part, moment in moments_of(layer, member, expert).items():
                values = approximate(apart(expert, matrices, part), moment).values.cpu()
                share = values.square() / max(energy(expert[part], moment), 1e-300)
                size = max(len(gain), len(share))
                gain = F.pad(gain, (0, size - len(gain))) + F.pad(share, (0, size - len(share)))
            weight = float(layer.sums.gate_sq_norm_sq[member])
            gains += [(float(value) * weight, -at, member) for at, value in enumerate(gain)]
    spent = dict.fromkeys(plan.of(LowRank), 0)
    for _, _, member in sorted(gains, reverse=True)[: rank * len(spent)]:
        spent[member] += 1
    slots = tuple(replace(s, rank=spent[n]) if isinstance(s, LowRank) else s for n, s in enumerate(plan.slots))
    return LayerPlan(slots=slots, scores=plan.scores)
