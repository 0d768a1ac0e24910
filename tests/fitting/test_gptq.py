"""fitting/gptq.py and widths.py: one matrix at a time, input by input, with the inverse updated by its formula."""

import pytest
import torch

from moetailor.answers import Width
from moetailor.checkpoint.storage import Integers
from moetailor.checkpoint.storage.integers import Codes
from moetailor.fitting.gptq import BLOCK, DAMPING, Seen, gptq
from moetailor.fitting.widths import RIDGE, quantized
from support.layers import layer_of_tokens, random_experts


def input_by_input(weight: torch.Tensor, moment: torch.Tensor, storage: Integers) -> torch.Tensor:
    """Optimal brain quantization in the order of the inputs: round one, move the rest, take it out of the inverse."""
    rest = weight.double().clone()
    damped = moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(len(moment)).double()
    inverse, found, size = torch.linalg.inv(damped), torch.zeros_like(rest), storage.size(len(moment))
    for i in range(len(moment)):
        if i % size == 0:
            group = slice(i, min(i + size, len(moment)))
            scale, zero = storage.fit(rest[None, :, group].float(), moment.diagonal()[group], torch.float32)
        code = storage.round(rest[None, :, i : i + 1].float(), scale, zero)
        found[:, i] = storage.numbers(Codes(code=code, scale=scale, zero=zero))[0, :, 0]
        error = (rest[:, i] - found[:, i]) / inverse[i, i]
        rest -= error[:, None] * inverse[i][None]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i] = inverse[:, i] = 0
    return found


def moments(count: int, width: int) -> torch.Tensor:
    x = torch.randn(count, 4 * width, width) @ torch.randn(width, width)
    return x.transpose(1, 2) @ x


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_optimal_brain_quantization(bits: int, symmetric: bool) -> None:
    storage = Integers(bits=bits, group=8, symmetric=symmetric)
    weight, moment = torch.randn(3, 5, 22), moments(3, 22)
    codes = gptq(weight, Seen.of(moment), storage, torch.float32)
    for n in range(3):
        expected = input_by_input(weight[n], moment[n], storage)
        torch.testing.assert_close(storage.numbers(codes)[n], expected.float(), rtol=1e-3, atol=1e-3)


def test_a_group_of_several_blocks_is_no_other() -> None:
    storage, width = Integers(bits=8, group=128, symmetric=False), 2 * BLOCK + 7
    weight, moment = torch.randn(2, 4, width), moments(2, width)
    codes = gptq(weight, Seen.of(moment), storage, torch.float32)
    for n in range(2):
        expected = input_by_input(weight[n], moment[n], storage)
        torch.testing.assert_close(storage.numbers(codes)[n], expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_err_less_than_with_the_nearest_codes(bits: int) -> None:
    storage = Integers(bits=bits, group=16, symmetric=False)
    weight, moment = torch.randn(4, 12, 48), moments(4, 48)

    def error(found: torch.Tensor) -> float:
        apart = found - weight
        return float((apart @ moment * apart).sum())

    scale, zero = storage.fit(weight, torch.ones(48), torch.float32)
    nearest = storage.numbers(Codes(code=storage.round(weight, scale, zero), scale=scale, zero=zero))
    assert error(storage.numbers(gptq(weight, Seen.of(moment), storage, torch.float32))) < 0.7 * error(nearest)


def test_moments_that_say_nothing_of_some_directions_do_no_harm() -> None:
    storage, weight = Integers(bits=4, group=16, symmetric=False), torch.randn(2, 6, 32)
    x = torch.randn(2, 3, 32)  # fewer tokens than inputs
    for moment in (x.transpose(1, 2) @ x, torch.zeros(2, 32, 32)):
        found = storage.numbers(gptq(weight, Seen.of(moment), storage, torch.float32))
        assert float((found - weight).abs().max()) < float(weight.abs().max())


def test_the_down_projection_gives_for_rounded_states_what_it_gave_for_exact_ones() -> None:
    """With 8 bits of its own it errs as little as ridge regression does, which is solved here token by token."""
    module = random_experts(2)
    layer = layer_of_tokens(module)
    storages = Width(bits=2, down=8, group=4).storages(layer.shape)
    found = quantized(layer, [{0: 1.0}], layer.experts.matrices([0]), storages, dtype=torch.float32)
    numbers = {name: storages[name].numbers(codes)[0] for name, codes in found.items()}
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
    found = quantized(layer, [{unused or 0: 1.0}], layer.experts.matrices([unused or 0]), storages, dtype=torch.float32)
    assert all(torch.isfinite(codes.scale).all() for codes in found.values())
