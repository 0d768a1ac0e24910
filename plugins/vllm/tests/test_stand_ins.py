"""Every answer of the format on random numbers: the plug-in against moetailor's own runtime. Needs no vLLM."""

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

import moetailor.checkpoint.storage
import moetailor_vllm
from moetailor.answers import FLOATS, Constant, Kind, LowRank, Packed, SlotMap, Width
from moetailor_vllm.slots import Slots
from moetailor_vllm.stand_ins import Expert, stand_ins
from moetailor_vllm.stored import ALONE, FewBits, Rank
from moetailor_vllm.widths import storages
from support_vllm import WIDTH, call, everything, in_float64, moetailor_layer, pooled, served, slot_map

UINT, SYMMETRIC, FP8 = Packed(bits=4, down=6), Packed(bits=3, codes="int", group=32), Packed(bits=8, codes="fp8")
EXPERT = Expert(width=32, inner=32, dtype=torch.float32, activated=torch.mul)
BLOCKS, MX, NV = (Packed(bits=FLOATS[codes].bits, codes=codes) for codes in ("fp8b128", "mxfp4", "nvfp4"))
CODEBOOK, WIDE = Packed(bits=2, down=5, codes="vq", group=16), Packed(bits=8, group=7)
MAPS = {
    "everything": everything(),
    "with widths": everything((2, UINT), (3, SYMMETRIC), (2, UINT)),
    "all in few bits": slot_map(
        6, *((row, width) for row, width in enumerate([UINT, FP8, CODEBOOK, UINT, WIDE, CODEBOOK]))
    ),
    "floats in few bits": slot_map(
        5, (0, BLOCKS), (1, MX), (2, NV), (3, MX), (4, NV), Constant(), (1, MX), scaled=True
    ),
    "a pool alone": slot_map(3, 0, 2, 1, 2, scaled=True),
}


NO_POOL = slot_map(2, (0, UINT), LowRank(1, 3), (1, FP8), LowRank(1), Constant(), LowRank(5, 9))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums that threads share differ in their last digits with how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("slots", MAPS.values(), ids=MAPS)
def test_answers_are_moetailors(slots: SlotMap, tokens: int, live: bool) -> None:
    module = moetailor_layer(slots)
    answers = served(slots, module, live=live)
    x, chosen, gates = call(slots, tokens)
    weights = gates * answers.scale[chosen]
    row, weight = answers.rows(chosen, weights)
    assert (row >= 0).all()
    got = pooled(module, x, row, weight) if slots.plain_pool else torch.zeros_like(x)
    got = got + answers.given(x, chosen, weights)
    # Outputs reach 73, where sums of float32 in any order are some 1e-5 off: both are held against float64.
    exact = in_float64(module, x, chosen, gates)
    rounding = (module(x, chosen, gates) - exact).abs().max()
    assert rounding <= 1e-6 * exact.abs().max()
    assert (got - exact).abs().max() <= 1e-5 + 2 * rounding


@torch.no_grad()
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_biases_and_other_activations_are_moetailors(tokens: int, live: bool) -> None:
    module = moetailor_layer(NO_POOL, biased=True)
    x, chosen, gates = call(NO_POOL, tokens)
    got = served(NO_POOL, module, live=live).given(x, chosen, gates)
    torch.testing.assert_close(got, module(x, chosen, gates), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("slots", "biased"),
    [
        (MAPS["with widths"], False),
        (MAPS["everything"], False),
        (slot_map(3, *((n, CODEBOOK) for n in range(3))), False),
        (MAPS["floats in few bits"], False),
        (NO_POOL, True),
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up_to_one(slots: SlotMap, biased: bool, ranks: int) -> None:
    module = moetailor_layer(slots, biased)
    x, chosen, gates = call(slots, 20)
    whole = served(slots, module).given(x, chosen, gates)
    parts = [served(slots, module, Rank(number, ranks)).given(x, chosen, gates) for number in range(ranks)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        ({"borrowed": [{"layer": 3, "source": 0, "slots": [1]}]}, NotImplementedError, "experts of other layers"),
        ({"auxiliary": [{"main": 1, "slots": [0]}]}, NotImplementedError, "auxiliary slots"),
        ({"narrow": [{"neurons": 8, "slots": [0]}]}, NotImplementedError, "narrow experts"),
        (
            {"constant": [1], "packed": [{"bits": 16, "slots": [0]}]},
            NotImplementedError,
            "codes of a quantized original",
        ),
        (
            {"constant": [1], "packed": [{"bits": 4, "codes": "int2", "slots": [0]}]},
            NotImplementedError,
            "does not serve experts in int2",
        ),
        ({"novel": [1]}, ValueError, r"unknown keys \['novel'\]"),
        ({}, ValueError, "slot 1 has row -1"),
    ],
)
def test_what_is_not_served_is_refused_by_name(more: dict, kind: type[Exception], said: str) -> None:
    entry = {"experts": 1, "rows": [0, -1]} | more
    with pytest.raises(kind, match=said):
        stand_ins(Slots.read(entry, "layer 0"), EXPERT)


def test_ranks_that_cannot_cut_codes_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="480 cannot be cut for 2 ranks in units of 32"):
        FewBits((4, 192, 96), "uint5g128", Rank(0, 2), 2)


