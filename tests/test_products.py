"""Products grouped by what runs, against one product for each row in float64."""

import pytest
import torch

from moetailor.answers import products
from moetailor.checkpoint import devices
from moetailor.checkpoint.storage import find_storage

DTYPES = [torch.float32, torch.bfloat16]
# How many rows each number has: none, few, one more than tiles take, and many.
COUNTS = [3, 0, 33, 1, 40]


@pytest.fixture(autouse=True, params=[True, False], ids=["tiles", "no tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products as on a CPU with tiles and as on one without: both give the same on either."""
    monkeypatch.setattr(devices, "HAS_TILES", request.param)
    return request.param


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Both are rounded to a dtype; what they were summed from was, too."""
    assert found.dtype == dtype
    most = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=most, atol=most * float(expected.abs().max()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_meets_the_matrix_of_its_expert(dtype: torch.dtype, biased: bool, transposed: bool) -> None:
    expert_P = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    x_PI, weight_EOI = drawn(len(expert_P), 64, dtype=dtype), drawn(len(COUNTS), 48, 64, dtype=dtype)
    bias_EO = drawn(len(COUNTS), 48, dtype=dtype) if biased else None
    stored = weight_EOI.mT.contiguous() if transposed else weight_EOI
    found = products.grouped(x_PI, stored, expert_P, bias_EO, transposed=transposed)
    expected = torch.stack([weight_EOI[e].double() @ x.double() for e, x in zip(expert_P, x_PI, strict=True)])
    close(found, expected + bias_EO[expert_P].double() if bias_EO is not None else expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_meets_the_thin_factors_of_its_number(dtype: torch.dtype) -> None:
    ranks = [8, 8, 5, 16, 0]
    expert_P = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    x_PI = drawn(len(expert_P), 64, dtype=dtype)
    inner, outer = ([drawn(rank, width, dtype=dtype) for rank in ranks] for width in (64, 48))
    runs = products.runs(ranks)
    assert runs == [(2, 8), (1, 5), (1, 16), (1, 0)]
    both = [[torch.cat(part[:2]), *part[2:]] for part in (inner, outer)]
    found = products.thin(x_PI, COUNTS, runs, both[0].__getitem__, both[1].__getitem__)
    assert found is not None
    rows = [outer[e].double().T @ (inner[e].double() @ x.double()) for e, x in zip(expert_P, x_PI, strict=True)]
    close(found, torch.stack(rows), dtype)


@pytest.mark.parametrize("count", [5, 32, 33, 70])
@pytest.mark.parametrize("name", ["int8g32", "uint4g32", "uint5g32", "vq2g32", "fp8"])
def test_codes_are_multiplied_in_bfloat16_as_their_numbers_are(name: str, count: int) -> None:
    storage, shape = find_storage(name), (2, 48, 64)
    parts = storage.encode(drawn(*shape, dtype=torch.float32), "BF16")
    x_nPI = drawn(2, count, 64, dtype=torch.bfloat16)
    expected = x_nPI.double() @ storage.decode(parts, shape).double().mT
    close(storage.product(x_nPI, parts, shape), expected, torch.bfloat16)


@pytest.mark.parametrize("count", [1, 31, 32, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_tiles_have_few_shapes(dtype: torch.dtype, count: int, tiles: bool) -> None:
    # torch compiles a product in bfloat16 for each number of rows.
    x_PI, weight_OI = drawn(count, 64, dtype=dtype), drawn(48, 64, dtype=dtype)
    assert len(devices.evened(x_PI)) == (48 if count == 33 and tiles and dtype == torch.bfloat16 else count)
    close(devices.multiplied(x_PI, weight_OI), x_PI.double() @ weight_OI.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_pass_grouped_products(dtype: torch.dtype) -> None:
    expert_P = torch.tensor([0, 0, 2])
    x_PI, weight_EOI = drawn(3, 16, dtype=dtype).requires_grad_(), drawn(3, 8, 16, dtype=dtype).requires_grad_()
    products.grouped(x_PI, weight_EOI, expert_P).backward(torch.ones(3, 8, dtype=dtype))
    assert x_PI.grad is not None
    assert weight_EOI.grad is not None
    close(x_PI.grad, weight_EOI.detach()[expert_P].double().sum(1), dtype)
    sums = torch.stack([x_PI.detach()[expert_P == e].double().sum(0) for e in range(3)])
    close(weight_EOI.grad, sums[:, None].expand_as(weight_EOI), dtype)
