"""Few tokens: codes multiplied without forming weights, and graphs whose shapes do not depend on what routers chose."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numba
import pytest
import torch

from moetailor.answers import Constant, Remap, Width, packed
from moetailor.checkpoint.storage import compiled, few_bits, find_storage, half_loops, loops, vectors
from support.decoding import CODES, OWN, SLOTS, layer

# Groups in which loops run as vectors.
WIDE = ["uint8g128", "uint5g128", "uint4g128", "uint2g128", "vq2g128"]
LOOPS = (loops.products, loops.weights, half_loops.products, half_loops.tiles)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("inputs", [37, 40, 42, 96, 300])
@pytest.mark.parametrize("name", [*CODES, *WIDE])
def test_products_of_codes_are_those_of_their_numbers(
    name: str, inputs: int, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_bits, "runs_compiled", lambda _: loops)
    storage, shape = find_storage(name), (3, 24, inputs)
    generator = torch.Generator().manual_seed(0)
    parts = storage.encode(torch.randn(shape, generator=generator), "F32")
    monkeypatch.setattr(few_bits, "formed", lambda _: 5 * inputs)
    for count in (2, 9):  # few inputs, whose groups are summed, and many
        x = torch.randn(3, count, inputs, generator=generator)
        expected = torch.einsum("npi,noi->npo", x, storage.decode(parts, shape))
        torch.testing.assert_close(storage.product(x, parts, shape), expected, rtol=1e-4, atol=1e-4)
        some = {part: tensor[1:2] for part, tensor in parts.items()}
        torch.testing.assert_close(storage.product(x[1:2], some, shape), expected[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("inputs", [10, 37, 42, 52, 96, 300])
@pytest.mark.parametrize("name", [*CODES, *WIDE])
def test_loops_give_the_bits_of_what_they_stand_for(
    name: str, inputs: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, shape = find_storage(name), (3, 24, inputs)
    parts = storage.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dtype)
    found = storage.decode(parts, shape)
    monkeypatch.setattr(few_bits, "runs_compiled", lambda _: False)
    expected = storage.decode(parts, shape)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loops_tell_every_float_of_8_bits(dtype: torch.dtype) -> None:
    octets, scale = torch.arange(256, dtype=torch.uint8), torch.full((1, 1, 1), 0.75, dtype=dtype)
    found = find_storage("fp8").decode({"_packed": octets.view(1, 1, 256), "_scale": scale}, (1, 1, 256))
    expected = (octets.view(torch.float8_e4m3fn).float() * 0.75).to(dtype)
    assert int(expected.isnan().sum()) == 2
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["uint5g24", "vq2g16"])
def test_threads_share_the_outputs_of_a_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shape, generator = find_storage(name), (2, 23, 96), torch.Generator().manual_seed(0)
    parts = storage.encode(torch.randn(shape, generator=generator), "F32")
    x = torch.randn(2, 3, 96, generator=generator)
    expected, numbers = storage.product(x, parts, shape), storage.decode(parts, shape)
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(storage.product(x, parts, shape), expected, rtol=0, atol=0)
    torch.testing.assert_close(storage.decode(parts, shape), numbers, rtol=0, atol=0)


def test_gradients_of_inputs_pass_products_of_codes() -> None:
    storage, shape = find_storage("uint4g16"), (1, 8, 32)
    parts = storage.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "F32")
    x = torch.ones(1, 2, 32, requires_grad=True)
    storage.product(x, parts, shape).sum().backward()
    torch.testing.assert_close(x.grad, storage.decode(parts, shape).sum(1).expand(1, 2, 32), rtol=1e-5, atol=1e-5)


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: object) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(loops, "numba", SimpleNamespace(njit=njit))
    assert loops._compiled(lambda one: one + 1)(1) == 2


def test_loops_of_each_kind_have_a_name_of_their_own() -> None:
    """Numba keeps what it compiled under a function's name: several of one name were taken for each other."""
    kinds = [(bits, vectors.INTEGERS) for bits in range(2, 9)] + [(8, vectors.FLOATS), (8, 2), (8, 4), (8, 8), (12, 4)]
    names = [of(*kind).py_func.__qualname__ for kind in kinds for of in LOOPS]
    assert len({*names}) == len(LOOPS) * len(kinds)


def test_loops_give_the_same_bits_where_a_cpu_does_not_round_to_bfloat16(tmp_path: Path) -> None:
    lines = """
        import torch
        from moetailor.checkpoint.storage import few_bits, find_storage
        for name in ("uint3g16", "vq2g16", "fp8"):
            storage, shape = find_storage(name), (1, 4, 48)
            parts = storage.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "BF16")
            found = storage.decode(parts, shape)
            few_bits.runs_compiled = lambda _: False
            assert found.dtype == torch.bfloat16 and torch.equal(found, storage.decode(parts, shape)), name
    """
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", dedent(lines)], env=os.environ | plain, capture_output=True, text=True)
    assert not run.returncode, run.stderr


@pytest.mark.parametrize(("inputs", "name"), [(96, "uint4g32"), (42, "uint5g24"), (96, "vq2g16")])
def test_inputs_pick_their_matrices(inputs: int, name: str) -> None:
    storage, shape, generator = find_storage(name), (4, 12, inputs), torch.Generator().manual_seed(0)
    parts = storage.encode(torch.randn(shape, generator=generator), "F32")
    x, number = torch.randn(6, inputs, generator=generator), torch.tensor([3, 0, 0, 2, 0, 3])
    expected = torch.einsum("pi,poi->po", x, storage.decode(parts, shape)[number])
    found = compiled.products([(storage, parts, shape, len(x))], x, number.numpy())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["bits", "whole"])
