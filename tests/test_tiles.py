"""Products of codes with many inputs in bfloat16: in the tiles of a CPU that has them, else as torch makes them."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from unittest.mock import Mock

import pytest
import torch

from moetailor.checkpoint.storage import compiled, few_bits, find_storage
from moetailor.checkpoint.storage.few_bits import FewBits
from support.decoding import CODES

# Groups that are whole rows of tiles, half ones, and others.
GROUPS = [
    "uint2g32",
    "uint3g64",
    "uint4g32",
    "uint5g32",
    "uint6g32",
    "uint8g64",
    "vq1g32",
    "vq2g64",
    "vq3g32",
    "vq4g32",
]
SHAPES = [(1, 128, 256), (2, 70, 96), (3, 23, 48), (1, 5, 37), (1, 64, 300)]


def _case(name: str, shape: tuple[int, int, int], inputs: int) -> tuple[FewBits, dict, torch.Tensor, torch.Tensor]:
    """Return a storage, matrices in it, inputs of them, and the products in float64."""
    storage, generator = find_storage(name), torch.Generator().manual_seed(0)
    parts = storage.encode(torch.randn(shape, generator=generator), "BF16")
    x = torch.randn(shape[0], inputs, shape[2], generator=generator).bfloat16()
    return storage, parts, x, x.double() @ storage.decode(parts, shape).double().transpose(1, 2)


def _check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums are those of float32, rounded once: half a unit of the last of bfloat16's eight bits."""
    assert found.dtype == torch.bfloat16
    apart = (found.double() - expected).abs()
    assert (apart <= 2.0**-8 * expected.abs() + 1e-4).all(), apart.max()


@pytest.mark.parametrize("inputs", [5, 16, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*CODES, *GROUPS])
def test_products_of_many_inputs_are_those_of_their_numbers(
    name: str, shape: tuple[int, int, int], inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, parts, x, expected = _case(name, shape, inputs)
    tiled = Mock(side_effect=compiled.tiled)
    monkeypatch.setattr(compiled, "tiled", tiled)
    _check(storage.product(x, parts, shape), expected)
    assert tiled.called == compiled.ARE_HERE
    monkeypatch.setattr(compiled, "has_tiles", lambda _: False)
    _check(storage.product(x, parts, shape), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["uint4g32", "uint8g64", "vq2g16"])
def test_more_inputs_than_a_cache_holds_and_threads_change_nothing(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2, 150, 96)
    storage, parts, x, expected = _case(name, shape, 90)
    whole = storage.product(x, parts, shape)
    _check(whole, expected)
    monkeypatch.setattr(compiled, "passing_nbytes", lambda _: 40 * 2 * 96)
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(storage.product(x, parts, shape), whole)


def test_loops_and_torch_set_up_tiles_of_their_own() -> None:
    """Torch's products in tiles come before and after, with other shapes of tiles."""
    storage, parts, x, expected = _case("uint4g32", (1, 128, 256), 48)
    left, right = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = left @ right.T
    _check(storage.product(x, parts, (1, 128, 256)), expected)
    assert torch.equal(left @ right.T, before)


@pytest.mark.parametrize("other", [{"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, {"NUMBA_ENABLE_AVX": "0"}])
def test_where_numba_compiles_for_another_cpu_torch_multiplies(other: dict[str, str], tmp_path: Path) -> None:
    lines = """
        import torch
        from moetailor.checkpoint.storage import compiled, find_storage
        storage, shape = find_storage("uint4g32"), (1, 8, 64)
        parts = storage.encode(torch.randn(shape), "BF16")
        x = torch.randn(1, 8, 64).bfloat16()
        expected = x.float() @ storage.decode(parts, shape).float().transpose(1, 2)
        torch.testing.assert_close(storage.product(x, parts, shape).float(), expected, rtol=.01, atol=.01)
        assert not compiled.ARE_HERE
    """
    plain = other | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", dedent(lines)], env=os.environ | plain, capture_output=True, text=True)
    assert not run.returncode, run.stderr


def test_few_inputs_and_other_dtypes_have_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, parts, x, _ = _case("uint4g32", (1, 8, 64), 8)
    tiled = Mock(side_effect=compiled.tiled)
    monkeypatch.setattr(compiled, "tiled", tiled)
    storage.product(x[:, : few_bits.FEW], parts, (1, 8, 64))
    storage.product(x.float(), parts, (1, 8, 64))
    storage.product(x.half(), parts, (1, 8, 64))
    assert not tiled.called


@pytest.mark.parametrize("inputs", [2, 8])
def test_a_default_device_and_places_in_memory_change_nothing(inputs: int) -> None:
    shape = (1, 40, 64)
    storage, parts, x, expected = _case("uint4g32", shape, inputs)
    whole = torch.zeros(1 + x.numel(), dtype=torch.bfloat16)
    whole[1:] = x.flatten()
    odd = x.as_strided(x.shape, (x.numel() + 1, 64, 1))
    with torch.device("meta"):
        found = [storage.product(given, parts, shape) for given in (x, whole[1:].view(x.shape), odd)]
        assert storage.decode(parts, shape).device.type == "cpu"
    plain = storage.product(x, parts, shape)
    torch.testing.assert_close(plain.double(), expected, rtol=0.02, atol=0.2)
    assert all(torch.equal(each, plain) for each in found)
