"""checkpoint/storage/integers.py: codes by hand, bit by bit, and against the library that other engines read with."""

import itertools
import re

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32

from moetailor.checkpoint.storage import Codes, Integers, TensorSpec, find_storage
from moetailor.checkpoint.storage.integers import BITS, CLIPS, unpacked
from moetailor.errors import CheckpointError

every_storage = pytest.mark.parametrize("name", [f"{sign}int{bits}g24" for bits in BITS for sign in ("", "u")])


def bit_by_bit(words: torch.Tensor, bits: int, count: int) -> list[int]:
    """Return the first numbers of a row of words, bit by bit; signed, as they are stored with an offset."""
    stream = [int(word) >> bit & 1 for word in words.tolist() for bit in range(32)]
    found = [sum(bit << place for place, bit in enumerate(stream[at * bits : (at + 1) * bits])) for at in range(count)]
    return [number - 2 ** (bits - 1) for number in found]


@every_storage
def test_stored_tensors_are_what_is_declared_and_mean_what_is_decoded(name: str) -> None:
    storage, weight = find_storage(name), torch.randn(3, 10, 70)
    assert isinstance(storage, Integers)
    spec = TensorSpec(shape=(3, 10, 70), storage=name)
    stored = spec.encode("w", weight, "F32")
    declared = spec.parts("w", "F32")
    assert {key: (tuple(part.shape)) for key, part in stored.items()} == {
        key: shape for key, (_, shape) in declared.items()
    }
    # 70 inputs in groups of at most 24: 3 groups, two of 24 and one of 22
    assert (storage.groups(70), storage.size(70)) == (3, 24)
    expected = torch.empty(3, 10, 70)
    for n in range(3):
        for o in range(10):
            codes = bit_by_bit(stored["w_packed"][n, o], storage.bits, 70)
            for i, code in enumerate(codes):
                zero = (
                    0 if storage.symmetric else bit_by_bit(stored["w_zero_point"][n, :, i // 24], storage.bits, 10)[o]
                )
                expected[n, o, i] = (code - zero) * stored["w_scale"][n, o, i // 24]
    torch.testing.assert_close(storage.decode({k[1:]: v for k, v in stored.items()}, (3, 10, 70)), expected)


@every_storage
def test_numbers_on_the_grid_are_kept(name: str) -> None:
    storage = find_storage(name)
    assert isinstance(storage, Integers)
    code = torch.randint(-(2 ** (storage.bits - 1)), 2 ** (storage.bits - 1), (2, 5, 48)).to(torch.int8)
    zero = None if storage.symmetric else torch.randint(-2, 2, (2, 5, 2)).to(torch.int8)
    codes = Codes(code=code, scale=torch.rand(2, 5, 2) + 0.1, zero=zero)
    weight = storage.numbers(codes, 48)
    torch.testing.assert_close(storage.decode(storage.pack(codes), (2, 5, 48)), weight)
    assert torch.equal(storage.round(weight, codes.scale, codes.zero), code)


def test_bytes_are_those_of_the_formula() -> None:
    """O I b / 8 + O ceil(I / G) (2 + b / 8), where words and groups come out even."""
    for bits in BITS:
        for group in (32, 64, 128):
            spec = TensorSpec(shape=(4, 256, 512), storage=f"uint{bits}g{group}")
            assert spec.nbytes("BF16") * 8 == 4 * (256 * 512 * bits + 256 * (512 // group) * (16 + bits))


@every_storage
def test_scales_are_the_best_of_those_that_are_tried(name: str) -> None:
    """Each group by itself, every share of its range by hand."""
    storage = find_storage(name)
    assert isinstance(storage, Integers)
    weight, worth = torch.randn(2, 3, 48), torch.rand(2, 48)
    scale, zero = storage.fit(weight, worth, torch.float32)
    found = storage.numbers(Codes(code=storage.round(weight, scale, zero), scale=scale, zero=zero), 48)
    least, most = -(2 ** (storage.bits - 1)), 2 ** (storage.bits - 1) - 1
    for n, o, group in itertools.product(range(2), range(3), (slice(0, 24), slice(24, 48))):
        numbers, weights = weight[n, o, group].tolist(), worth[n, group].tolist()
        low, high = min(*numbers, 0), max(*numbers, 0)
        errors = []
        for clip in CLIPS[storage.bits > 4].tolist():
            step = clip * (2 * max(-low, high) if storage.symmetric else high - low) / (most - least)
            at = 0 if storage.symmetric else max(least, min(most, round(least - low * clip / step)))
            codes = [max(least, min(most, round(number / step + at))) for number in numbers]
            apart = [(code - at) * step - number for code, number in zip(codes, numbers, strict=True)]
            errors.append(sum(w * d * d for w, d in zip(weights, apart, strict=True)))
        error = float((worth[n, group] * (found[n, o, group] - weight[n, o, group]).square()).sum())
        assert error == pytest.approx(min(errors), rel=1e-4)


def test_groups_are_as_equal_as_they_can_be() -> None:
    storage = find_storage("uint4g128")
    assert isinstance(storage, Integers)
    sizes = {width: (storage.groups(width), storage.size(width)) for width in (96, 128, 192, 256, 300, 2048)}
    assert sizes == {96: (1, 96), 128: (1, 128), 192: (2, 96), 256: (2, 128), 300: (3, 100), 2048: (16, 128)}


def test_nothing_but_zeros_is_kept() -> None:
    for name in ("int4g32", "uint4g32"):
        storage, zeros = find_storage(name), torch.zeros(1, 4, 64)
        assert torch.equal(storage.decode(storage.encode(zeros, "BF16"), (1, 4, 64)), zeros.bfloat16())


@pytest.mark.parametrize("name", ["int1g32", "int9g32", "int4g0", "int4", "uint4g", "xint4g32"])
def test_what_is_no_storage_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"no storage '{name}'")):
        find_storage(name)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_unpacked_as_the_library_does(bits: int) -> None:
    """Rows of every length, that end inside a word or not, to the bit; also of words that do not lie in a row."""
    for count, rows in itertools.product((1, 4, 5, 31, 32, 33, 70, 256), (1, 3)):
        words = torch.randint(-(2**31), 2**31, (2, -(-count * bits // 32), rows)).int().transpose(1, 2)
        lying = words.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        expected = unpack_from_int32(lying, bits, torch.Size((2 * rows, count)))
        assert torch.equal(unpacked(words, bits, count), expected.view(2, rows, count))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    """To the bit what products in float64, rounded to the dtype, give: also where 8-bit codes are far from zero."""
    storage = Integers(bits=8, group=24, symmetric=False)
    code, zero = (torch.randint(-128, 128, size).to(torch.int8) for size in ((2, 6, 70), (2, 6, 3)))
    scale = torch.rand(2, 6, 3).to(dtype)
    each = torch.arange(70) // 24
    exact = (code.double() - zero.double()[..., each]) * scale.double()[..., each]
    assert torch.equal(storage.numbers(Codes(code=code, scale=scale, zero=zero), 70), exact.to(dtype))


def test_the_library_that_engines_read_with_agrees() -> None:
    """compressed-tensors takes one matrix apart as we do."""
    storage = Integers(bits=4, group=32, symmetric=True)
    stored = storage.encode(torch.randn(1, 8, 64), "F32")
    code = unpack_from_int32(stored["_packed"][0], 4, torch.Size((8, 64)))
    scale = stored["_scale"][0].repeat_interleave(32, 1)
    torch.testing.assert_close(storage.decode(stored, (1, 8, 64))[0], code * scale)
