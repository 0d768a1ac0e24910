"""Few tokens and weights as they are: matrices, thin factors, kept experts of every family."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from moetailor.answers import Constant, Keep, Linear, Remap, Width, products
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.storage import compiled, find_storage, halves, plain_products
from moetailor.planning.layer_plan import LayerPlan
from moetailor.runtime import experts as runtime
from moetailor.runtime.reshape import LayerChange, reshape_model
from support.decoding import OWN, SLOTS, layer
from support.families import tiny_model
from support.tiny import every_family

PAIRS = pytest.mark.skipif(not halves.ARE_HERE, reason="this CPU multiplies no pairs of bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=PAIRS)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(3, 70, 96), (2, 64, 32), (1, 5, 2048)], ids=str)
def test_products_with_matrices_as_they_are(
    shape: tuple[int, int, int], threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator).to(dtype) for size in (shape, (9, shape[2])))
    number = torch.arange(9) * len(weight) // 9
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = plain_products.product(x, weight, number)
    each = weight.double()[number]
    expected, sizes = (
        torch.einsum("pi,poi->po", *both) for both in ((x.double(), each), (x.double().abs(), each.abs()))
    )
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 1e-6 * sizes).all()


@PAIRS
def test_what_matrices_are_taken() -> None:
    x, weight = torch.zeros(2, 64).bfloat16(), torch.zeros(3, 8, 64).bfloat16()
    assert plain_products.takes(x, weight)
    assert not plain_products.takes(x.float(), weight)
    assert not plain_products.takes(x, weight.float())
    assert not plain_products.takes(x.half(), weight.half())
    assert plain_products.takes(x.float(), weight.float())
    narrow = torch.zeros(2, 48), torch.zeros(3, 8, 48)
    assert plain_products.takes(*narrow)
    assert not plain_products.takes(*(each.bfloat16() for each in narrow))
    assert not plain_products.takes(torch.zeros(2, 40), torch.zeros(3, 8, 40))
    assert not plain_products.takes(x, torch.zeros(3, 64, 8).bfloat16().transpose(1, 2))
    assert not plain_products.takes(x, weight.to("meta"))
    trained = nn.Parameter(weight)
    assert not plain_products.takes(x, trained)
    with torch.no_grad():
        assert plain_products.takes(x, trained)
    assert products.runs_plain(x, weight)
    assert not products.runs_plain(x.requires_grad_(), weight)
    assert not products.runs_plain(torch.zeros(17, 64).bfloat16(), weight)


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "int8g96"])
def test_maps_are_added_by_their_rows(name: str, scale: torch.dtype) -> None:
    storage, generator, dtype = (
        find_storage(name),
        torch.Generator().manual_seed(0),
        {2: "BF16", 4: "F32"}[scale.itemsize],
    )
    shapes = [(rows, 96) if name == "plain" else (rows, 1, 96) for rows in (7, 11)]
    factors = [storage.encode(torch.randn(shape, generator=generator), dtype) for shape in shapes]
    x, out = torch.randn(2, 96, generator=generator).to(scale), torch.randn(2, 96, generator=generator)
    # One map for both tokens, others beside it, and inputs that two maps share.
    pairs, gates = [(0, 0, 1, 3), (1, 0, 1, 3), (1, 0, 4, 7), (0, 6, 0, 1)], [0.5, -2.0, 0.25, 1.0]
    inner, outer = (
        storage.decode(parts, shape).view(-1, 96).double() for parts, shape in zip(factors, shapes, strict=True)
    )
    expected = out.double()
    for (token, first, last, rank), gate in zip(pairs, gates, strict=True):
        expected[token] += gate * (x[token].double() @ inner[first : first + rank].T) @ outer[last : last + rank]
    assert plain_products.takes_factors(factors, out)
    plain_products.add_maps(factors, x, pairs, gates, out)
    # What codes stand for is rounded to the scale's dtype when it is a number, and not here.
    apart = 2.0**-7 if name != "plain" and scale == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=apart, atol=apart * float(expected.abs().max()))


def test_what_factors_are_taken() -> None:
    factor, out = {"": torch.zeros(4, 32)}, torch.zeros(3, 32)
    codes = {"_packed": torch.zeros(4, 1, 8, dtype=torch.int32), "_scale": torch.zeros(4, 1, 1)}
    assert plain_products.takes_factors([factor] * 2, out)
    assert plain_products.takes_factors([codes] * 2, out)
    assert not plain_products.takes_factors([factor] * 2, out.double())
    assert not plain_products.takes_factors([factor] * 2, torch.zeros(32, 3).T)
    assert not plain_products.takes_factors([{"": torch.zeros(4, 20)}] * 2, torch.zeros(1, 20))
    # Of another dtype, in groups, of fewer bits, turned, and where gradients go.
    groups = codes | {"_scale": torch.zeros(4, 1, 2)}
    four = codes | {"_packed": torch.zeros(4, 1, 4, dtype=torch.int32)}
    trained = nn.Parameter(torch.zeros(4, 32))
    for other in (torch.zeros(4, 32).bfloat16(), torch.zeros(4, 32).half(), torch.zeros(32, 4).T, trained):
        assert not plain_products.takes_factors([factor, {"": other}], out)
        assert not plain_products.takes_factors([{"": other}, factor], out)
    for other in (groups, four, factor):
        assert not plain_products.takes_factors([codes, other], out)
    assert not plain_products.takes_factors([groups] * 2, out)
    assert not plain_products.takes_factors([four] * 2, out)


MAPS = {
    "plain": [*OWN[:4], *(Linear(rank) for rank in (3, 2, 1, 5))],
    "int8": [*OWN[:4], *(Linear(rank, int8=True) for rank in (3, 2, 1, 5))],
    "shared": [*OWN[:4], *(Linear(rank, shared=True) for rank in (3, 2, 1, 5))],
}
CHOSEN = torch.tensor([[0, 6], [7, 3], [4, 1]])


def _few_and_many(module: nn.Module, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> tuple:
    with torch.no_grad():
        return module(x, chosen, gates), module(*(each.repeat(40, 1) for each in (x, chosen, gates)))[: len(x)]


@pytest.mark.parametrize("way", ["as it is", "in columns", "float16", "by torch"])
@pytest.mark.parametrize("name", MAPS)
def test_few_tokens_choose_maps(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, generator = layer(MAPS[name], {}), torch.Generator().manual_seed(0)
    x, gates = torch.randn(3, 32, generator=generator), torch.rand(3, 2, generator=generator)
    add_maps = Mock(side_effect=plain_products.add_maps)
    monkeypatch.setattr(plain_products, "add_maps", add_maps)
    if way == "float16":
        module, x, gates = (each.half() for each in (module, x, gates))
    elif way == "in columns":
        x = x.T.contiguous().T
    elif way == "by torch":
        monkeypatch.setattr(plain_products, "takes_factors", lambda *_: False)
    few, many = _few_and_many(module, x, CHOSEN, gates)
    assert add_maps.called == (way == "as it is")
    torch.testing.assert_close(
        few, many, rtol=1e-2 if way == "float16" else 1e-5, atol=1e-2 if way == "float16" else 1e-5
    )


@pytest.mark.parametrize("trained", ["", "experts", "constants", "all"])
@pytest.mark.parametrize("name", MAPS)
def test_gradients_pass_few_tokens_whose_router_is_frozen(name: str, trained: str) -> None:
    module, generator = layer(MAPS[name], {}), torch.Generator().manual_seed(0)
    names = {"": (), "experts": ("gate_up_proj", "down_proj"), "constants": ("linear_constant",)}
    for parameter, tensor in module.named_parameters():
        tensor.requires_grad_(trained == "all" or parameter in names[trained])
    x, gates = torch.randn(3, 32, generator=generator), torch.rand(3, 2, generator=generator)
    out = module(x, CHOSEN, gates)
    torch.testing.assert_close(out, _few_and_many(module, x, CHOSEN, gates)[1], rtol=1e-4, atol=1e-5)
    assert out.requires_grad == bool(trained)
    if trained:
        out.sum().backward()
        every = [tensor for tensor in module.parameters() if tensor.requires_grad]
        assert all(tensor.grad is not None and tensor.grad.abs().sum() for tensor in every)


def test_biases_of_experts_in_few_bits_are_their_own() -> None:
    widths = {expert: Width.parse(bits) for expert, bits in enumerate(("4", "vq3/5", "4", "8"))}
    module, generator = layer(OWN, widths, "gpt_oss"), torch.Generator().manual_seed(0)
    x, gates = torch.randn(3, 32, generator=generator), torch.rand(3, 2, generator=generator)
    few, many = _few_and_many(module, x, torch.tensor([[2, 1], [0, 3], [2, 0]]), gates)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4 * float(many.abs().max()))


def test_slots_that_are_not_there_are_no_answer() -> None:
    module, generator = layer(MAPS["plain"], {}), torch.Generator().manual_seed(0)
    x, gates = torch.randn(3, 32, generator=generator), torch.rand(3, 2, generator=generator)
    with torch.no_grad(), pytest.raises(IndexError):
        module(x, torch.tensor([[0, 6], [8, 3], [4, 1]]), gates)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["plain", "int8"])
def test_what_is_traced_by_jit_does_not_know_what_was_chosen(name: str) -> None:
    module, generator = layer([*MAPS[name][:7], Constant()], {}), torch.Generator().manual_seed(0)
    module.config._experts_implementation = "grouped_mm"
    x, gates = torch.randn(3, 32, generator=generator), torch.rand(3, 2, generator=generator)
    with torch.no_grad():
        if name == "int8":  # it knows no views of codes
            with pytest.raises(RuntimeError):
                torch.jit.trace(module, (x, CHOSEN, gates), check_trace=False)
            return
        traced = torch.jit.trace(module, (x, CHOSEN, gates), check_trace=False)
        others = torch.tensor([[5, 7], [2, 6], [7, 0]])
        torch.testing.assert_close(traced(x, others, gates), module(x, others, gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", SLOTS)
def test_few_tokens_get_what_many_get(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Few are gone through as lists, many as tensors."""
    module, generator = layer(*SLOTS[name]).to(dtype), torch.Generator().manual_seed(0)
    x, gates = (
        torch.randn(tokens, 32, generator=generator).to(dtype),
        torch.rand(tokens, 2, generator=generator).to(dtype),
    )
    apart = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}[dtype]
    with torch.no_grad():
        for first in range(8):
            chosen = (torch.rand(tokens, 8, generator=generator).topk(2, 1).indices + first) % 8
            many = module(*(each.repeat(40, 1) for each in (x, chosen, gates)))[:tokens]
            largest = float(many.abs().max())
            torch.testing.assert_close(module(x, chosen, gates), many, rtol=apart, atol=apart * largest)


