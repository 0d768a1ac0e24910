"""Tokens that say what an expert does: its own, and others where these are few."""

import pytest
import torch

from moetailor.answers import Width
from moetailor.fitting import widths
from moetailor.fitting.tokens import ENOUGH, TIMES, tokens_of
from moetailor.planning.view import LayerView
from support.layers import WIDTH, random_experts, routed_layer


def layer_with(tokens: int) -> LayerView:
    return routed_layer(random_experts(6), tokens, seed=5)


def test_an_expert_with_enough_tokens_has_its_own_alone() -> None:
    layer = layer_with(600)
    token, gate = layer.routed(2)
    assert len(token) > ENOUGH * WIDTH
    found = tokens_of(layer, {2: 3.0})
    assert (found.place.tolist(), found.own) == (token.tolist(), len(token))
    torch.testing.assert_close(found.weight, 9 * gate.double().square())


def test_others_join_where_tokens_lack() -> None:
    """Twice as many as it lacks, spread over those that went elsewhere, with a share of the layer's squared gate."""
    layer = layer_with(20)
    token, gate = layer.routed(2)
    lacks = ENOUGH * WIDTH - len(token)
    assert lacks > 0
    found = tokens_of(layer, {2: 1.0}, share=0.25)
    elsewhere = [at for at in range(20) if at not in token.tolist()]
    count = min(TIMES * lacks, len(elsewhere))
    assert found.place.tolist() == token.tolist() + [elsewhere[i * len(elsewhere) // count] for i in range(count)]
    torch.testing.assert_close(found.weight[: found.own], gate.double().square())
    mean = sum(float(g) ** 2 for row in layer.sample.gate for g in row) / layer.sample.gate.numel()
    torch.testing.assert_close(found.weight[found.own :], torch.full((count,), mean / 4).double())


def test_what_is_held_out_is_left_out_of_its_own() -> None:
    layer = layer_with(20)
    whole = tokens_of(layer, {2: 1.0})
    held = torch.arange(whole.own) % 3 == 1
    rest = whole.but(held)
    assert rest.place.tolist() == [t for i, t in enumerate(whole.place.tolist()) if i >= whole.own or i % 3 != 1]
    assert rest.own == whole.own - int(held.sum())
    assert len(rest.weight) == len(rest.place)


def test_rounding_on_few_tokens_is_better_for_others_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on tokens that were not seen, by the error that the rounded expert adds there."""
    errors, width = [0.0, 0.0], Width(bits=3, group=8)
    many = routed_layer(random_experts(6), 900, seed=70)
    token, gate = many.routed(1)
    x, y = many.sample.hidden[token], many.outputs(1, token)
    for at, share in enumerate((0.0, widths.ROUNDED)):
        monkeypatch.setattr(widths, "ROUNDED", share)
        for seed in range(8):
            few = routed_layer(random_experts(6), 12, seed=seed)
            storages = width.storages(few.shape)
            (codes,) = widths.quantized(
                few, [{1: 1.0}], lambda _: many.experts.matrices([1]), storages, dtype=torch.float32
            )
            own = {name: storages[name].numbers(codes[name], few.shape.matrices[name][1])[0].float() for name in codes}
            given = torch.nn.functional.linear(many.experts.hidden(own, x), own["down"])
            errors[at] += float((gate[:, None] * (given - y)).square().sum())
    assert errors[1] < 0.9 * errors[0]
