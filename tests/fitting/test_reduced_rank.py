"""Weighted reduced-rank regression against a direct solution, in its limits, and by its own algebra."""

import pytest
import torch

from moetailor.fitting import reduced_rank
from moetailor.fitting.reduced_rank import Moments, Regression, shared_inputs


def draw(tokens: int, width: int = 6, out: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) + 1.5
    y = torch.tanh(x @ torch.randn(width, out, generator=generator, dtype=torch.float64)) - 0.7
    return x, y, torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1


def loss(x: torch.Tensor, y: torch.Tensor, q: torch.Tensor, found: reduced_rank.LinearMap) -> float:
    given = found.mean_out + (x - found.mean_in) @ found.inner.double() @ found.outer.double()
    return float((q * (y - given).square().sum(1)).sum())


def weighted_least_squares(x: torch.Tensor, y: torch.Tensor, q: torch.Tensor) -> float:
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1) * q.sqrt()[:, None]
    solution = torch.linalg.lstsq(ones, y * q.sqrt()[:, None]).solution
    return float((y * q.sqrt()[:, None] - ones @ solution).square().sum())


def test_full_rank_without_a_ridge_is_weighted_least_squares() -> None:
    x, y, q = draw(60)
    found = Regression(Moments.of(x, y, q)).solve(6, 0.0)
    assert loss(x, y, q, found) == pytest.approx(weighted_least_squares(x, y, q), rel=1e-8)


def test_rank_zero_is_the_weighted_mean() -> None:
    x, y, q = draw(60)
    found = Regression(Moments.of(x, y, q)).solve(0, 0.1)
    torch.testing.assert_close(found.mean_out, (q[:, None] * y).sum(0) / q.sum())
    assert found.inner.shape == (6, 0)


def test_every_rank_is_the_best_of_its_rank() -> None:
    """Against the textbook route: the SVD of the whitened full solution, truncated."""
    x, y, q = draw(60)
    share = (q / q.sum())[:, None]
    xc, yc = x - (share * x).sum(0), y - (share * y).sum(0)
    gram = (share * xc).T @ xc
    gram += 0.05 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    factor = torch.linalg.cholesky(gram)
    full = torch.linalg.solve(gram, (share * xc).T @ yc)
    for rank in (1, 2, 4):
        u, s, v = torch.linalg.svd(factor.T @ full, full_matrices=False)
        best = torch.linalg.solve(factor.T, u[:, :rank] * s[:rank]) @ v[:rank]
        found = Regression(Moments.of(x, y, q)).solve(rank, 0.05)
        torch.testing.assert_close(found.inner @ found.outer, best, rtol=1e-7, atol=1e-9)


def test_errors_are_those_of_the_tokens_and_fall_with_the_rank() -> None:
    x, y, q = draw(60)
    found = Regression(Moments.of(x, y, q)).solve(5, 1e-9)
    errors = found.errors(x, y, q)
    for rank in range(6):
        assert float(errors[rank]) == pytest.approx(
            loss(x, y, q, Regression(Moments.of(x, y, q)).solve(rank, 1e-9)), rel=1e-6
        )
    assert (errors[1:] <= errors[:-1] + 1e-12).all()


def test_few_tokens_give_the_map_that_as_many_equations_give() -> None:
    """x^T (x x^T + l)^-1 y, which has one equation a token, is what has one a dimension."""
    x, y, q = draw(5, width=9)
    problem = Regression(Moments.of(x, y, q))
    share = (q / q.sum())[:, None]
    xc, yc = ((part - (share * part).sum(0)) * share.sqrt() for part in (x, y))
    ridge = 0.1 * float(xc.square().sum()) / 9
    full = xc.T @ torch.linalg.solve(xc @ xc.T + ridge * torch.eye(5, dtype=torch.float64), yc)
    found = problem.solve(3, 0.1)
    torch.testing.assert_close(found.inner @ found.outer, full @ found.outer.T @ found.outer, rtol=1e-8, atol=1e-10)


def test_tokens_that_join_do_not_move_the_means() -> None:
    """Against moments of all tokens, counted one by one around the means of the first."""
    x, y, q = draw(60)
    share = (q[:20] / q[:20].sum())[:, None]
    m, mu = (share * x[:20]).sum(0), (share * y[:20]).sum(0)
    own = Moments.of(x[:20], y[:20], q[:20], (x.mean(0), y.mean(0)))
    found = Regression(own, Moments.of(x[20:], y[20:], q[20:], own.centre))
    torch.testing.assert_close((found.mean_in, found.mean_out), (m, mu))
    gram = sum(w * (a - m).outer(a - m) for a, w in zip(x, q, strict=True)) / q.sum()
    cross = sum(w * (a - m).outer(b - mu) for a, b, w in zip(x, y, q, strict=True)) / q.sum()
    torch.testing.assert_close((found.gram, found.cross), (gram, cross))
    assert (found.tokens, found.total) == (60, pytest.approx(float(q.sum())))


def test_float32_holds_where_one_token_is_ten_thousand_times_the_others() -> None:
    x, y, q = draw(400, width=40, out=40)
    x[7] *= 1e4
    narrow = Regression(Moments.of(x.float(), y.float(), q)).solve(6, 0.01)
    assert loss(x, y, q, narrow) <= 1.001 * loss(x, y, q, Regression(Moments.of(x, y, q)).solve(6, 0.01))


def test_a_linear_expert_is_replaced_without_loss() -> None:
    x, _, q = draw(60)
    y = 2.0 + x @ torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    found = Regression(Moments.of(x, y, q)).solve(2, 0.0)
    assert loss(x, y, q, found) == pytest.approx(0, abs=1e-9)


def test_order_and_scale_of_the_tokens_do_not_matter() -> None:
    x, y, q = draw(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    one, other = (
        Regression(Moments.of(x, y, q)).solve(3, 0.1),
        Regression(Moments.of(x[order], y[order], 7 * q[order])).solve(3, 0.1),
    )
    torch.testing.assert_close(one.inner @ one.outer, other.inner @ other.outer)


def test_a_rank_above_the_tokens_is_cut() -> None:
    x, y, q = draw(2)
    found = Regression(Moments.of(x, y, q)).solve(5, 0.1)
    assert found.inner.shape[1] <= 2
    assert torch.isfinite(found.inner).all()


def test_iteration_finds_the_exact_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, q = draw(400, width=80, out=80)
    exact = Regression(Moments.of(x, y, q)).solve(6, 0.03)
    monkeypatch.setattr(reduced_rank, "EXACT", 0)
    found = Regression(Moments.of(x, y, q)).solve(6, 0.03)
    assert loss(x, y, q, found) <= 1.01 * loss(x, y, q, exact)


def test_a_shared_factor_is_best_where_all_see_the_same() -> None:
    x, y, q = draw(80, out=4)
    problems = [Regression(Moments.of(x, part, q)) for part in y.split(2, 1)]
    inner = shared_inputs(problems, 6, 2, 0.0)
    together = sum(loss(x, part, q, p.solve_with(inner, 0.0)) for part, p in zip(y.split(2, 1), problems, strict=True))
    # one regression of both targets side by side has one input factor by construction
    assert together == pytest.approx(loss(x, y, q, Regression(Moments.of(x, y, q)).solve(2, 0.0)), rel=1e-6)
    assert shared_inputs([], 6, 2, 0.0).shape == (6, 2)
