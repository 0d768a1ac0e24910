"""The fit of a down projection: against the paper's pseudo-inverse, against direct sums, and in its limits."""

import pytest
import torch

from moetailor.fitting.least_squares import RIDGES, NormalEquations, chosen_ridge, pseudo_inverse, ridge, ridge_errors


def draw(tokens: int, neurons: int = 5, width: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, neurons, generator=generator, dtype=torch.float64)
    truth = torch.randn(neurons, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return features, features @ truth + 0.3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)


def normal_of(features: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> NormalEquations:
    normal = NormalEquations.zeros(target.shape[1], features.shape[1])
    normal.add(features, target, weight)
    return normal


def test_it_is_the_papers_route_through_t1() -> None:
    """T1 = Q P^+ and W' = [B_1 Wd_1, B_2 Wd_2] T1, all tokens in memory (paper, section 4)."""
    generator = torch.Generator().manual_seed(1)
    tokens, neurons, width = 60, 5, 3
    hidden = torch.randn(2, neurons, tokens, generator=generator, dtype=torch.float64)
    down = torch.randn(2, width, neurons, generator=generator, dtype=torch.float64)
    share = torch.tensor([0.3, 0.7], dtype=torch.float64)
    merged = torch.randn(neurons, tokens, generator=generator, dtype=torch.float64)
    q = torch.cat([hidden[0], hidden[1]])
    t1 = q @ torch.linalg.pinv(merged)
    theirs = torch.cat([share[0] * down[0], share[1] * down[1]], 1) @ t1
    target = sum(share[j] * down[j] @ hidden[j] for j in range(2))
    mine = pseudo_inverse(normal_of(merged.T, target.T))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_without_a_ridge_it_is_least_squares() -> None:
    features, target = draw(40)
    expected = torch.linalg.lstsq(features, target).solution.T
    prior = torch.zeros(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ridge(normal_of(features, target), prior, 0.0), expected, rtol=1e-9, atol=1e-9)


def test_a_strong_ridge_is_the_prior() -> None:
    features, target = draw(40)
    prior = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ridge(normal_of(features, target), prior, 1e12), prior, rtol=1e-9, atol=1e-9)


def test_the_ridge_solves_what_it_says() -> None:
    """min_W sum |y - W p|^2 + lambda |(W - W0) S|^2, by stacking the penalty under the data."""
    features, target = draw(40)
    prior = torch.randn(3, 5, dtype=torch.float64)
    scale = features.square().sum(0).sqrt()
    penalty = 0.2**0.5 * torch.diag(scale)
    stacked = torch.linalg.lstsq(torch.cat([features, penalty]), torch.cat([target, penalty @ prior.T])).solution.T
    torch.testing.assert_close(ridge(normal_of(features, target), prior, 0.2), stacked, rtol=1e-9, atol=1e-9)


def test_errors_of_many_ridges_are_those_of_each() -> None:
    features, target = draw(40)
    features[:, 1] = 0  # a dead neuron
    fit, choose = normal_of(features[:30], target[:30]), normal_of(features[30:], target[30:])
    prior = torch.randn(3, 5, dtype=torch.float64)
    found = ridge_errors(fit, choose, prior, RIDGES)
    expected = [choose.error(ridge(fit, prior, strength)) for strength in RIDGES]
    assert found == pytest.approx(expected, rel=1e-9)
    assert ridge_errors(NormalEquations.zeros(3, 5), choose, prior, [1.0]) == [choose.error(prior)]


def test_the_ridge_is_chosen_by_what_it_loses_on_held_out_tokens() -> None:
    features, target = draw(14)
    prior = torch.zeros(3, 5, dtype=torch.float64)

    def lost(strength: float) -> float:
        """Return the squared error on each fourth of the tokens, fitted on the others, token by token."""
        total = 0.0
        for fold in range(4):
            held = torch.arange(14) % 4 == fold
            fitted = ridge(normal_of(features[~held], target[~held]), prior, strength)
            total += sum(
                float((y - fitted @ x).square().sum()) for x, y in zip(features[held], target[held], strict=True)
            )
        return total

    held = [normal_of(features[fold::4], target[fold::4]) for fold in range(4)]
    every = normal_of(features, target)
    best = min(RIDGES, key=lost)
    torch.testing.assert_close(chosen_ridge(every, held, prior), ridge(every, prior, best))
    # Nothing is pulled away from a prior that is the truth.
    truth = torch.linalg.lstsq(features, target).solution.T
    exact = [normal_of(features[fold::4], features[fold::4] @ truth.T) for fold in range(4)]
    torch.testing.assert_close(chosen_ridge(sum(exact[1:], exact[0]), exact, truth), truth)


def test_weights_are_repetitions() -> None:
    features, target = draw(12)
    counts = torch.tensor([1, 2, 3] * 4)
    weighted = normal_of(features, target, counts.double())
    repeated = normal_of(features.repeat_interleave(counts, 0), target.repeat_interleave(counts, 0))
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


def test_the_error_is_that_of_the_tokens() -> None:
    features, target = draw(30)
    solution = torch.randn(3, 5, dtype=torch.float64)
    direct = float((target - features @ solution.T).square().sum())
    assert normal_of(features, target).error(solution) == pytest.approx(direct, rel=1e-12)


def test_streams_and_sums_in_any_order() -> None:
    features, target = draw(50)
    whole, first, second = normal_of(features, target), normal_of(features[:13], target[:13]), None
    second = normal_of(features[13:], target[13:])
    for total in (first + second, second + first):
        assert total.tokens == whole.tokens == 50
        for name in ("gram", "cross", "energy"):
            torch.testing.assert_close(getattr(total, name), getattr(whole, name))


def test_dead_neurons_keep_the_prior() -> None:
    features, target = draw(40)
    features[:, 2] = 0
    prior = torch.randn(3, 5, dtype=torch.float64)
    for strength in (0.0, 0.1):
        found = ridge(normal_of(features, target), prior, strength)
        assert torch.equal(found[:, 2], prior[:, 2])
        assert torch.isfinite(found).all()


def test_without_tokens_the_prior_stays() -> None:
    prior = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(ridge(NormalEquations.zeros(3, 5), prior, 0.1), prior)


def test_a_singular_gram_is_solved() -> None:
    features, target = draw(3)  # fewer tokens than neurons
    features = torch.cat([features, features], 1)  # and every neuron twice
    normal, prior = normal_of(features, target), torch.zeros(3, 10, dtype=torch.float64)
    for strength in (0.0, *RIDGES):
        assert torch.isfinite(ridge(normal, prior, strength)).all()
    assert normal.error(pseudo_inverse(normal)) == pytest.approx(0, abs=1e-9)
