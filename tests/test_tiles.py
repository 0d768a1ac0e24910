"""Products of codes with inputs in bfloat16: of pairs in vectors and in tiles, or as torch makes them."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from unittest.mock import Mock

import numba
import numpy as np
import pytest
import torch

from moetailor.checkpoint.storage import compiled, few_bits, find_storage, half_loops, halves, tiles
from moetailor.checkpoint.storage.few_bits import FewBits
from support.decoding import CODES

# Groups that are whole vectors for some of the widths, and others.
GROUPS = [f"uint{bits}g{group}" for bits, group in ((2, 32), (3, 64), (4, 32), (5, 32), (6, 32), (7, 128), (8, 64))]
GROUPS += ["int4g128", "int8g32", "vq1g32", "vq2g64", "vq3g128", "vq4g64", "vq4g128"]
SHAPES = [(1, 128, 256), (2, 70, 96), (3, 23, 48), (1, 5, 37), (1, 64, 300), (2, 9, 320)]


def _weights(storage: FewBits, parts: dict, shape: tuple[int, ...]) -> torch.Tensor:
    """Return s (q - z) in float64."""
    units = storage.units(parts["_packed"], shape[2]).double()
    scale, zero = storage.scales(parts, shape[1]).double(), storage.zeros(parts, shape[1])
    units = storage.parted(units) - (0 if zero is None else zero[..., None].double())
    return (units * scale[..., None]).flatten(-2)[..., : shape[2]]


def _case(name: str, shape: tuple[int, int, int], inputs: int) -> tuple[FewBits, dict, torch.Tensor]:
    """Return a storage, matrices in it, and inputs of them."""
    storage, generator = find_storage(name), torch.Generator().manual_seed(0)
    parts = storage.encode(torch.randn(shape, generator=generator), "BF16")
    return storage, parts, torch.randn(shape[0], inputs, shape[2], generator=generator).bfloat16()


def _check(found: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
    """Of few inputs sums are float32; of many, weights and sums are rounded once to bfloat16's eight bits."""
    expected, few = x.double() @ weights.transpose(1, 2), x.shape[1] <= few_bits.FEW
    assert found.dtype == (torch.float32 if few else torch.bfloat16)
    if not few:
        expected = x.double() @ weights.bfloat16().double().transpose(1, 2)
    sizes = x.double().abs() @ weights.abs().transpose(1, 2)
    apart = (found.double() - expected).abs()
    assert (apart <= 1e-5 * sizes + (0 if few else 2.0**-8 * expected.abs())).all(), apart.max()


