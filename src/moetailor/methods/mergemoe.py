"""MergeMoE: merge experts by fitting their outputs in closed form (arXiv:2510.14436).

Published: the most used experts are centres, every other expert joins the centre whose concatenated gate and up weights
point most like its own (cosine), gate and up projections are averaged by usage, and the down projection is the least
squares fit of the usage-weighted mean of the members' outputs, by pseudo-inverse, on a few samples.

Here by default: the same, the fit on all sampled tokens for every cluster (the paper does not say which). Beyond it, by
parameters: a ridge towards the average, chosen for each cluster on held-out tokens, which takes away the cliff where
there are about as many tokens as neurons; the token's own gates in the target; other features than the average of gate
and up, chosen on the same held-out tokens; and clusters by what experts do. With a ridge the plain average and the
plain centre are candidates too, so the fit is no worse than either. All of it at once: `-p fit=ridge -p target=gated
-p features=best -p cluster=outputs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from moetailor.answers import Merged
from moetailor.answers.merged import clusters
from moetailor.errors import MoetailorWarning
from moetailor.fitting.align import match, neuron_distance
from moetailor.fitting.averages import Matrices, average, shares, stacked
from moetailor.fitting.cluster import medoids, nearest
from moetailor.fitting.distances import EPSILON, functional_distances, weight_products
from moetailor.fitting.held_out import held_out_masks
from moetailor.fitting.least_squares import RIDGES, SCARCE, NormalEquations, pseudo_inverse, ridge, ridge_errors
from moetailor.methods.choose import top
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView

# Tokens that go through the features at once, and tokens that neurons are matched on.
BLOCK, MATCHED = 4096, 1024
# A candidate must lose less than the plain average by a share of at least this over the number of held-out tokens.
CHANCE = 4.0
FEATURES = ("average", "aligned", "centre", "selected")


@register
@dataclass(frozen=True, kw_only=True)
class MergeMoE(Method):
    """Merge experts into the most used ones and fit their outputs by least squares.

    Attributes:
        fit: ``pinv`` (paper) or ``ridge``: towards the features' own down projection, as strong as held-out tokens say.
        target: ``mean`` (paper: the usage-weighted mean of the members, on all tokens) or ``gated``: each token's own
            gated sum of the members it is routed to.
        features: gate and up projections of the merged expert: ``average`` (paper), ``aligned`` (the average after
            matching neurons by their activations), ``centre`` (the centre's own), ``selected`` (the strongest neurons
            of all members), or ``best``: for each cluster the one with the least held-out error.
        cluster: ``weights`` (paper: most used experts, cosine of gate and up), or ``outputs``: the centres that
            answer for all experts at the least loss of gated output energy.
        tokens: sampled tokens of each expert that ``outputs`` compares experts on.
    """

    fit: Literal["pinv", "ridge"] = "pinv"
    target: Literal["mean", "gated"] = "mean"
    features: Literal["average", "aligned", "centre", "selected", "best"] = "average"
    cluster: Literal["weights", "outputs"] = "weights"
    tokens: Annotated[int, AtLeast(1)] = 256

    name = "mergemoe"
    paper = "arXiv:2510.14436"
    replaces_with = Merged
    needs = frozenset({"count", "gate_sq_norm_sq"})
    reads_weights = True
    builds = frozenset({"merged"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Cluster the experts of one layer."""
        if self.cluster == "outputs":
            # lost when p answers for e: gated output energy of e, times the share of it that p misses at its best scale
            energy = layer.sums.gate_sq_norm_sq
            cost = functional_distances([layer], self.tokens, scaled=True)[0] * energy[:, None]
            centres = medoids(cost, keep, layer.protected)
            return merge_into(nearest(cost, centres), energy.tolist(), unchanged=layer.protected)
        count, products = layer.sums.count, weight_products([layer])
        both = sum((products[name] for name in layer.experts.inputs), torch.zeros(()).double())
        norm = both.diagonal().sqrt().clamp_min(EPSILON)
        closest = nearest(1 - both / (norm[:, None] * norm[None]), top(layer, count, keep))
        return merge_into(closest, count.tolist(), unchanged=layer.protected)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the merged experts of the plan, down projections fitted."""
        merged, neurons, scarce = clusters(plan.slots), layer.experts.shape.intermediate, []

        def fitted() -> Iterator[Matrices]:
            for centre, members in merged.items():
                target = (_gated if self.target == "gated" else _mean)(layer, centre, members)
                if len(target.token) < neurons:
                    scarce.append(len(target.token))
                solve = _best if self.fit == "ridge" else _published
                yield solve(layer, target, FEATURES if self.features == "best" else (self.features,))

        found = stacked(fitted(), len(merged))
        if scarce:
            warnings.warn(
                f"layer {layer.index}: {len(scarce)} of {len(merged)} merged experts were fitted on fewer tokens "
                f"({min(scarce)} at least) than they have neurons ({neurons}); "
                "keep more with `moetailor calibrate --sample-tokens`"
                + ("" if self.fit == "ridge" else ", or fit with -p fit=ridge"),
                MoetailorWarning,
                stacklevel=2,
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the merged expert of one cluster has to give.

    Attributes:
        members: experts of the cluster.
        centre: the one in whose place the merged expert will lie.
        token: sampled tokens that enter, [T].
        gate: factor s on the merged expert's output, float32 [T].
        output: what it should then be, [T, D].
    """

    members: Sequence[int]
    centre: int
    token: torch.Tensor
    gate: torch.Tensor
    output: torch.Tensor


