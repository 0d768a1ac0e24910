"""checkpoint/storage/codebooks.py: codes by hand, and tables against what is known of the best ones."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moetailor.checkpoint.storage import Codebook, Codes, TensorSpec, codebooks, find_storage
from moetailor.errors import CheckpointError
from moetailor.fitting.gptq import Seen, gptq

every_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4])
# Mean squared errors of the best numbers for single normal weights (J. Max, 1960).
SCALAR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def table_of(bits: int) -> torch.Tensor:
    return safetensors.torch.load_file(Path(codebooks.__file__).with_name("codebooks.safetensors"))[f"vq{bits}"].float()


@every_bits
def test_tables_err_less_than_single_numbers_and_are_the_means_of_what_they_stand_for(bits: int) -> None:
    table, rows = table_of(bits), torch.randn(100_000, table_of(bits).shape[1])
    assert table.shape[0] == 2 ** (bits * table.shape[1])
    index = torch.cat([torch.cdist(some, table).argmin(1) for some in rows.split(10_000)])
    error = float((rows - table[index]).square().mean())
    assert 4.0**-bits < error < 0.9 * SCALAR[bits]
    assert error == pytest.approx(codebooks.NOISE[bits], rel=0.02)
    # Lloyd's condition, on other numbers than those that the table was made from
    means = torch.zeros_like(table).index_add(0, index, rows) / torch.bincount(index, minlength=len(table))[:, None]
    apart = (means - table).square().sum(1) * torch.bincount(index, minlength=len(table)) / len(rows)
    assert float(apart.sum()) < 0.01 * error * table.shape[1]


@every_bits
@pytest.mark.parametrize("inputs", [48, 70])
def test_stored_tensors_are_what_is_declared_and_mean_what_is_decoded(bits: int, inputs: int) -> None:
    storage, table = Codebook(bits=bits, group=24), table_of(bits)
    step, code_bits = table.shape[1], bits * table.shape[1]
    spec = TensorSpec(shape=(2, 3, inputs), storage=storage.name)
    stored, declared = spec.encode("w", torch.randn(2, 3, inputs), "F32"), spec.parts("w", "F32")
    assert {key: tuple(part.shape) for key, part in stored.items()} == {
        key: part for key, (_, part) in declared.items()
    }
    expected = torch.empty(2, 3, inputs)
    for n, o in itertools.product(range(2), range(3)):
        words = stored["w_packed"][n, o].tolist()
        stream = [word >> bit & 1 for word in words for bit in range(32)]
        for i in range(inputs):
            code = sum(stream[i // step * code_bits + bit] << bit for bit in range(code_bits))
            expected[n, o, i] = table[code, i % step] * stored["w_scale"][n, o, i // 24]
    given = storage.decode({key[1:]: part for key, part in stored.items()}, (2, 3, inputs))
    torch.testing.assert_close(given, expected)


@every_bits
def test_numbers_of_the_table_are_kept(bits: int) -> None:
    storage, count = Codebook(bits=bits, group=24), 2 ** (bits * table_of(bits).shape[1])
    code = torch.randint(-count // 2, count // 2, (2, 5, storage.codes(48))).to(torch.int8)
    codes = Codes(code=code, scale=torch.rand(2, 5, 2) + 0.1, zero=None)
    weight = storage.numbers(codes, 48)
    torch.testing.assert_close(storage.decode(storage.pack(codes), (2, 5, 48)), weight)
    assert torch.equal(storage.round(weight, codes.scale, None), code)


@pytest.mark.parametrize("rows", [7, 5000])
def test_the_nearest_row_is_the_nearest(rows: int) -> None:
    table, some = torch.randn(3, 256, 4), torch.randn(3, rows, 4)
    found = codebooks.nearest(some, table)
    apart = torch.cdist(some.double(), table.double())
    least, taken = apart.amin(-1), apart.gather(-1, found[..., None].long())[..., 0]
    # Of two that are as near but for 2^-15 of it either may be taken.
    assert float((taken.square() / least.square()).max()) < 1 + 1e-3


@every_bits
def test_rows_and_matrices_that_hold_nothing_leave_others_as_they_are(bits: int) -> None:
    """A row of next to nothing has a scale of nothing, and one without numbers none that is any."""
    storage, weight = Codebook(bits=bits, group=16), torch.randn(3, 6, 32)
    moment = torch.randn(3, 64, 32)
    seen = Seen.of(moment.transpose(1, 2) @ moment)
    alone = gptq(weight[1:2], Seen(importance=seen.importance[1:2], upper=seen.upper[1:2]), storage, torch.float32)
    weight[0, 0], weight[2] = weight[0, 0] * 1e-26, torch.nan
    for codes in (gptq(weight, seen, storage, torch.float32), storage.nearest(weight, torch.float32)):
        numbers = storage.numbers(codes, 32)
        assert float(numbers[0, 0].abs().max()) < 1e-20
        error = (numbers[:2, 1:] - weight[:2, 1:]).square().mean() / weight[:2, 1:].square().mean()
        assert float(error) < 4 * codebooks.NOISE[bits]
    together = gptq(weight, seen, storage, torch.float32)
    assert torch.equal(together.code[1], alone.code[0])


def test_a_weighted_metric_decides() -> None:
    """Along the first input an error costs nothing, so that the others alone choose."""
    storage, table = Codebook(bits=2, group=16), table_of(2)
    weight, metric = torch.randn(4, 1, 50), torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0]))[None]
    code, given = storage.choose(weight, metric, torch.ones(1, 50), None)
    index = (code[0] + 128).long()
    torch.testing.assert_close(given[:, 0].T, table[index])
    apart = torch.cdist(weight[1:, 0].T, table[:, 1:])
    torch.testing.assert_close(apart.gather(1, index[:, None])[:, 0], apart.amin(1), rtol=1e-2, atol=1e-2)


@every_bits
def test_scales_are_those_that_least_squares_gives_for_the_codes(bits: int) -> None:
    storage = Codebook(bits=bits, group=24)
    weight, worth = 3 * torch.randn(2, 3, 48), torch.rand(2, 48) + 0.1
    scale, zero = storage.fit(weight, worth, torch.float32)
    assert zero is None

    def error(scale: torch.Tensor) -> torch.Tensor:
        code = storage.round(weight, scale, None)
        apart = storage.numbers(Codes(code=code, scale=scale, zero=None), 48) - weight
        return (apart.square() * worth[:, None]).unflatten(-1, (2, 24)).sum(-1)

    square = (weight.square() * worth[:, None]).unflatten(-1, (2, 24)).sum(-1) / worth.view(2, 1, 2, 24).sum(-1)
    assert float(error(scale).sum()) < float(error(square.sqrt()).sum())
    assert float(error(scale).sum()) < min(float(error(scale * off).sum()) for off in (0.8, 1.25))


def test_groups_of_zeros_stay_zeros() -> None:
    storage = find_storage("vq2g8")
    weight = torch.cat([torch.zeros(1, 2, 8), torch.randn(1, 2, 8)], -1)
    stored = TensorSpec(shape=(1, 2, 16), storage="vq2g8").encode("w", weight, "BF16")
    assert all(bool(torch.isfinite(part).all()) for part in stored.values())
    given = storage.decode({key[1:]: part for key, part in stored.items()}, (1, 2, 16))
    assert float(given[..., :8].abs().max()) == 0


@pytest.mark.parametrize("name", ["vq5g128", "vq0g128", "vq2g0", "vq2"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no storage"):
        find_storage(name)
