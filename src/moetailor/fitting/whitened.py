"""The best approximation of low rank of a matrix on the inputs that it meets.

min over rank-r M of tr (W - M) C (W - M)^T with C the second moment of the inputs: with C = L L^T and the singular
value decomposition W L = U S V^T it is U_r S_r V_r^T L^-1, and what it leaves is the sum of the other s^2.
Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Added to the diagonal of C, as a share of its mean: directions that few tokens show are not worth a rank.
RIDGE = 5e-2


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """W ~ outer diag(values) inner, the first r of each for rank r; float64.

    Attributes:
        outer: U, [O, full].
        values: s, descending, [full]; all above zero.
        inner: V^T L^-1, [full, I].
    """

    outer: torch.Tensor
    values: torch.Tensor
    inner: torch.Tensor

    def matrix(self, rank: int) -> torch.Tensor:
        """Return the approximation of a rank, [O, I]."""
        return (self.outer[:, :rank] * self.values[:rank]) @ self.inner[:rank]

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [r, I] and B^T [r, O] with B A the approximation, its size shared by both; zeros beyond the full
        rank.
        """
        root = self.values[:rank].sqrt()
        missing = rank - len(root)
        inner, outer = root[:, None] * self.inner[:rank], (self.outer[:, :rank] * root).T
        return tuple(torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (inner, outer))  # type: ignore[return-value]


def second_moment(x_TI: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """Return C = sum q x x^T / sum q with a ridge, float64 [I, I]; the identity without tokens.

    Args:
        x_TI: inputs.
        weight_T: weights q, not negative.
    """
    share_T = weight_T.double().to(x_TI.device) / weight_T.sum().double().clamp_min(1e-300)
    moment = ((x_TI * share_T[:, None].to(x_TI)).T @ x_TI).double()
    moment.diagonal().add_(RIDGE * (float(moment.diagonal().mean()) or 1 / RIDGE))
    return moment


def approximate(matrix: torch.Tensor, moment: torch.Tensor) -> Approximation:
    """Return the approximations of all ranks.

    Args:
        matrix: W, [O, I].
        moment: C, positive definite, [I, I].
    """
    matrix = matrix.double()
    if len(matrix) <= len(moment):
        # W C W^T = U S^2 U^T, and U_r^T W is S_r V_r^T L^-1: no factor of C is needed
        outer, values = _eigenvectors(matrix @ moment @ matrix.T)
        return Approximation(outer=outer, values=values, inner=(outer.T @ matrix) / values[:, None])
    factor = torch.linalg.cholesky(moment)
    seen = matrix @ factor
    # (W L)^T W L = V S^2 V^T
    right, values = _eigenvectors(seen.T @ seen)
    inner = torch.linalg.solve_triangular(factor, right.T, upper=False, left=False)
    return Approximation(outer=seen @ right / values, values=values, inner=inner)


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvectors of a semidefinite matrix, in columns, and the roots of its eigenvalues, descending and above
    zero.
    """
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values = values.flip(0).clamp_min(0).sqrt()
    return vectors.flip(1), values.clamp_min(1e-12 * float(values[:1].sum()) + 1e-150)


def energy(matrix: torch.Tensor, moment: torch.Tensor) -> float:
    """Return tr W C W^T, the mean energy of a matrix's outputs."""
    matrix = matrix.double()
    return float((matrix @ moment * matrix).sum())
