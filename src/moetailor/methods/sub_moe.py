"""Sub-MoE: clusters of experts by their outputs, merged in a shared subspace (arXiv:2506.23266).

Published: k-means on the cosine of expert outputs; the matrices of a cluster side by side, [W_1 ... W_m] = U S
[V_1 ... V_m], and the merged expert U S sum_i p_i V_i with p_i the share of usage.

Here: the same. Since U S V_i is W_i itself, the merged expert is the usage-weighted average, projected on the first
left singular vectors of the cluster: U_r U_r^T sum_i p_i W_i. With all of them (`subspace` 1) it is the average, to
rounding; fewer keep what the members have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from moetailor.answers import Merged
from moetailor.answers.merged import clusters
from moetailor.fitting.averages import average, stacked
from moetailor.fitting.cluster import k_means
from moetailor.fitting.distances import output_gram
from moetailor.methods.merge import clustered
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class SubMoE(Method):
    """Merge experts whose outputs point the same way, in the subspace of their joint SVD.

    Attributes:
        subspace: share of the joint left singular vectors that the merged expert keeps, 1 for all.
        tokens: sampled tokens that every expert is run on.
        seed: for the first centres of k-means.
    """

    subspace: Annotated[float, AtLeast(0.01)] = 1.0
    tokens: Annotated[int, AtLeast(1)] = 2048
    seed: int = 0

    name = "sub_moe"
    paper = "arXiv:2506.23266"
    replaces_with = Merged
    needs = frozenset({"count"})
    reads_weights = True
    builds = frozenset({"merged"})

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Cluster the experts of one layer."""
        # Points as far apart as the outputs over all tokens, in E dimensions: G = U S U^T, rows of U S^(1/2)
        values, vectors = torch.linalg.eigh(output_gram(layer, self.tokens))
        points = vectors * values.clamp_min(0).sqrt()
        return clustered(layer, keep, points, lambda rows, count: k_means(rows, count, self.seed))

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the average of each cluster, each matrix in the subspace that its members share."""
        merged = clusters(plan.slots)
        return stacked((self._merged(layer, centre, members) for centre, members in merged.items()), len(merged))

    def _merged(self, layer: LayerView, centre: int, members: Sequence[int]) -> dict[str, torch.Tensor]:
        mean = average(layer, centre, members, layer.sums.count)
        for name, matrix in layer.experts.matrices(members).items():
            if matrix.dim() == 3:
                mean[name] = _projected(mean[name], matrix, self.subspace)
        return mean


def _projected(mean: torch.Tensor, members: torch.Tensor, share: float) -> torch.Tensor:
    """Return U_r U_r^T W with U from the SVD of the members side by side."""
    rank = min(round(share * mean.shape[0]), mean.shape[0])
    if rank == mean.shape[0]:
        return mean
    # [W_1 ... W_m] [W_1 ... W_m]^T = sum_i W_i W_i^T = U S^2 U^T
    gram = (members @ members.transpose(1, 2)).double().sum(0)
    basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, : max(rank, 1)].to(mean)
    return basis @ (basis.T @ mean)