@every_family
def test_few_tokens_meet_kept_experts_as_their_family_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots share an expert, one is a constant; products are torch's, in float32."""
    model = tiny_model(name)
    anatomy = discover(model.config, model)
    first = next(iter(anatomy.layers.values()))
    count = first.num_experts
    plan = LayerPlan(slots=(*[Keep()] * (count - 2), Remap(0, 0.5), Constant()))
    slot_map = plan.slot_map()
    change = LayerChange(experts=slot_map.plain_pool, slots=plan.kept_slots, slot_map=slot_map)
    reshape_model(model, anatomy, {first.index: change})
    module, generator = model.get_submodule(first.experts), torch.Generator().manual_seed(0)
    module.constant.data.copy_(torch.randn(module.constant.shape, generator=generator))
    x, gates = torch.randn(3, module.constant.shape[1], generator=generator), torch.rand(3, 4, generator=generator)
    chosen = torch.tensor([[0, 1, count - 2, count - 1], [count - 1, 0, 1, 2], [2, 1, 0, count - 2]])
    product = Mock(side_effect=lambda x, weight, number: torch.einsum("pi,poi->po", x, weight[number]))
    with torch.no_grad():
        expected = module(x, chosen, gates)
        for place in (products, runtime):
            monkeypatch.setattr(place, "runs_plain", lambda *_: True)
        monkeypatch.setattr(plain_products, "product", product)
        torch.testing.assert_close(module(x, chosen, gates), expected, rtol=1e-5, atol=1e-5)
    assert product.called != bool(getattr(module, "is_transposed", False))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=PAIRS)])
