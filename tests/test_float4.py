"""checkpoint/storage/float4*.py: codes by hand, all scales there are, and the library that other engines read with."""

import itertools
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from moetailor.checkpoint.storage import Codes, TensorSpec, find_storage
from moetailor.checkpoint.storage.float4 import Float4
from moetailor.fitting.gptq import Seen, gptq

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FORMS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
every_storage = pytest.mark.parametrize("name", list(FORMS))


def storage_of(name: str) -> Float4:
    found = find_storage(name)
    assert isinstance(found, Float4)
    return found


def e4m3(code: int) -> float:
    """Return what eight bits stand for: 2^(e - 7) (1 + m / 8), 2^-6 m / 8 where e is 0."""
    e, m = code >> 3, code % 8
    return m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)


@every_storage
@pytest.mark.parametrize("inputs", [64, 75])
def test_stored_tensors_are_what_is_declared_and_mean_what_is_decoded(name: str, inputs: int) -> None:
    storage, spec = storage_of(name), TensorSpec(shape=(2, 3, inputs), storage=name)
    stored, declared = spec.encode("w", torch.randn(2, 3, inputs) / 10, "BF16"), spec.parts("w", "BF16")
    assert {key: tuple(part.shape) for key, part in stored.items()} == {key: part[1] for key, part in declared.items()}
    assert spec.nbytes("BF16") == sum(part.nbytes for part in stored.values())
    groups, whole = -(-inputs // storage.group), [torch.ones(1)] * 2
    assert stored["w_scale"].shape[2] == groups
    if name == "nvfp4":
        whole = list(stored["w_global_scale"].view(torch.float32))
        assert all(float(each.log2()) % 1 == 0 for each in whole)
    expected = torch.empty(2, 3, inputs)
    for n, o, i in itertools.product(range(2), range(3), range(inputs)):
        byte, scale = int(stored["w_packed"][n, o, i // 2]), int(stored["w_scale"][n, o, i // storage.group])
        code = byte >> 4 if i % 2 else byte & 15
        step = 2.0 ** (scale - 127) if name == "mxfp4" else e4m3(scale) / float(whole[n])
        expected[n, o, i] = (-1 if code & 8 else 1) * GRID[code & 7] * step
    given = storage.decode({key[1:]: part for key, part in stored.items()}, (2, 3, inputs))
    assert torch.equal(given, expected)
    # They have so few bits that nothing is lost in 16, in whatever order engines multiply.
    assert torch.equal(given.bfloat16().float(), given)


@pytest.mark.parametrize(("name", "each"), [("mxfp4", 4 + 8 / 32), ("nvfp4", 4 + 8 / 16)])
def test_bytes_are_those_of_the_formula(name: str, each: float) -> None:
    spec = TensorSpec(shape=(4, 256, 512), storage=name)
    assert spec.nbytes("F32") == 4 * 256 * 512 * each / 8 + 4 * 4 * (name == "nvfp4")


@every_storage
def test_weights_are_the_nearest_floats_times_the_best_scale_that_can_be_stored(name: str) -> None:
    """Of all scales that a byte can say none errs less, but for those far off that are not tried."""
    storage, size = storage_of(name), storage_of(name).group
    weight, worth = torch.randn(2, 5, 96).double(), torch.rand(2, 96) + 0.1
    at = weight if name == "mxfp4" else weight * 64
    scale, zero = storage.fit(at.float(), worth, torch.bfloat16)
    assert zero is None
    signed, steps = torch.cat([GRID, -GRID]).double(), [e4m3(code) for code in range(1, 127)]
    steps = [2.0**power for power in range(-20, 20)] if name == "mxfp4" else steps
    best = torch.full(scale.shape, torch.inf).double()
    for step in (*steps, None):
        s = scale.double() if step is None else torch.full_like(scale, step).double()
        apart = (signed * s.repeat_interleave(size, 2)[..., None] - at[..., None]).abs().amin(-1)
        error = (apart.square() * worth[:, None]).unflatten(-1, (-1, size)).sum(-1)
        if step is not None:
            best = torch.minimum(best, error)
        else:
            torch.testing.assert_close(error, best)
            code = storage.round(at.float(), scale, None)
            given = storage.numbers(Codes(code=code, scale=scale, zero=None), 96)
            torch.testing.assert_close((given - at).abs(), apart, rtol=1e-5, atol=1e-5)


@every_storage
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_library_reads_the_same_and_makes_the_same_codes_of_it(name: str, rounding: str) -> None:
    storage, weight, x = storage_of(name), torch.randn(1, 24, 64) / 30, torch.randn(1, 200, 64)
    codes = storage.nearest(weight, torch.bfloat16)
    if rounding == "gptq":
        codes = gptq(weight, Seen.of(x.transpose(1, 2) @ x), storage, torch.bfloat16)
    parts = {key: part[0] for key, part in storage.pack(codes).items()}
    scale = parts["_scale"] if name == "mxfp4" else parts["_scale"].view(torch.float8_e4m3fn)
    given = {"weight_packed": parts["_packed"], "weight_scale": scale}
    if name == "nvfp4":
        given["weight_global_scale"] = parts["_global_scale"].view(torch.float32)
    scheme = QuantizationScheme(**vars(preset_name_to_scheme(f"{name.upper()}A16", ["Linear"])))
    library: Any = BaseCompressor.get_value_from_registry(FORMS[name])
    numbers = storage.numbers(codes, 64)[0]
    assert torch.equal(library.decompress(given, scheme)["weight"].float(), numbers)
    steps = codes.scale[0] if name == "mxfp4" else scale.float()
    again = library.compress(
        {"weight": numbers, **{part: given[part] for part in given if "global" in part}, "weight_scale": steps}, scheme
    )
    assert torch.equal(again["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    # Zeros may have either sign.
    both = [torch.stack([each & 15, each >> 4], -1) for each in (again["weight_packed"], parts["_packed"])]
    assert torch.equal(*(torch.where(each == 8, 0, each) for each in both))


@every_storage
def test_numbers_on_the_grid_are_kept(name: str) -> None:
    storage, code = storage_of(name), torch.randint(0, 16, (2, 5, 64)).to(torch.int8)
    code = torch.where(code == 8, 0, code)
    scale = torch.randint(-3, 3, (2, 5, 64 // storage.group)).float().exp2()
    whole = torch.full((2, 1, 1), 4.0) if name == "nvfp4" else None
    codes = Codes(code=code, scale=scale, zero=None, whole=whole)
    weight = storage.numbers(codes, 64)
    assert torch.equal(storage.decode(storage.pack(codes), (2, 5, 64)), weight)
    assert torch.equal(storage.round(weight, scale, None), code)


@every_storage
def test_what_is_chosen_one_by_one_is_what_is_rounded_at_once(name: str) -> None:
    storage, weight = storage_of(name), 3 * torch.randn(2, 5, 16)
    scale = torch.rand(2, 5, 1) + 0.5
    code = storage.round(weight, scale, None)
    at_once = storage.numbers(Codes(code=code, scale=scale, zero=None), 16)
    for i in range(16):
        one, given = storage.choose(weight[..., i][None], torch.ones(2, 1, 1), scale[..., 0], None)
        torch.testing.assert_close(given[0], at_once[..., i])
        assert torch.equal(one.to(torch.int8), code[..., i])


@every_storage
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_weights_of_any_size_err_alike_and_groups_of_zeros_stay_zeros(name: str, size: float) -> None:
    """NVFP4's scale of the matrix takes them all to one size; MXFP4's have exponents down to -126."""
    storage, weight = storage_of(name), torch.randn(2, 50, 640)
    weight[0, 3, :64], weight[1] = 0, weight[1] / 8
    codes = storage.nearest(weight * size, torch.bfloat16)
    numbers = storage.decode(storage.pack(codes), (2, 50, 640))
    assert bool((numbers[0, 3, :64] == 0).all())
    error = (numbers / size - weight).square().mean((1, 2)) / weight.square().mean((1, 2))
    assert float(error.max()) < 1.15 * storage.noise
    assert 0.85 * storage.noise < float(error.min())


@every_storage
def test_matrices_that_are_no_numbers_leave_others_as_they_are(name: str) -> None:
    storage, weight = storage_of(name), torch.randn(2, 6, 64)
    alone, weight[1] = storage.nearest(weight[:1], torch.float32), torch.nan
    assert torch.equal(storage.nearest(weight, torch.float32).code[0], alone.code[0])
