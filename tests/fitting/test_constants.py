"""What experts should cost on other text than they were measured on."""

from __future__ import annotations

import pytest
import torch

from moetailor.calibration.statistics import Sums
from moetailor.fitting.constants import on_new_text


def sums_of(count: list[float], norm_max: list[float], energy: list[float]) -> Sums:
    """Return sums over 10 tokens, all gates 1/2."""
    sums = Sums.zeros(len(count), 2)
    sums.tokens += 10
    sums.count += torch.tensor(count)
    sums.gate_sq += torch.tensor(count) / 4
    sums.norm_max += torch.tensor(norm_max)
    sums.gate_sq_norm_sq += torch.tensor(energy)
    return sums


def test_each_expert_is_reached_by_one_more_token_with_a_large_output() -> None:
    sums = sums_of([6, 2, 0, 2], [4, 2, 0, 8], [20, 1, 0, 40])
    errors = torch.tensor([[0.4, 2.0], [0.02, 0.1], [0.0, 0.0], [0.4, 4.0]], dtype=torch.float64)
    # A token more has 4^2 / 4 = 4, in the middle of 4, 1 and 16: .4 a token. Energies a token are 2, .1 and 4.
    expected = [
        [0.4 * (1 + 0.4 / 2), 2.0 * (1 + 0.4 / 2)],
        [0.02 * (1 + 0.4 / 0.1), 0.1 * (1 + 0.4 / 0.1)],
        # Of a layer that puts out 6.1 the answers lose .82 and 6.1.
        [0.4 * 0.82 / 6.1, 0.4 * 6.1 / 6.1],
        [0.4 * (1 + 0.4 / 4), 4.0 * (1 + 0.4 / 4)],
    ]
    torch.testing.assert_close(on_new_text(sums, errors), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("energy", [[0.0, 0.0], [0.0, 5.0]])
def test_experts_that_put_out_nothing_have_no_shares_of_their_own(energy: list[float]) -> None:
    """Tokens reached them, and nothing came out."""
    found = on_new_text(sums_of([3, 3], [0, 1], energy), torch.tensor([[0.0], [0.25]], dtype=torch.float64))
    assert found.isfinite().all()
    assert (found[0] > 0) == (energy[1] > 0)


def test_the_more_text_the_less_is_added() -> None:
    sums = sums_of([6, 2], [4, 2], [20, 1])
    twice = sums + sums
    errors = torch.tensor([[0.4], [0.02]], dtype=torch.float64)
    torch.testing.assert_close(on_new_text(twice, errors) - errors, (on_new_text(sums, errors) - errors) / 2)
