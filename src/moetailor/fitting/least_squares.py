"""Least squares for a down projection, from sums that stream: MergeMoE (arXiv:2510.14436) with a ridge.

min_W sum_t w_t |y_t - W p_t|^2 + lambda |(W - W0) S|^2 with S = diag(G)^(1/2), so that lambda has no unit. Its sums are
G = sum w p p^T, R = sum w y p^T and e = sum w |y|^2; nothing as long as the text is kept.
Shapes: T tokens, F expert width, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
DEAD = 1e-10
# Where there are fewer tokens than this times the features, four folds choose instead of an eighth of them.
SCARCE = 4


@dataclass(kw_only=True)
class NormalEquations:
    """The sums of one problem, float64; ``a + b`` is the problem over both texts.

    Attributes:
        gram: G, [F, F].
        cross: R, [D, F].
        energy: e, [].
        tokens: how many tokens entered.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, features: int, device: torch.device | None = None) -> NormalEquations:
        """Return the problem without tokens."""
        empty = torch.zeros(features + width, features, dtype=torch.float64, device=device)
        return cls(gram=empty[:features], cross=empty[features:], energy=empty.new_zeros(()))

    def add(self, p_TF: torch.Tensor, y_TD: torch.Tensor, weight_T: torch.Tensor | None = None) -> None:
        """Add tokens: products in the inputs' dtype, float32 at least, sums in float64.

        Args:
            p_TF: features.
            y_TD: targets.
            weight_T: weights, 1 when None.
        """
        p_TF, y_TD = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (p_TF, y_TD))
        weighted = p_TF if weight_T is None else p_TF * weight_T[:, None].to(p_TF.dtype)
        self.gram += weighted.T @ p_TF
        self.cross += y_TD.T @ weighted
        square = y_TD.double().square().sum(1)
        self.energy += (square if weight_T is None else square * weight_T).sum()
        self.tokens += len(p_TF)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Return the problem over the tokens of both."""
        return NormalEquations(
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            energy=self.energy + other.energy,
            tokens=self.tokens + other.tokens,
        )

    def __sub__(self, other: NormalEquations) -> NormalEquations:
        """Return the problem without some of its tokens."""
        return NormalEquations(
            gram=self.gram - other.gram,
            cross=self.cross - other.cross,
            energy=self.energy - other.energy,
            tokens=self.tokens - other.tokens,
        )

    def error(self, weight: torch.Tensor) -> float:
        """Return sum_t w_t |y_t - W p_t|^2 of some solution [D, F], from the sums alone."""
        # e - 2 <W, R> + <W G, W>
        weight = weight.to(self.gram)
        return float(self.energy - 2 * (weight * self.cross).sum() + (weight @ self.gram * weight).sum())


def ridge(equations: NormalEquations, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the solution that is pulled towards a prior, float64 [D, F].

    Args:
        equations: the problem.
        prior: W0; also what columns of dead neurons become, [D, F].
        strength: lambda; towards infinity the prior, towards 0 least squares.
    """
    prior = prior.to(equations.gram)
    live, scale, unit, residual = _scaled(equations, prior)
    solution = prior.clone()
    # W = W0 + (R - W0 G) S^-1 (S^-1 G S^-1 + lambda I)^-1 S^-1
    if len(live):
        solution[:, live] += _solve(unit, residual.T, strength).T / scale
    return solution


def ridge_errors(
    fit: NormalEquations, choose: NormalEquations, prior: torch.Tensor, strengths: Sequence[float]
) -> list[float]:
    """Return the errors on some tokens of the ridge solutions fitted on others: one factorisation for all strengths.

    Args:
        fit: the problem that is solved.
        choose: the tokens that the solutions are measured on.
        prior: W0, [D, F].
        strengths: values of lambda.
    """
    prior = prior.to(fit.gram)
    live, scale, unit, residual = _scaled(fit, prior)
    base = choose.error(prior)
    if not len(live):
        return [base] * len(strengths)
    # With S^-1 G S^-1 = V diag(s) V^T the solution is W0 + D S^-1 with D = A diag(1 / (s + lambda)) V^T, A the residual
    # times V, and its error that of W0 - 2 <D, C> + <D H, D>, C and H of the other tokens in the same scale.
    values, vectors = torch.linalg.eigh(unit)
    along = residual @ vectors
    cross = ((choose.cross - prior @ choose.gram)[:, live] / scale) @ vectors
    gram = vectors.T @ (choose.gram[live][:, live] / scale[:, None] / scale) @ vectors
    linear, square = (along * cross).sum(0), (along.T @ along) * gram
    inverses = [1 / (values.clamp_min(0) + strength) for strength in strengths]
    return [base + float(inverse @ square @ inverse - 2 * linear @ inverse) for inverse in inverses]


def chosen_ridge(every: NormalEquations, held_out: Sequence[NormalEquations], prior: torch.Tensor) -> torch.Tensor:
    """Return the ridge solution of all tokens, as strong as loses least on tokens that were held out, [D, F]; the prior
    where no fit helps these.

    Args:
        every: the problem of all tokens.
        held_out: parts of it, each held out in turn.
        prior: W0, [D, F].
    """
    folds = [ridge_errors(every - part, part, prior, RIDGES) for part in held_out]
    error, strength = min((sum(errors), strength) for strength, *errors in zip(RIDGES, *folds, strict=True))
    return ridge(every, prior, strength) if error < sum(part.error(prior) for part in held_out) else prior


def pseudo_inverse(equations: NormalEquations, cut: float = 1e-12) -> torch.Tensor:
    """Return R G^+, the plain least squares of the paper, float64 [D, F].

    Args:
        equations: the problem.
        cut: eigenvalues of G below this share of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh((equations.gram + equations.gram.T) / 2)
    inverse = torch.where(values > cut * values.max(), 1 / values, torch.zeros_like(values))
    return (equations.cross @ vectors * inverse) @ vectors.T


def _scaled(
    equations: NormalEquations, prior: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the neurons that are alive, S, S^-1 G S^-1 and (R - W0 G) S^-1 of them."""
    gram = (equations.gram + equations.gram.T) / 2
    diagonal = gram.diagonal()
    live = (diagonal > DEAD * diagonal.mean()).nonzero().flatten()
    scale = diagonal[live].sqrt()
    unit = gram[live][:, live] / scale[:, None] / scale
    return live, scale, unit, (equations.cross - prior @ gram)[:, live] / scale


def _solve(matrix: torch.Tensor, right: torch.Tensor, strength: float) -> torch.Tensor:
    """Solve (matrix + strength I) x = right; what is not positive definite gets more on the diagonal, or a cut."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for more in (1, 10, 100):
        factor, failed = torch.linalg.cholesky_ex(matrix + max(strength, 1e-14) * more * eye)
        if not int(failed):
            return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix + strength * eye)
    inverse = torch.where(values > 1e-8 * values.max(), 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right))
