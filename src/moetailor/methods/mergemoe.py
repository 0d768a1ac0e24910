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
from torch.nn import functional as F

from moetailor.answers import Merged
from moetailor.answers.merged import clusters
from moetailor.errors import MoetailorWarning
from moetailor.fitting.align import match, neuron_distance
from moetailor.fitting.cluster import medoids, nearest
from moetailor.fitting.held_out import choosing
from moetailor.fitting.least_squares import RIDGES, Normal, pseudo_inverse, ridge, ridge_errors
from moetailor.methods.choose import top
from moetailor.methods.conmoe import functional_distances
from moetailor.methods.merge import Matrices, average, shares, stacked
from moetailor.methods.registry import AtLeast, method
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView

# Tokens that go through the features at once, and tokens that neurons are matched on.
BLOCK, MATCHED = 4096, 1024
# With fewer tokens than so many times the neurons, an eighth of them is too few to choose by.
SCARCE = 4
# What is better than the plain average by less than this over the number of tokens that choose may be so by chance.
CHANCE = 4.0
FEATURES = ("average", "aligned", "centre", "selected")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the merged expert of one cluster has to give.

    Attributes:
        members: experts of the cluster.
        centre: the one in whose place the merged expert will lie.
        token: sampled tokens that enter, [T].
        gate: factor s on the merged expert's output, float32 [T].
        target: what it should then be, [T, D].
    """

    members: Sequence[int]
    centre: int
    token: torch.Tensor
    gate: torch.Tensor
    target: torch.Tensor


def build(layer: LayerView, plan: LayerPlan, *, fit: str, target: str, features: str, **_: object) -> Matrices:
    """Return the merged experts of a plan, down projections fitted."""
    merged, scarce = [], []
    for centre, members in clusters(plan.slots).items():
        problem = _gated(layer, centre, members) if target == "gated" else _mean(layer, centre, members)
        neurons = layer.experts.one(centre)["down"].shape[1]
        if len(problem.token) < neurons:
            scarce.append(len(problem.token))
        solve = _best if fit == "ridge" else _published
        merged.append(solve(layer, problem, FEATURES if features == "best" else (features,)))
    if scarce:
        warnings.warn(
            f"layer {layer.index}: {len(scarce)} of {len(merged)} merged experts were fitted on fewer tokens "
            f"({min(scarce)} at least) than they have neurons ({neurons}); keep more with --sample-tokens"
            + ("" if fit == "ridge" else ", or fit with -p fit=ridge"),
            MoetailorWarning,
            stacklevel=2,
        )
    return stacked(merged)


@method(
    "mergemoe",
    removed=Merged,
    paper="arXiv:2510.14436",
    needs={"count", "gate_sq_norm_sq"},
    weights=True,
    builds={"merged"},
    build=build,
)
def mergemoe(
    layer: LayerView,
    keep: int,
    *,
    fit: Literal["pinv", "ridge"] = "pinv",
    target: Literal["mean", "gated"] = "mean",
    features: Literal["average", "aligned", "centre", "selected", "best"] = "average",
    cluster: Literal["weights", "outputs"] = "weights",
    tokens: Annotated[int, AtLeast(1)] = 256,
) -> LayerPlan:
    """Merge experts into the most used ones and fit their outputs by least squares.

    Args:
        layer: the layer.
        keep: experts that stay.
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
    del fit, target, features  # they say how `build` fits
    if cluster == "outputs":
        # lost when p answers for e: gated output energy of e, times the share of it that p misses at its best scale
        energy = layer.sums.gate_sq_norm_sq
        cost = functional_distances([layer], tokens, scaled=True)[0] * energy[:, None]
        centres = medoids(cost, keep, layer.protected)
        return merge_into(nearest(cost, centres), energy.tolist(), unchanged=layer.protected)
    count, matrices = layer.sums.count, layer.experts.matrices()
    unit = F.normalize(torch.cat([matrices[n].flatten(1).float() for n in ("up", "gate") if n in matrices], 1), dim=1)
    closest = nearest(1 - (unit @ unit.T).double().cpu(), top(layer, count, keep))
    return merge_into(closest, count.tolist(), unchanged=layer.protected)


def _mean(layer: LayerView, centre: int, members: Sequence[int]) -> Problem:
    """Return the paper's problem: y_t = sum_j B_j E_j(x_t) on every sampled token."""
    token = torch.arange(len(layer.sample.hidden))
    target = torch.zeros(())
    for member, share in zip(members, shares(layer.sums.count, members).tolist(), strict=True):
        target = target + share * layer.outputs(member, token)
    return Problem(members=members, centre=centre, token=token, gate=torch.ones(len(token)), target=target)


def _gated(layer: LayerView, centre: int, members: Sequence[int]) -> Problem:
    """Return the layer's own problem: z_t = sum_j g_tj E_j(x_t) with s_t = sum_j g_tj, on tokens routed to a member."""
    routed = [layer.routed(member) for member in members]
    token, place = torch.cat([token for token, _ in routed]).unique(return_inverse=True)
    gate = torch.zeros(len(token)).index_add_(0, place, torch.cat([gate for _, gate in routed]))
    width = layer.sample.hidden.shape[1]
    target = torch.zeros(len(token), width, dtype=layer.experts.dtype, device=layer.experts.device)
    for member, (mine, weight), at in zip(members, routed, place.split([len(t) for t, _ in routed]), strict=True):
        outputs = layer.outputs(member, mine)
        target.index_add_(0, at.to(target.device), outputs * weight.to(outputs)[:, None])
    return Problem(members=members, centre=centre, token=token, gate=gate, target=target)


