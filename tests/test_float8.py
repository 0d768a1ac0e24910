"""checkpoint/storage/float8.py: against the grid of e4m3, listed by hand."""

import pytest
import torch

from moetailor.checkpoint.storage import BlockFloat8, Codes, Float8, TensorSpec, find_storage


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


@pytest.mark.parametrize(("outputs", "inputs"), [(130, 300), (128, 128), (5, 7)])
def test_blocks_have_a_scale_each(outputs: int, inputs: int) -> None:
    spec, weight = TensorSpec(shape=(2, outputs, inputs), storage="fp8b128"), torch.randn(2, outputs, inputs)
    weight[1, :128, :128] = 0
    stored, grid_shape = spec.encode("w", weight, "BF16"), (2, -(-outputs // 128), -(-inputs // 128))
    assert {key: tuple(part.shape) for key, part in stored.items()} == {
        key: shape for key, (_, shape) in spec.parts("w", "BF16").items()
    }
    assert stored["w_scale"].shape == grid_shape
    assert spec.nbytes("BF16") == 2 * outputs * inputs + 2 * 2 * grid_shape[1] * grid_shape[2]
    given = find_storage("fp8b128").decode({key[1:]: part for key, part in stored.items()}, (2, outputs, inputs))
    for n in range(2):
        for o in range(0, outputs, 128):
            for i in range(0, inputs, 128):
                place = (n, slice(o, o + 128), slice(i, i + 128))
                largest = weight[place].abs().max()
                scale = (largest / 448 if largest > 0 else torch.ones(())).bfloat16()
                assert torch.equal(stored["w_scale"][n, o // 128, i // 128], scale)
                code = (weight[place] / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(stored["w_packed"][place].view(torch.float8_e4m3fn).float(), code.float())
                assert torch.equal(given[place], (code.float() * scale.float()).bfloat16())


@pytest.mark.parametrize("storage", [Float8(), BlockFloat8()])
def test_what_is_chosen_one_by_one_is_what_is_rounded_at_once(storage: Float8) -> None:
    weight = torch.randn(2, 5, 8)
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
