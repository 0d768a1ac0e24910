"""Kernels that multiply codes on a GPU; where there is none, Triton's interpreter runs the same lines."""

import pytest
import torch

from moetailor.answers import packed
from moetailor.checkpoint.storage import few_bits, find_storage
from moetailor.checkpoint.storage.few_bits import FewBits
from moetailor.checkpoint.storage.lookup import octets_of
from support.decoding import CODES, SLOTS, layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.importorskip("moetailor.checkpoint.storage.kernels", reason="no Triton here")


def encoded(name: str, inputs: int, dtype: str) -> tuple[FewBits, tuple[int, int, int], dict[str, torch.Tensor]]:
    """Return a storage and random matrices in it."""
    storage, shape = find_storage(name), (3, 24, inputs)
    assert isinstance(storage, FewBits)
    parts = storage.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dtype)
    return storage, shape, {part: tensor.to(DEVICE) for part, tensor in parts.items()}


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("inputs", [10, 37, 300])
@pytest.mark.parametrize("name", CODES)
def test_they_give_the_bits_of_what_codes_stand_for(name: str, inputs: int, dtype: str) -> None:
    storage, shape, parts = encoded(name, inputs, dtype)
    scale, zero = storage.scales(parts, shape[1]), storage.zeros(parts, shape[1])
    packed = parts["_packed"]
    wanted = storage._scaled(storage.units(packed, inputs), scale, zero)
    found = kernels.numbers(
        octets_of(packed), storage.look_up(packed.device), scale, zero, storage.size(inputs), inputs, scale.dtype
    )
    # The interpreter cuts bfloat16 off where a GPU rounds.
    cut = dtype == "BF16" and DEVICE == "cpu"
    torch.testing.assert_close(found, wanted, rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.parametrize("inputs", [37, 300])
@pytest.mark.parametrize("name", CODES)
def test_each_input_meets_the_matrix_of_its_number(name: str, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shape, parts = encoded(name, inputs, "F32")
    x, number = torch.randn(5, inputs, generator=torch.Generator().manual_seed(1)), torch.tensor([2, -1, 0, 2, 1])
    weight = storage.decode(parts, shape).cpu()
    wanted = torch.stack([x[at] @ weight[n].T if n >= 0 else torch.zeros(24) for at, n in enumerate(number.tolist())])
    monkeypatch.setattr(few_bits, "runs_kernels", lambda _: True)
    found = storage.picked(x.to(DEVICE), number.to(DEVICE), parts, shape)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", ["bits", "both", "whole"])
def test_a_layer_gives_the_same_by_kernels(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, generator = layer(*SLOTS[name]).to(DEVICE), torch.Generator().manual_seed(0)
    x, gates = torch.randn(tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
    chosen = torch.rand(tokens, 8, generator=generator).topk(2, 1).indices
    given = [part.to(DEVICE) for part in (x, chosen, gates)]
    with torch.no_grad():
        monkeypatch.setattr(packed, "runs_kernels", lambda _: False)
        expected = module(*given)
        for module_of in (packed, few_bits):
            monkeypatch.setattr(module_of, "runs_kernels", lambda _: True)
        torch.testing.assert_close(module(*given), expected, rtol=1e-4, atol=1e-5)
