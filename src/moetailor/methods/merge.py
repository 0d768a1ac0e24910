"""What merging methods share: weighted averages of experts, perhaps with their neurons matched first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from moetailor.answers.merged import clusters
from moetailor.fitting.align import permuted
from moetailor.fitting.cluster import centres_of, nearest
from moetailor.methods.choose import refuse_protected
from moetailor.planning.layer_plan import LayerPlan, merge_into
from moetailor.planning.view import LayerView

Matrices = dict[str, torch.Tensor]
# (layer, centre, member) -> the member's neuron for each neuron of the centre
Order = Callable[[LayerView, int, int], torch.Tensor]


def shares(weight: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """Return B_j = w_j / sum w of some experts, equal shares when nothing is known of them, float64 [members].

    Args:
        weight: one number an expert, [E].
        members: experts of one cluster.
    """
    given = weight[list(members)].double()
    return given / given.sum() if float(given.sum()) > 0 else torch.full_like(given, 1 / len(members))


def average(
    layer: LayerView, centre: int, members: Sequence[int], weight: torch.Tensor, order: Order | None = None
) -> Matrices:
    """Return W = sum_j B_j W_j of some experts' matrices, biases included.

    Args:
        layer: the layer.
        centre: the expert that the others' neurons are matched to.
        members: the experts.
        weight: one number an expert, [E].
        order: how neurons are matched; None leaves them as they lie.
    """
    total: Matrices = {}
    for member, share in zip(members, shares(weight, members).tolist(), strict=True):
        one = layer.experts.one(member)
        if order is not None and member != centre:
            one = permuted(one, order(layer, centre, member))
        for name, matrix in one.items():
            total[name] = total[name].add_(matrix, alpha=share) if name in total else matrix * share
    return total


def stacked(experts: Iterable[Matrices]) -> Matrices:
    """Return the matrices of several experts with a leading axis, as `build` gives them."""
    given = list(experts)
    return {name: torch.stack([one[name] for one in given]) for name in given[0]} if given else {}


def averages(layer: LayerView, plan: LayerPlan, weight: torch.Tensor, order: Order | None = None) -> Matrices:
    """Return the average of every cluster of a plan, stacked in the order of the centres."""
    return stacked(average(layer, centre, members, weight, order) for centre, members in clusters(plan.slots).items())


def clustered(
    layer: LayerView, keep: int, features: torch.Tensor, split: Callable[[torch.Tensor, int], torch.Tensor]
) -> LayerPlan:
    """Return the plan that merges clusters of experts into the most used of each.

    Protected experts stay alone, unless nothing else may stay: then the others are answered by the nearest of them.

    Args:
        layer: the layer.
        keep: experts that stay.
        features: what experts are compared by, [E, anything].
        split: (features, number of clusters) -> cluster of each row.
    """
    refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
    count, protected = layer.sums.count, sorted(layer.protected)
    rest = [expert for expert in range(layer.num_experts) if expert not in layer.protected]
    if len(protected) < keep:
        centres = list(range(layer.num_experts))
        for expert, at in zip(rest, centres_of(split(features[rest], keep - len(protected)), count[rest]), strict=True):
            centres[expert] = rest[at]
    else:
        centres = nearest(torch.cdist(features, features), protected)
    return merge_into(centres, count.tolist(), unchanged=layer.protected)


def output_gram(layer: LayerView, tokens: int, gate_TE: torch.Tensor | None = None) -> torch.Tensor:
    """Return sum_t g_ti g_tj <f_i(x_t), f_j(x_t)> of each pair of experts, all on the same tokens, float64 [E, E].

    Args:
        layer: the layer.
        tokens: how many sampled tokens, routed to an expert or not.
        gate_TE: factor on each expert's output, 1 when None.
    """
    gram = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    for token in torch.arange(min(tokens, len(layer.sample.hidden))).split(128):
        x_TD = layer.sample.hidden[token]
        rows = []
        for expert in range(layer.num_experts):
            output = layer.experts.outputs(expert, x_TD).float()
            rows.append((output if gate_TE is None else output * gate_TE[token, expert, None].to(output)).flatten())
        outputs = torch.stack(rows)
        gram += (outputs @ outputs.T).double().cpu()
    return gram
