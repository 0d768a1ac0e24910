"""fitting/gptq.py and widths.py: one matrix at a time, code by code, with the inverse updated by its formula."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from moetailor.answers import Kind, Width
from moetailor.checkpoint.storage import Codebook, Codes, FewBits, Float8, Integers, codebooks, find_storage
from moetailor.checkpoint.storage.float4 import Float4
from moetailor.fitting.gptq import BLOCK, DAMPING, Seen, gptq
from moetailor.fitting.widths import RIDGE, Rounding, quantized
from support.layers import layer_of_tokens, random_experts


def listed(storage: FewBits, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Return all that a code of each output may stand for, [O, codes, inputs of a code].

    Args:
        storage: how codes lie.
        scale: [1, O, 1].
        zero: [1, O, 1].
    """
    if isinstance(storage, Integers):
        code = torch.arange(-(2 ** (storage.bits - 1)), 2 ** (storage.bits - 1))
        return ((code - (0 if zero is None else zero[0])) * scale[0])[..., None].double()
    if isinstance(storage, Float4 | Float8):
        every = torch.arange(16) if isinstance(storage, Float4) else torch.arange(256)[torch.arange(256) % 128 != 127]
        grid = storage.listed(every.to(torch.uint8).view(torch.int8)[None, None], len(every))[0].double()
        return (grid * scale[0])[..., None]
    table = safetensors.torch.load_file(Path(codebooks.__file__).with_name("codebooks.safetensors"))
    return table[f"vq{storage.bits}"].double() * scale[0, :, :, None]


def code_by_code(weight: torch.Tensor, moment: torch.Tensor, storage: FewBits) -> torch.Tensor:
    """Optimal brain quantization in the order of the inputs: of all that the next ones may be, take what costs least
    when the rest makes up for it, move the rest, take them out of the inverse.
    """
    whole = storage.whole(weight[None])
    rest, step = weight.double() * (1.0 if whole is None else float(whole)), storage.step
    damped = moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(len(moment)).double()
    inverse, found, size = torch.linalg.inv(damped), torch.zeros_like(rest), storage.size(len(moment))
    for i in range(0, len(moment), step):
        if i % size == 0:
            group = slice(i, min(i + size, len(moment)))
            scale, zero = storage.fit(rest[None, :, group].float(), moment.diagonal()[group], torch.float32)
        here = slice(i, i + step)
        own = torch.linalg.inv(inverse[here, here])
        for output, choices in enumerate(listed(storage, scale, zero)):
            error = rest[output, here] - choices
            found[output, here] = choices[((error @ own) * error).sum(1).argmin()]
        error = rest[:, here] - found[:, here]
        rest -= error @ own @ inverse[here]
        inverse = inverse - inverse[:, here] @ own @ inverse[here]
        inverse[here] = inverse[:, here] = 0
    return found / (1.0 if whole is None else float(whole))


def moments(count: int, width: int) -> torch.Tensor:
    x = torch.randn(count, 4 * width, width) @ torch.randn(width, width)
    return x.transpose(1, 2) @ x