def _mean(layer: LayerView, centre: int, members: Sequence[int]) -> Target:
    """Return the paper's target: y_t = sum_j B_j E_j(x_t) on every sampled token."""
    token = torch.arange(len(layer.sample.hidden))
    output = torch.zeros(())
    for member, share in zip(members, shares(layer.sums.count, members).tolist(), strict=True):
        output = output + share * layer.outputs(member, token)
    return Target(members=members, centre=centre, token=token, gate=torch.ones(len(token)), output=output)


def _gated(layer: LayerView, centre: int, members: Sequence[int]) -> Target:
    """Return the layer's own target: z_t = sum_j g_tj E_j(x_t) with s_t = sum_j g_tj, on tokens routed to a member."""
    routed = [layer.routed(member) for member in members]
    token, place = torch.cat([token for token, _ in routed]).unique(return_inverse=True)
    gate = torch.zeros(len(token)).index_add_(0, place, torch.cat([gate for _, gate in routed]))
    width = layer.sample.hidden.shape[1]
    output = torch.zeros(len(token), width, dtype=layer.experts.dtype, device=layer.experts.device)
    for member, (chose, weight), at in zip(members, routed, place.split([len(t) for t, _ in routed]), strict=True):
        given = layer.outputs(member, chose)
        output.index_add_(0, at.to(output.device), given * weight.to(given)[:, None])
    return Target(members=members, centre=centre, token=token, gate=gate, output=output)


def _features(layer: LayerView, target: Target, name: str) -> Matrices:
    """Return an expert with the features asked for and the down projection that goes with them."""
    members, centre, count = target.members, target.centre, layer.sums.count
    if name == "centre":
        return layer.experts.expert(centre)
    if name == "selected":
        return _selected(layer, target)
    if name == "average":
        return average(layer, centre, members, count)
    x_TD = layer.sample.hidden[target.token[:MATCHED]]

    def order(layer: LayerView, centre: int, member: int) -> torch.Tensor:
        rows = [layer.experts.hidden(layer.experts.expert(expert), x_TD).T for expert in (centre, member)]
        return match(neuron_distance(*rows))

    return average(layer, centre, members, count, order)