@pytest.mark.parametrize("codes", get_args(Kind))
def test_every_storage_that_moetailor_writes_is_served(codes: Kind) -> None:
    """A new one fails here until it is served, or refused by its name and left out here."""
    width = Width(bits=FLOATS[codes].bits if codes in FLOATS else 4, codes=codes)
    slots = slot_map(1, (0, Packed.of(width)))
    assert {"gate", "up", "down"} == storages(Slots.read(slots.to_json(), "layer 0").answers[0]).keys()
    module = moetailor_layer(slots)
    answers = served(slots, module)
    for part in ("gate", "up", "down"):
        name = f"{width.stem}_{part}"
        torch.testing.assert_close(answers.stand_ins[0].numbers(name), module.tensor(name), rtol=0, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("codes", ["uint", "int"])
def test_integers_of_every_width_are_moetailors(codes: Kind, bits: int) -> None:
    """Codes that bytes hold whole, and those that are put together from parts; groups of 31 cut bytes, too."""
    width = Width(bits=bits, codes=codes, group=31)
    slots = slot_map(2, (0, Packed.of(width)), (1, Packed.of(width)))
    module = moetailor_layer(slots)
    (stand_in,) = served(slots, module).stand_ins
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    for part in ("gate", "up", "down"):
        name = f"{width.stem}_{part}"
        numbers = module.tensor(name)
        torch.testing.assert_close(stand_in.numbers(name), numbers, rtol=0, atol=0)
        torch.testing.assert_close(stand_in.numbers(name, torch.tensor([1, 1, 0])), numbers[[1, 1, 0]], rtol=0, atol=0)
        inputs = x.repeat(1, numbers.shape[2] // WIDTH)
        given = stand_in.tensors[name].product(inputs, 1)
        torch.testing.assert_close(given, inputs @ numbers[1].T)
        assert given.is_contiguous()  # vLLM's activations read it so


@pytest.mark.parametrize(
    "storage", ["uint4g32", "uint5g32", "uint8g32", "int8g64", "vq2g32", "vq3g32", "fp8", "mxfp4", "nvfp4"]
)
def test_numbers_in_bfloat16_are_those_of_float32_rounded_once(storage: str) -> None:
    few, exact = (FewBits((2, 16, 64), storage, ALONE, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    generator = torch.Generator().manual_seed(0)
    for suffix, shape in few.parts.items():
        if few.scale.dtype == torch.uint8 or (suffix == "_packed" and storage == "fp8"):
            stored = torch.randint(1, 120, shape, generator=generator, dtype=torch.uint8)
        elif suffix == "_scale":
            stored = torch.randn(shape, generator=generator).bfloat16()
        else:
            stored = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
        if suffix == "_global_scale":
            stored = torch.tensor([[3.0], [0.7]])
        few.load(suffix, stored), exact.load(suffix, stored)
    torch.testing.assert_close(few.numbers(), exact.numbers().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("inputs", [5, 32, 40])
def test_products_of_many_inputs_are_those_of_the_numbers(inputs: int) -> None:
    few, generator = FewBits((2, 24, 64), "int4g32", ALONE, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    few.load("_packed", torch.randint(-(2**31), 2**31, few.parts["_packed"], generator=generator).int())
    few.load("_scale", torch.rand(few.parts["_scale"], generator=generator).bfloat16())
    x = torch.randn(inputs, 64, generator=generator).bfloat16()
    given, numbers = few.product(x, 1), few.numbers()[1].double()
    torch.testing.assert_close(given.double(), x.double() @ numbers.T, rtol=2**-7, atol=0.05)
    assert given.is_contiguous()


def test_tables_of_codebooks_are_moetailors() -> None:
    files = [
        Path(package.__file__).with_name("codebooks.safetensors")
        for package in (moetailor_vllm, moetailor.checkpoint.storage)
    ]
    assert filecmp.cmp(*files, shallow=False)
