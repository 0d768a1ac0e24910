"""Weighted reduced-rank regression: the affine map of low rank that gives a linear expert's outputs best.

min over rank-r W of sum_t q_t |y_t - mu - (x_t - m) W|^2 + ridge, with m and mu the weighted means. With
C = sum q (x-m)(x-m)^T / Q + lambda I = L L^T and M = sum q (x-m)(y-mu)^T / Q, the best W of rank r is A B with
B^T = V_r, the first right singular vectors of L^-1 M, and A = C^-1 M V_r.
Shapes: T tokens, D inputs, O outputs, both the model's width here, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

# Up to this width, and for ranks near the width, all singular vectors are computed; above, the first by iteration.
EXACT = 512
OVERSAMPLING, ITERATIONS = 16, 4


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """x -> mu + (x - m) A B; where B has orthonormal rows, the first of both are the best map of every lower rank.

    Attributes:
        mean_in: m, [D].
        mean_out: mu, [D].
        inner: A, [D, r].
        outer: B, [r, D]; its rows are orthonormal unless A was given.
    """

    mean_in: torch.Tensor
    mean_out: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor

    def errors(self, x_TD: torch.Tensor, y_TD: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        """Return sum_t q_t |y_t - map(x_t)|^2 for every rank from 0 to r, float64 [r + 1]; for orthonormal B."""
        residual = y_TD - self.mean_out.to(y_TD)
        given = (x_TD - self.mean_in.to(x_TD)) @ self.inner.to(x_TD)
        along = residual @ self.outer.to(y_TD).T
        # |y - A_1 b_1 - ...|^2 loses 2 a_i <y, b_i> - a_i^2 with each orthonormal row b_i
        weight_T = weight_T.double()
        gained = (weight_T[:, None] * (2 * along * given - given.square()).double()).sum(0)
        energy = (weight_T * residual.double().square_().sum(1)).sum()
        return energy - torch.cat([gained.new_zeros(1), gained.cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over tokens, each counted from a centre near their mean, so that little cancels.

    Attributes:
        tokens: how many.
        weight: Q, the sum of q.
        centre: what is taken off inputs and targets, [D] and [O].
        x: sum q x, float64 [D].
        y: sum q y, float64 [O].
        xx: sum q x x^T, [D, D].
        xy: sum q x y^T, [D, O].
    """

    tokens: int
    weight: float
    centre: tuple[torch.Tensor, torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor

    @classmethod
    def of(
        cls,
        x_TD: torch.Tensor,
        y_TO: torch.Tensor,
        weight_T: torch.Tensor,
        centre: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Moments:
        """Return those of some tokens.

        Args:
            x_TD: inputs.
            y_TO: targets.
            weight_T: q, not negative.
            centre: see the attribute; the tokens' own means when None.
        """
        weight_T = weight_T.double()
        centre = centre or centre_of(x_TD, y_TO, weight_T)
        root = weight_T.sqrt().to(x_TD)
        x, y = ((part - mean.to(part)) * root[:, None] for part, mean in zip((x_TD, y_TO), centre, strict=True))
        return cls(
            tokens=len(x),
            weight=float(weight_T.sum()),
            centre=centre,
            x=(root @ x).double(),
            y=(root @ y).double(),
            xx=x.T @ x,
            xy=x.T @ y,
        )

    def __add__(self, other: Moments) -> Moments:
        """Return those of both together, which have the same centre."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("tokens", "weight", "x", "y", "xx", "xy")}
        return Moments(centre=self.centre, **sums)


def centre_of(x_TD: torch.Tensor, y_TO: torch.Tensor, weight_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted means of inputs and targets, float64 [D] and [O]."""
    share = (weight_T.double() / weight_T.double().sum().clamp_min(1e-300)).to(x_TD)
    return (share @ x_TD).double(), (share @ y_TO).double()


class Regression:
    """One problem, solved for several ridges and ranks.

    Args:
        own: moments of the tokens that say what the means are.
        others: of tokens that join them, around the same centre.

    Attributes:
        tokens: how many.
        total: the sum of their weights.
        mean_in: m, float64 [D].
        mean_out: mu, float64 [O].
        gram: C without its ridge, float64 [D, D].
        cross: M, [D, O].
    """

    def __init__(self, own: Moments, others: Moments | None = None) -> None:
        every = own if others is None else own + others
        self.tokens, self.total = every.tokens, every.weight
        total, x, y = max(every.weight, 1e-300), every.x, every.y
        m, mu = (part / max(own.weight, 1e-300) for part in (own.x, own.y))
        self.mean_in, self.mean_out = m + own.centre[0], mu + own.centre[1]
        # sum q (x - m)(y - mu)^T = sum q x y^T - m (sum q y)^T - (sum q x - Q m) mu^T
        self.gram = every.xx.double().addr_(m, x, alpha=-1).addr_(x - total * m, m, alpha=-1).div_(total)
        m, mu, x, y = (part.to(every.xy) for part in (m, mu, x, y))
        self.cross = every.xy.addr(m, y, alpha=-1).addr_(x - total * m, mu, alpha=-1).div_(total)

    def solve(self, rank: int, ridge: float) -> LinearMap:
        """Return the map of the highest rank asked for.

        Args:
            rank: r; fewer when there are fewer tokens.
            ridge: lambda as a share of the mean of C's diagonal; no less than what rounding does to it.
        """
        rank = min(rank, self.tokens, *self.cross.shape)
        scale = float(self.gram.diagonal().mean())
        if rank == 0 or scale <= 0:
            return self._map(*(self.cross.new_zeros(size, 0) for size in self.cross.shape))
        factor = _cholesky(self.gram, max(ridge, torch.finfo(self.cross.dtype).eps) * scale)

        def full(right: torch.Tensor) -> torch.Tensor:
            """Return C^-1 M right."""
            return torch.cholesky_solve((self.cross @ right).double(), factor).to(right)

        def operator(right: torch.Tensor) -> torch.Tensor:
            """Return M^T C^-1 M right, whose first eigenvectors are V_r."""
            return self.cross.T @ full(right)

        outer = _leading(operator, self.cross.shape[1], rank, self.cross)
        return self._map(full(outer), outer)

    def solve_with(self, inner: torch.Tensor, ridge: float) -> LinearMap:
        """Return the best map whose input factor is given: B = (A^T C A)^-1 A^T M.

        Args:
            inner: A, [D, r].
            ridge: share of the mean diagonal of A^T C A that is added to it.
        """
        inner = inner.to(self.gram)
        gram = inner.T @ self.gram @ inner
        gram.diagonal().add_(max(ridge, 1e-9) * float(gram.diagonal().mean()) + 1e-300)
        outer = torch.linalg.solve(gram, inner.T @ self.cross.double())
        return self._map(inner.to(self.cross), outer.to(self.cross).T)

    def _map(self, inner: torch.Tensor, outer: torch.Tensor) -> LinearMap:
        return LinearMap(mean_in=self.mean_in, mean_out=self.mean_out, inner=inner, outer=outer.T)


def shared_inputs(problems: Iterable[Regression], width: int, rank: int, ridge: float) -> torch.Tensor:
    """Return one input factor for the maps of several experts, the most telling direction first, float64 [D, r].

    There is no closed form for inputs that differ; this one is exact when all problems see the same inputs: with C the
    inputs of all of them together = L L^T, A = L^-T U with U the leading eigenvectors of sum_e Q_e L^-1 M_e M_e^T L^-T.

    Args:
        problems: the regressions, each let go when the next is asked for; none gives zeros.
        width: D.
        rank: r.
        ridge: share of the mean diagonal of C that is added to it.
    """
    gram, energy = torch.zeros(2, width, width, dtype=torch.float64)
    for problem in problems:
        cross = problem.cross.double()
        gram += problem.total * problem.gram.cpu()
        energy += problem.total * (cross @ cross.T).cpu()
    if not bool(gram.any()):
        return torch.zeros(width, rank, dtype=torch.float64)
    factor = _cholesky(gram, max(ridge, 1e-12) * float(gram.diagonal().mean()))
    half = torch.linalg.solve_triangular(factor, energy, upper=False)
    white = torch.linalg.solve_triangular(factor, half.T, upper=False)
    leading = torch.linalg.eigh((white + white.T) / 2).eigenvectors.flip(1)[:, :rank]
    inner = torch.linalg.solve_triangular(factor.T, leading, upper=True)
    # Of the size of the inputs' inverse, whatever the weights sum to: numbers that a half type holds too.
    return inner / inner.norm(dim=0).clamp_min(1e-300)


def _cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the factor of gram + ridge I, with more of it where rounding asks for more."""
    for more in (1.0, 1e2, 1e4, 1e6):
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * more)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor
    raise ValueError("the inputs of the regression are not finite")


@lru_cache(maxsize=8)
def _start(size: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return where iterations start: random, and always the same."""
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return start.to(device, dtype)


def _leading(
    operator: Callable[[torch.Tensor], torch.Tensor], size: int, rank: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the first eigenvectors of a symmetric operator, [size, rank]: exactly, or by subspace iteration."""
    width = rank + OVERSAMPLING
    if size <= EXACT or 2 * width >= size:
        matrix = operator(torch.eye(size, dtype=like.dtype, device=like.device)).double()
        return torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors.flip(1)[:, :rank].to(like)
    basis = _start(size, width, like.dtype, like.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(operator(basis)).Q
    inside = (basis.T @ operator(basis)).double()
    rotation = torch.linalg.eigh((inside + inside.T) / 2).eigenvectors.flip(1)[:, :rank]
    return basis @ rotation.to(like)