def test_kept_experts_are_read_by_loops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe", intermediate_size=64)
    anatomy = discover(model.config, model)
    first = next(iter(anatomy.layers.values()))
    slots = (*OWN[:6], Linear(2), Constant())
    slot_map = LayerPlan(slots=slots).slot_map()
    change = LayerChange(experts=slot_map.plain_pool, slots=tuple(range(8)), slot_map=slot_map)
    reshape_model(model, anatomy, {first.index: change})
    module, generator = model.get_submodule(first.experts).to(dtype), torch.Generator().manual_seed(0)
    for name in module.added:
        getattr(module, name).data.copy_(torch.randn(getattr(module, name).shape, generator=generator) / 4)
    x, gates = torch.randn(2, 32, generator=generator).to(dtype), torch.rand(2, 3, generator=generator).to(dtype)
    chosen = torch.tensor([[0, 6, 3], [7, 0, 5]])
    product = Mock(side_effect=plain_products.product)
    monkeypatch.setattr(plain_products, "product", product)
    with torch.no_grad():
        found = module(x, chosen, gates)
        assert product.call_count == 2
        monkeypatch.setattr(runtime, "runs_plain", lambda *_: False)
        torch.testing.assert_close(found, module(x, chosen, gates), rtol=2**-6, atol=2**-6)
        assert product.call_count == 2
    # Gradients go another way.
    module(x, chosen, gates).sum().backward()
    assert product.call_count == 2
    assert module.down_proj.grad is not None