def _features(layer: LayerView, problem: Problem, name: str) -> Matrices:
    """Return an expert with the features asked for and the down projection that goes with them."""
    members, centre, count = problem.members, problem.centre, layer.sums.count
    if name == "centre":
        return layer.experts.one(centre)
    if name == "selected":
        return _selected(layer, problem)
    if name == "average":
        return average(layer, centre, members, count)
    x_TD = layer.sample.hidden[problem.token[:MATCHED]]

    def order(layer: LayerView, centre: int, member: int) -> torch.Tensor:
        rows = [layer.experts.hidden(layer.experts.one(expert), x_TD).T for expert in (centre, member)]
        return match(neuron_distance(*rows))

    return average(layer, centre, members, count, order)


def _selected(layer: LayerView, problem: Problem) -> Matrices:
    """Return the expert of the F neurons, out of those of all members, that put out most on their own tokens."""
    count, members = layer.sums.count, problem.members
    ones = [layer.experts.one(member) for member in members]
    strength = []
    for member, one in zip(members, ones, strict=True):
        token, gate = layer.routed(member)
        hidden = layer.experts.hidden(one, layer.sample.hidden[token])
        # sqrt(sum_t (g h_i)^2) |Wd[:, i]|
        gated = (hidden * gate.to(hidden)[:, None]).square().sum(0).sqrt()
        strength.append(gated * torch.linalg.vector_norm(one["down"], dim=0))
    neurons = ones[0]["down"].shape[1]
    chosen = torch.cat(strength).topk(neurons).indices.sort().values
    mean = average(layer, problem.centre, members, count)
    share = shares(count, members).tolist()
    picked = {
        name: torch.cat([one[name] for one in ones]).index_select(0, chosen)
        for name in ("gate", "up", "gate_bias", "up_bias")
        if name in mean
    }
    down = torch.cat([one["down"] * part for one, part in zip(ones, share, strict=True)], 1)
    return mean | picked | {"down": down.index_select(1, chosen)}


def _blocks(layer: LayerView, problem: Problem, one: Matrices, which: torch.Tensor) -> Iterator[tuple]:
    """Yield s p and the target without the expert's bias, for some of the tokens, block by block."""
    for part in which.nonzero().flatten().split(BLOCK):
        features = layer.experts.hidden(one, layer.sample.hidden[problem.token[part]])
        gate = problem.gate[part].to(features)[:, None]
        target = problem.target[part.to(problem.target.device)]
        yield features * gate, target - gate * one["down_bias"] if "down_bias" in one else target


def _normal(layer: LayerView, problem: Problem, one: Matrices, which: torch.Tensor) -> Normal:
    width, neurons = one["down"].shape
    normal = Normal.zeros(width, neurons, one["down"].device)
    for features, target in _blocks(layer, problem, one, which):
        normal.add(features, target)
    return normal


def _published(layer: LayerView, problem: Problem, features: Sequence[str]) -> Matrices:
    """Return the least squares fit by pseudo-inverse, on all tokens; of several features the one that fits best."""
    tried = []
    for name in features:
        one = _features(layer, problem, name)
        normal = _normal(layer, problem, one, torch.ones_like(problem.token, dtype=torch.bool))
        down = pseudo_inverse(normal) if normal.tokens else one["down"]
        tried.append((normal.error(down), one | {"down": down.to(one["down"])}))
    return min(tried, key=lambda pair: pair[0])[1]


def _best(layer: LayerView, problem: Problem, features: Sequence[str]) -> Matrices:
    """Return the candidate with the least error on held-out tokens, fitted again on all of them.

    The plain average stays unless another one wins by more than chance.
    """
    held = choosing(problem.token, SCARCE * layer.experts.one(problem.centre)["down"].shape[1])
    rest = ~torch.stack(held).any(0)
    tried: list[tuple[float, Matrices, Normal | None, float]] = []
    for name in dict.fromkeys(["average", "centre", *features]):
        one = _features(layer, problem, name)
        fitted = name in features
        normals = [_normal(layer, problem, one, part) for part in ([*held, rest] if fitted else held)]
        # The features' own down projection is a candidate: with it the average and the centre are.
        tried.append((sum(normal.error(one["down"]) for normal in normals[: len(held)]), one, None, 0.0))
        if not fitted:
            continue
        every = sum(normals[1:], normals[0])
        folds = [ridge_errors(every - choose, choose, one["down"], RIDGES) for choose in normals[: len(held)]]
        tried += [(sum(left), one, every, strength) for strength, *left in zip(RIDGES, *folds, strict=True)]
    plain, best = tried[0], min(tried, key=lambda candidate: candidate[0])
    margin = CHANCE / max(sum(int(part.sum()) for part in held), 1)
    _, one, normal, strength = best if best[0] < plain[0] * (1 - margin) else plain
    return one if normal is None else one | {"down": ridge(normal, one["down"], strength).to(one["down"])}