def _selected(layer: LayerView, target: Target) -> Matrices:
    """Return the expert of the F neurons, out of those of all members, that put out most on their own tokens."""
    count, members = layer.sums.count, target.members
    experts = [layer.experts.expert(member) for member in members]
    strength = []
    for member, expert in zip(members, experts, strict=True):
        token, gate = layer.routed(member)
        hidden = layer.experts.hidden(expert, layer.inputs(token))
        # sqrt(sum_t (g h_i)^2) |Wd[:, i]|
        gated = (hidden * gate.to(hidden)[:, None]).square().sum(0).sqrt()
        strength.append(gated * torch.linalg.vector_norm(expert["down"], dim=0))
    neurons = experts[0]["down"].shape[1]
    chosen = torch.cat(strength).topk(neurons).indices.sort().values
    mean = average(layer, target.centre, members, count)
    share = shares(count, members).tolist()
    picked = {
        name: torch.cat([expert[name] for expert in experts]).index_select(0, chosen)
        for name in ("gate", "up", "gate_bias", "up_bias")
        if name in mean
    }
    down = torch.cat([expert["down"] * part for expert, part in zip(experts, share, strict=True)], 1)
    return mean | picked | {"down": down.index_select(1, chosen)}


def _blocks(layer: LayerView, target: Target, expert: Matrices, which: torch.Tensor) -> Iterator[tuple]:
    """Yield s p and the target without the expert's bias, for some of the tokens, block by block."""
    for part in which.nonzero().flatten().split(BLOCK):
        features = layer.experts.hidden(expert, layer.inputs(target.token[part]))
        gate = target.gate[part].to(features)[:, None]
        output = target.output[part.to(target.output.device)]
        yield features * gate, output - gate * expert["down_bias"] if "down_bias" in expert else output


def _equations(layer: LayerView, target: Target, expert: Matrices, which: torch.Tensor) -> NormalEquations:
    width, neurons = expert["down"].shape
    equations = NormalEquations.zeros(width, neurons, expert["down"].device)
    for features, output in _blocks(layer, target, expert, which):
        equations.add(features, output)
    return equations


def _published(layer: LayerView, target: Target, features: Sequence[str]) -> Matrices:
    """Return the least squares fit by pseudo-inverse, on all tokens; of several features the one that fits best."""
    tried = []
    for name in features:
        expert = _features(layer, target, name)
        equations = _equations(layer, target, expert, torch.ones_like(target.token, dtype=torch.bool))
        down = pseudo_inverse(equations) if equations.tokens else expert["down"]
        tried.append((equations.error(down), expert | {"down": down.to(expert["down"])}))
    return min(tried, key=lambda pair: pair[0])[1]


def _best(layer: LayerView, target: Target, features: Sequence[str]) -> Matrices:
    """Return the candidate with the least error on held-out tokens, fitted again on all of them.

    The plain average stays unless another one wins by more than chance.
    """
    masks = held_out_masks(target.token, SCARCE * layer.experts.expert(target.centre)["down"].shape[1])
    rest = ~torch.stack(masks).any(0)
    tried: list[tuple[float, Matrices, NormalEquations | None, float]] = []
    for name in dict.fromkeys(["average", "centre", *features]):
        expert = _features(layer, target, name)
        fitted = name in features
        parts = [_equations(layer, target, expert, mask) for mask in ([*masks, rest] if fitted else masks)]
        choosing = parts[: len(masks)]
        # The features' own down projection is a candidate: with it the average and the centre are.
        tried.append((sum(part.error(expert["down"]) for part in choosing), expert, None, 0.0))
        if not fitted:
            continue
        every = sum(parts[1:], parts[0])
        folds = [ridge_errors(every - part, part, expert["down"], RIDGES) for part in choosing]
        tried += [(sum(errors), expert, every, strength) for strength, *errors in zip(RIDGES, *folds, strict=True)]
    plain, best = tried[0], min(tried, key=lambda candidate: candidate[0])
    margin = CHANCE / max(sum(int(mask.sum()) for mask in masks), 1)
    _, expert, every, strength = best if best[0] < plain[0] * (1 - margin) else plain
    return expert if every is None else expert | {"down": ridge(every, expert["down"], strength).to(expert["down"])}