def test_few_tokens_meet_codes_and_large_experts_run_alone(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, generator = layer(*SLOTS[name]), torch.Generator().manual_seed(0)
    x, gates = torch.randn(tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
    chosen = torch.rand(tokens, 8, generator=generator).topk(2, 1).indices
    chosen[0] = torch.tensor([0, 3])
    alone, as_they_lie = (Mock(side_effect=getattr(packed, name)) for name in ("_alone", "_as_they_lie"))
    monkeypatch.setattr(packed, "_alone", alone)
    monkeypatch.setattr(packed, "_as_they_lie", as_they_lie)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(packed, "runs_compiled", lambda _: False)
            expected = module(x, chosen, gates)
        assert not alone.called
        assert not as_they_lie.called
        torch.testing.assert_close(module(x, chosen, gates), expected, rtol=1e-4, atol=1e-5)
        assert as_they_lie.called == (tokens == 1)
        assert not alone.called
        monkeypatch.setattr(packed, "formed", lambda _: 1)
        torch.testing.assert_close(module(x, chosen, gates), expected, rtol=1e-4, atol=1e-5)
        assert alone.called == (tokens > 1 or name == "whole")


# Eight kinds of codes in the graph of each of six pairs take as long as all others together.
LONG = {("bits", 3): pytest.mark.slow}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [pytest.param(*case, marks=LONG.get(case, ())) for case in itertools.product(SLOTS, (1, 3))],
)
def test_one_graph_serves_whatever_the_router_chooses(name: str, tokens: int) -> None:
    """Compiled, all pairs run and those that stand for nothing count for nothing; as it is, only live ones run."""
    module = layer(*SLOTS[name])
    module.config._experts_implementation = "grouped_mm"
    torch._dynamo.reset()
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=counted, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for first in range(8):
            x, gates = torch.randn(tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
            chosen = (torch.rand(tokens, 8, generator=generator).topk(2, 1).indices + first) % 8
            chosen[0] = torch.tensor([first, (first + 3) % 8])
            expected = module(x, chosen, gates)
            torch.testing.assert_close(compiled(x, chosen, gates), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_gates_of_few_tokens_have_gradients_where_their_inputs_have_none() -> None:
    module, generator = layer(*SLOTS["bits"]), torch.Generator().manual_seed(0)
    x, slots = torch.randn(3, 32, generator=generator), torch.tensor([[0, 5], [3, 1], [7, 2]])
    gates = torch.rand(3, 2, generator=generator).requires_grad_()
    module(x, slots, gates).sum().backward()
    with torch.no_grad():
        each = [module(x, slots, (torch.arange(2) == place).float().expand(3, 2)).sum(1) for place in range(2)]
    torch.testing.assert_close(gates.grad, torch.stack(each, 1), rtol=1e-4, atol=1e-4)


def test_slots_of_few_tokens_with_one_expert_count_together() -> None:
    """Many tokens take another way."""
    widths = {expert: Width.parse(bits) for expert, bits in enumerate(("4", "8", "vq3/5"))}
    module = layer([*OWN[:5], Remap(1, 0.5), Remap(1), Remap(2)], widths)
    x, slots = (
        torch.randn(2, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 6, 5, 0], [7, 2, 1, 5]]),
    )
    gates = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
    with torch.no_grad():
        expected = module(*(each.repeat(4, 1) for each in (x, slots, gates)))[:2]
        torch.testing.assert_close(module(x, slots, gates), expected, rtol=1e-4, atol=1e-4)


def test_few_tokens_do_not_hang_on_defaults() -> None:
    module, generator = layer(*SLOTS["bits"]), torch.Generator().manual_seed(0)
    given = torch.randn(3, 32, generator=generator), torch.tensor([[0, 5], [3, 1], [7, 7]]), torch.rand(3, 2)
    with torch.no_grad():
        expected = module(*given)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                assert torch.equal(module(*given), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_pairs_that_stand_for_nothing_count_for_nothing_whatever_they_give() -> None:
    """A token that goes to constants alone may be one that experts would turn into no number."""
    module = layer([*OWN[:6], Constant(), Constant()], {})
    module.config._experts_implementation = "grouped_mm"
    x, gates = torch.stack([torch.full((32,), 1e30), torch.randn(32)]), torch.rand(2, 2)
    torch._dynamo.reset()
    with torch.no_grad():
        given = torch.compile(module, backend="eager", fullgraph=True)(x, torch.tensor([[6, 7], [0, 1]]), gates)
        torch.testing.assert_close(given[0], gates[0] @ module.constant)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOTS)
def test_what_is_traced_is_also_generated(name: str) -> None:
    """Inductor chooses how tensors lie, and so what may be viewed as what."""
    module, generator = layer(*SLOTS[name]), torch.Generator().manual_seed(0)
    module.config._experts_implementation = "grouped_mm"
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for first in range(4):
            x, gates = torch.randn(1, 32, generator=generator), torch.rand(1, 2, generator=generator)
            chosen = torch.tensor([[first, (first + 3) % 8]])
            torch.testing.assert_close(compiled(x, chosen, gates), module(x, chosen, gates), rtol=1e-4, atol=1e-5)