STORAGES = [f"{sign}int{bits}g8" for sign in ("", "u") for bits in (2, 3, 4, 8)] + [
    f"vq{bits}g8" for bits in range(1, 5)
]
STORAGES += ["fp8", "fp8b128", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("name", STORAGES)
def test_it_is_optimal_brain_quantization(name: str) -> None:
    storage = find_storage(name)
    assert isinstance(storage, FewBits)
    weight, moment = torch.randn(3, 5, 24), moments(3, 24)
    codes = gptq(weight, Seen.of(moment), storage, torch.float32)
    for n in range(3):
        expected = code_by_code(weight[n], moment[n], storage)
        torch.testing.assert_close(storage.numbers(codes, 24)[n], expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("storage", [Integers(bits=8, group=128, symmetric=False), Codebook(bits=2, group=128)])
def test_a_group_of_several_blocks_is_no_other(storage: FewBits) -> None:
    width = 2 * BLOCK + 8
    weight, moment = torch.randn(2, 4, width), moments(2, width)
    codes = gptq(weight, Seen.of(moment), storage, torch.float32)
    for n in range(2):
        expected = code_by_code(weight[n], moment[n], storage)
        torch.testing.assert_close(storage.numbers(codes, width)[n], expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_last_code_of_fewer_inputs_is_as_one_with_inputs_that_are_zero(bits: int) -> None:
    """What is added says nothing of any other input, and nothing may be seen of it."""
    storage = Codebook(bits=bits, group=16)
    weight, moment = torch.randn(2, 5, 21), moments(2, 21)
    longer, wider = torch.zeros(2, 5, 24), torch.zeros(2, 24, 24)
    longer[..., :21], wider[:, :21, :21] = weight, moment
    # The mean of the diagonal, by which moments are damped, must be the same.
    seen, more = Seen.of(moment), torch.eye(24).expand(2, -1, -1).clone()
    more[:, :21, :21] = seen.upper
    expected = gptq(longer, Seen(importance=wider.diagonal(dim1=1, dim2=2), upper=more), storage, torch.float32)
    found = gptq(weight, seen, storage, torch.float32)
    assert found.code.shape == (2, 5, storage.codes(21))
    torch.testing.assert_close(storage.numbers(found, 21), storage.numbers(expected, 24)[..., :21])


@pytest.mark.parametrize("name", ["uint2g16", "uint3g16", "uint4g16", "vq1g16", "vq2g16", "vq4g16", "mxfp4", "nvfp4"])
def test_outputs_err_less_than_with_the_nearest_codes(name: str) -> None:
    storage = find_storage(name)
    assert isinstance(storage, FewBits)
    weight, moment = torch.randn(4, 12, 48), moments(4, 48)

    def error(codes: Codes) -> float:
        apart = storage.numbers(codes, 48) - weight
        return float((apart @ moment * apart).sum())

    nearest = storage.nearest(weight, torch.float32)
    assert error(gptq(weight, Seen.of(moment), storage, torch.float32)) < 0.7 * error(nearest)


@pytest.mark.parametrize("storage", [Integers(bits=4, group=16, symmetric=False), Codebook(bits=4, group=16)])
def test_moments_that_say_nothing_of_some_directions_do_no_harm(storage: FewBits) -> None:
    weight = torch.randn(2, 6, 32)
    x = torch.randn(2, 3, 32)  # fewer tokens than inputs
    for moment in (x.transpose(1, 2) @ x, torch.zeros(2, 32, 32)):
        found = storage.numbers(gptq(weight, Seen.of(moment), storage, torch.float32), 32)
        assert float((found - weight).abs().max()) < float(weight.abs().max())


def test_the_down_projection_gives_for_rounded_states_what_it_gave_for_exact_ones() -> None:
    """With 8 bits of its own it errs as little as ridge regression does, which is solved here token by token."""
    module = random_experts(2)
    layer = layer_of_tokens(module)
    storages = Width(bits=2, down=8, group=4).storages(layer.shape)
    (found,) = quantized(layer, [{0: 1.0}], lambda _: layer.experts.matrices([0]), storages, dtype=torch.float32)
    numbers = {name: storages[name].numbers(codes, layer.shape.matrices[name][1])[0] for name, codes in found.items()}
    exact = layer.experts.expert(0)
    token, gate = layer.routed(0)
    x, weight = layer.sample.hidden[token], gate.square()[:, None]
    inner = layer.experts.hidden(exact, x)
    instead = layer.experts.hidden(exact | {name: numbers[name] for name in layer.experts.inputs}, x)
    ridge = RIDGE * float((weight * instead.square()).sum(0).mean()) * torch.eye(instead.shape[1])
    own = (weight * instead).T @ instead + ridge
    cross = (weight * inner).T @ instead + ridge
    best = exact["down"] @ cross @ torch.linalg.inv(own)
    y = inner @ exact["down"].T

    def error(down: torch.Tensor) -> float:
        return float((weight * (instead @ down.T - y).square()).sum())

    assert error(numbers["down"]) < 1.05 * error(best)
    assert error(numbers["down"]) < 0.8 * error(exact["down"])


def test_an_expert_without_tokens_is_rounded_for_those_of_the_layer() -> None:
    module = random_experts(3)
    layer = layer_of_tokens(module)
    unused = next((e for e in range(3) if not len(layer.routed(e)[0])), None)
    storages = Width(bits=3, group=8).storages(layer.shape)
    (found,) = quantized(
        layer, [{unused or 0: 1.0}], lambda _: layer.experts.matrices([unused or 0]), storages, dtype=torch.float32
    )
    assert all(torch.isfinite(codes.scale).all() for codes in found.values())


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_gate_and_up_share_the_scale_of_the_matrix_and_no_block(rounding: Rounding) -> None:
    """Engines run them as one matrix, in which each block of 128 x 128 is of one of them."""
    module = random_experts(2)
    with torch.no_grad():
        module.gate_up_proj[:, : module.gate_up_proj.shape[1] // 2] *= 100
    layer = layer_of_tokens(module)

    def found(codes: Kind, bits: int) -> dict[str, Codes]:
        storages = Width(bits=bits, codes=codes).storages(layer.shape)
        read = layer.experts.matrices
        (found,) = quantized(layer, [{0: 1.0}, {1: 1.0}], read, storages, dtype=torch.float32, rounding=rounding)
        return found

    nvfp4, blocks, matrices = found("nvfp4", 4), found("fp8b128", 8), layer.experts.matrices([0, 1])
    assert torch.equal(nvfp4["gate"].whole, nvfp4["up"].whole)
    largest = matrices["gate"].abs().amax((1, 2))
    assert bool((nvfp4["gate"].whole[:, 0, 0] * largest / 6 <= 448 / 2).all())
    assert bool((nvfp4["gate"].whole[:, 0, 0] * largest / 6 > 448 / 4).all())
    for name in ("gate", "up"):
        assert blocks[name].code.shape == matrices[name].shape
        scale = (matrices[name].abs().amax((1, 2)) / 448)[:, None, None].expand_as(blocks[name].scale)
        torch.testing.assert_close(blocks[name].scale, scale)
