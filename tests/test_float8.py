"""checkpoint/storage/float8.py: against the grid of e4m3, listed by hand."""

import pytest
import torch

from moetailor.checkpoint.storage import Codes, Float8, TensorSpec, find_storage


def grid() -> torch.Tensor:
    """Return all numbers of e4m3 from zero up: 2^(e - 7) (1 + m / 8), 2^-6 m / 8 below these; the last would be NaN."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    large = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    return torch.tensor(small + large, dtype=torch.float64)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_weights_are_the_nearest_of_the_grid_times_the_scale_of_their_row(dtype: str) -> None:
    spec, weight = TensorSpec(shape=(2, 5, 70), storage="fp8"), torch.randn(2, 5, 70)
    weight[1, 2] = 0
    stored, declared = spec.encode("w", weight, dtype), spec.parts("w", dtype)
    assert {key: tuple(part.shape) for key, part in stored.items()} == {
        key: shape for key, (_, shape) in declared.items()
    }
    assert spec.nbytes(dtype) == 2 * 5 * 70 + 2 * 5 * (4 if dtype == "F32" else 2)
    scale, largest = stored["w_scale"].double(), weight.abs().amax(-1, keepdim=True).double()
    torch.testing.assert_close(scale, (largest / 448).where(largest > 0, 1.0), rtol=2**-8, atol=0)
    code = stored["w_packed"].view(torch.float8_e4m3fn).double()
    assert bool(torch.isin(code.abs(), grid()).all())
    apart = (grid() * scale[..., None] - weight.double().abs()[..., None]).abs().amin(-1)
    # Nothing on the grid is nearer, but by how numbers over scales were rounded.
    assert float(((code * scale - weight.double()).abs() - apart).max()) < 1e-6
    given = find_storage("fp8").decode({key[1:]: part for key, part in stored.items()}, (2, 5, 70))
    assert torch.equal(given, (code * scale).to(given.dtype))
    assert float(given[1, 2].abs().max()) == 0


def test_what_is_chosen_one_by_one_is_what_is_rounded_at_once() -> None:
    storage, weight = Float8(), torch.randn(2, 5, 8)
    scale, zero = storage.fit(weight, torch.ones(8), torch.float32)
    assert zero is None
    at_once = storage.numbers(Codes(code=storage.round(weight, scale, None), scale=scale, zero=None), 8)
    for i in range(8):
        code, given = storage.choose(weight[..., i][None], torch.ones(2, 1, 1), scale[..., 0], None)
        torch.testing.assert_close(given[0], at_once[..., i])
        assert torch.equal(code.to(torch.int8), storage.round(weight, scale, None)[..., i])


def test_its_noise_is_that_of_floats() -> None:
    storage, weight = Float8(), torch.randn(1, 50, 4000)
    codes = storage.nearest(weight, torch.float32)
    error = float((storage.numbers(codes, 4000) - weight).square().mean())
    assert 0.3 < error / storage.noise < 1.5