@pytest.mark.parametrize("inputs", [1, 3, 5, 16, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*CODES, *GROUPS])
def test_products_in_bfloat16_are_those_of_their_numbers(
    name: str, shape: tuple[int, int, int], inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, parts, x = _case(name, shape, inputs)
    _check(storage.product(x, parts, shape), x, _weights(storage, parts, shape))
    monkeypatch.setattr(compiled, "in_halves", lambda *_: False)
    _check(storage.product(x, parts, shape), x, _weights(storage, parts, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*CODES, *GROUPS])
def test_products_of_few_inputs_in_float32_are_those_of_their_numbers(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, parts, x = _case(name, shape, 3)
    x = x.float() * (1 + 2.0**-12 + 2.0**-20)  # no numbers of bfloat16
    weights = _weights(storage, parts, shape)
    # Zero points are taken off after sums of codes, which are larger than what is left.
    most = storage.units(parts["_packed"], shape[2]).double().abs().amax() * parts["_scale"].double().abs().amax()
    sizes = x.double().abs() @ (weights.abs() + most * ("_zero_point" in parts)).transpose(1, 2)
    for thirds in (compiled.in_thirds(storage, shape[2]), False):
        monkeypatch.setattr(compiled, "in_thirds", lambda *_, thirds=thirds: thirds)
        found = compiled.few(storage, x, parts, shape)
        assert found.dtype == torch.float32
        apart = (found.double() - x.double() @ weights.transpose(1, 2)).abs() / sizes
        assert apart.max() <= 5e-7


@pytest.mark.skipif(not halves.ARE_HERE, reason="this CPU multiplies no pairs of bfloat16")
@pytest.mark.parametrize("name", ["int4g128", "int7g128", "uint4g128", "vq4g128", "vq3g128", "mxfp4"])
def test_no_bit_of_an_input_in_float32_is_lost(name: str) -> None:
    storage, shape = find_storage(name), (1, 16, 256)
    parts = storage.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "F32")
    values = torch.tensor([1 / 3, -1e30, 3.3e35, 1.5e-25, 1 + 2**-23, -(2 - 2**-23), 0.0, 7e-28])
    x = torch.zeros(1, 8, 256)
    x[0, range(8), torch.arange(8) * 35] = values
    parts["_scale"] = torch.full_like(parts["_scale"], 2.0**-9)
    assert compiled.in_thirds(storage, 256)
    # One weight each: as exact as a product in float32 is, but for zero points, which are taken off after it.
    expected = x[0].double() @ _weights(storage, parts, shape)[0].T
    rtol = 2.0**-23 if "_zero_point" not in parts else 2.0**-20
    torch.testing.assert_close(compiled.few(storage, x, parts, shape)[0].double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("name", "inputs", "whole"),
    [
        ("uint4g128", 2048, True),
        ("uint4g128", 768, True),
        ("uint4g128", 2880, False),  # in groups of 126
        ("uint4g16", 2048, False),
        ("vq4g128", 1408, True),
        ("vq4g32", 2048, False),
        ("vq2g32", 2048, True),
        ("fp8", 2048, True),
        ("fp8", 2050, False),
        ("mxfp4", 2880, True),
        ("nvfp4", 2048, False),
    ],
)
def test_groups_that_are_whole_vectors_are_multiplied_in_bfloat16(name: str, inputs: int, whole: bool) -> None:
    storage, x = find_storage(name), torch.zeros(1, inputs)
    assert compiled.in_halves(storage, inputs) == (whole and halves.ARE_HERE)
    assert compiled.in_tiles(storage, x.bfloat16()) == (whole and halves.ARE_HERE)
    assert not compiled.in_tiles(storage, x)


@pytest.mark.skipif(not halves.ARE_HERE, reason="this CPU multiplies no pairs of bfloat16")
@pytest.mark.parametrize(("in_tiles", "some"), [(False, 16), (False, 9), (False, 8), (False, 1), (True, 16)])
def test_tiles_and_vectors_that_stand_for_them_are_products(in_tiles: bool, some: int) -> None:
    if in_tiles and not tiles.IN_TILES:
        pytest.skip("this CPU has no tiles")
    deep, generator = 96, torch.Generator().manual_seed(0)
    left = torch.randn(tiles.BLOCK, deep, generator=generator).bfloat16()
    right = torch.randn(2, deep, 16, generator=generator).bfloat16()
    # [tiles, rows, I / 32, 32] in rows of tiles, and [I / 2, inputs, 2] in pairs.
    rows = left.view(-1, 16, deep // 32, 32).transpose(1, 2).contiguous().flatten().view(torch.uint16).numpy()
    pairs = right.view(2, deep // 2, 2, 16).transpose(2, 3).contiguous().flatten().view(torch.int32)
    sums = np.zeros(tiles.BLOCK * 16, np.float32)

    @numba.njit
    def run(rows, pairs, start, sums, some):
        tiles.begin(tiles.SHAPES)
        product(rows, 16 * deep, pairs, start, sums, some)
        tiles.end()

    product = half_loops._in_tiles if in_tiles else half_loops._in_vectors
    run(rows, pairs.numpy().view(np.uint32), deep // 2 * 16, sums, some)
    expected = left.double() @ right[1].double()
    found = torch.from_numpy(sums).view(-1, 16)[:, :some].double()
    torch.testing.assert_close(found, expected[:, :some], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not halves.ARE_HERE, reason="this CPU multiplies no pairs of bfloat16")
def test_every_float_of_8_bits_is_told_in_bfloat16() -> None:
    storage, codes = find_storage("fp8"), torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0
    parts = {"_packed": codes.expand(1, 3, 256), "_scale": torch.ones(1, 3, 1, dtype=torch.bfloat16)}
    expected = codes.view(torch.float8_e4m3fn).bfloat16()
    few = compiled.few(storage, torch.eye(256).bfloat16()[None], parts, (1, 3, 256))[0]
    assert torch.equal(few, expected.float()[:, None].expand(256, 3))
    assert torch.equal(storage.product(torch.eye(256).bfloat16()[None], parts, (1, 3, 256))[0], few.bfloat16())
    parts["_packed"] = torch.tensor([[[127, 255] + [0] * 254]], dtype=torch.uint8)
    assert storage.product(torch.ones(1, 1, 256).bfloat16(), parts, (1, 1, 256)).isnan()


@pytest.mark.skipif(not halves.ARE_HERE, reason="this CPU multiplies no pairs of bfloat16")
@pytest.mark.parametrize("name", ["uint4g64", "vq3g64", "vq4g64", "vq4g128", "fp8"])
def test_what_is_kept_of_loops_is_known_by_the_kind_of_codes(name: str, tmp_path: Path) -> None:
    lines = f"""
        import torch
        from moetailor.checkpoint.storage import compiled, find_storage, half_loops
        storage, shape = find_storage("{name}"), (1, 8, 128)
        parts = storage.encode(torch.randn(shape), "BF16")
        for inputs in (1, 8):
            storage.product(torch.randn(1, inputs, 128).bfloat16(), parts, shape)
        compiled.few(storage, torch.randn(1, 1, 128), parts, shape)
        few = "thirds" if compiled.in_thirds(storage, 128) else "product"
        kept = {{each for each in compiled.kept() if each[1:] == compiled.kind(storage)}}
        assert kept == {{(loop, *compiled.kind(storage)) for loop in ("halved", few, half_loops.TILED)}}
    """
    kept, files = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", dedent(lines)], env=kept, capture_output=True, text=True)
        assert not run.returncode, run.stderr
        files.append({file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()})
    assert files[0] == files[1]  # a process takes what another has compiled


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["uint4g32", "uint8g64", "vq2g32", "vq4g64"])
def test_more_inputs_than_a_cache_holds_and_threads_change_nothing(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2, 150, 192)
    storage, parts, x = _case(name, shape, 90)
    found = [storage.product(x[:, :some], parts, shape) for some in (2, 90)]
    monkeypatch.setattr(compiled, "passing_nbytes", lambda _: 40 * 2 * 192)
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for some, each in zip((2, 90), found, strict=True):
        assert torch.equal(storage.product(x[:, :some], parts, shape), each)


def test_loops_and_torch_set_up_tiles_of_their_own() -> None:
    """Torch's products in tiles come before and after, with other shapes of tiles."""
    storage, parts, x = _case("uint4g32", shape := (1, 128, 256), 48)
    left, right = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = left @ right.T
    _check(storage.product(x, parts, shape), x, _weights(storage, parts, shape))
    assert torch.equal(left @ right.T, before)


@pytest.mark.parametrize("other", [{"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, {"NUMBA_ENABLE_AVX": "0"}])
def test_where_numba_compiles_for_another_cpu_torch_multiplies(other: dict[str, str], tmp_path: Path) -> None:
    lines = """
        import torch
        from moetailor.checkpoint.storage import find_storage, halves
        storage, shape = find_storage("uint4g32"), (1, 8, 64)
        parts = storage.encode(torch.randn(shape), "BF16")
        x = torch.randn(1, 8, 64).bfloat16()
        expected = x.float() @ storage.decode(parts, shape).float().transpose(1, 2)
        torch.testing.assert_close(storage.product(x, parts, shape).float(), expected, rtol=.01, atol=.01)
        assert not halves.ARE_HERE
    """
    plain = other | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", dedent(lines)], env=os.environ | plain, capture_output=True, text=True)
    assert not run.returncode, run.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numba compiles for CPUs of one kind")
def test_loops_are_compiled_for_a_cpu_with_tiles_wherever_they_are_not_run(tmp_path: Path) -> None:
    lines = """
        import numba, torch
        torch.cpu.get_capabilities, torch.cpu._init_amx = lambda: {"amx_bf16": True}, lambda: True
        from moetailor.checkpoint.storage import half_loops
        octets, halves, table, scale, zero = (
            numba.types.Array(kind, axes, "C")
            for kind, axes in zip((numba.uint8, *[numba.uint16] * 3, numba.uint32), (3, 3, 1, 3, 3))
        )
        one, loop = numba.int64, half_loops.tiles(8, 2)
        loop.compile((octets, table, scale, zero, one, halves, one, one, halves, one, one))
        text = "".join(loop.inspect_asm().values())
        assert all(each in text for each in ("ldtilecfg", "tdpbf16ps", "tilerelease")) and "vdpbf16ps" not in text
    """
    features = (
        "avx,avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,amx-tile,amx-bf16".split(
            ","
        )
    )
    other = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": ",".join(f"+{each}" for each in features)}
    env = os.environ | other | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", dedent(lines)], env=env, capture_output=True, text=True)
    assert not run.returncode, run.stderr


def test_few_inputs_and_other_dtypes_have_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, parts, x = _case("uint4g32", (1, 8, 64), 8)
    tiled = Mock(side_effect=compiled.tiled)
    monkeypatch.setattr(compiled, "tiled", tiled)
    storage.product(x[:, : few_bits.FEW], parts, (1, 8, 64))
    storage.product(x.float(), parts, (1, 8, 64))
    storage.product(x.half(), parts, (1, 8, 64))
    assert not tiled.called


@pytest.mark.parametrize("inputs", [2, 8])
def test_a_default_device_and_places_in_memory_change_nothing(inputs: int) -> None:
    shape = (1, 40, 64)
    storage, parts, x = _case("uint4g32", shape, inputs)
    whole = torch.zeros(1 + x.numel(), dtype=torch.bfloat16)
    whole[1:] = x.flatten()
    odd = x.as_strided(x.shape, (x.numel() + 1, 64, 1))
    with torch.device("meta"):
        found = [storage.product(given, parts, shape) for given in (x, whole[1:].view(x.shape), odd)]
        assert storage.decode(parts, shape).device.type == "cpu"
    plain = storage.product(x, parts, shape)
    _check(plain, x, _weights(storage, parts, shape))
    assert all(torch.equal(each, plain) for each in found)
