"""MergeMoE: what is lossless, what is never worse, and the cliff that a ridge takes away."""

import itertools

import pytest
import torch

import moetailor
from moetailor.answers.merged import clusters
from moetailor.fitting.averages import averages
from moetailor.methods.mergemoe import MergeMoE
from moetailor.planning.layer_plan import merge_into
from moetailor.planning.view import LayerView
from support.hand import TinyExperts
from support.layers import INNER, WIDTH, layer_with, layer_with_biases, random_experts, routed_layer, with_copy

PAPER = {"fit": "pinv", "target": "mean", "features": "average"}
BEST = {"fit": "ridge", "target": "gated", "features": "best"}


def related(count: int, spread: float, seed: int = 0) -> TinyExperts:
    """Return experts that are one expert plus noise."""
    base, noise = random_experts(1, seed), random_experts(count, seed + 1)
    parts = [base.gate_up_proj + spread * noise.gate_up_proj, base.down_proj + spread * noise.down_proj]
    return TinyExperts(*parts[0].detach().chunk(2, 1), parts[1].detach())


def loss(layer: LayerView, expert: dict[str, torch.Tensor], members: list[int]) -> float:
    """Return sum_t |sum_j g_tj E_j(x_t) - sum_j g_tj E'(x_t)|^2 token by token."""
    total, one = 0.0, {name: stack[0] for name, stack in expert.items()}
    for token in range(len(layer.sample.hidden)):
        x, target, gate = layer.sample.hidden[token : token + 1], torch.zeros(1, WIDTH), 0.0
        for expert_number, g in zip(layer.sample.index[token].tolist(), layer.sample.gate[token].tolist(), strict=True):
            if expert_number in members:
                target, gate = target + g * layer.experts.outputs(expert_number, x), gate + g
        given = gate * (layer.experts.hidden(one, x) @ one["down"].T)
        total += float((target - given).square().sum())
    return total


@pytest.mark.parametrize("options", [PAPER, PAPER | {"fit": "ridge"}, BEST], ids=["paper", "ridge", "best"])
def test_copies_merge_without_loss(options: dict) -> None:
    layer = layer_with(with_copy(random_experts(3)), [4, 3, 2, 1], tokens=200)
    built = MergeMoE(**options).build(layer, merge_into([0, 1, 2, 0]))
    x = layer.sample.hidden
    one = {name: stack[0] for name, stack in built.items()}
    torch.testing.assert_close(
        layer.experts.hidden(one, x) @ one["down"].T, layer.experts.outputs(0, x), rtol=1e-3, atol=1e-3
    )


def test_the_papers_clusters() -> None:
    module = random_experts(4)
    with torch.no_grad():  # expert 3 points where 1 does, expert 2 where 0 does
        module.gate_up_proj[3] = 2 * module.gate_up_proj[1]
        module.gate_up_proj[2] = 0.5 * module.gate_up_proj[0]
    assert clusters(MergeMoE().plan(layer_with(module, [9, 8, 2, 1]), 2).slots) == {0: [0, 2], 1: [1, 3]}


def test_clusters_by_outputs_ignore_the_order_of_neurons() -> None:
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        layer = layer_with(with_copy(random_experts(3), order=order), [4, 3, 2, 1], tokens=200)
        layer.sums.gate_sq_norm_sq.fill_(1.0)
        assert set(map(tuple, clusters(MergeMoE(cluster="outputs").plan(layer, 3).slots).values())) == {(0, 3)}


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_average_or_centre_on_fresh_tokens(spread: float, seed: int) -> None:
    module = related(4, spread, seed)
    plan = merge_into([0, 0, 0, 3])
    built = MergeMoE(**BEST).build(routed_layer(module, 2000, seed), plan)
    fresh = routed_layer(module, 500, seed + 100)
    mine = loss(fresh, built, [0, 1, 2])
    average = loss(fresh, averages(fresh, plan, fresh.sums.count), [0, 1, 2])
    centre = loss(fresh, fresh.experts.matrices([0]), [0, 1, 2])
    assert mine <= 1.03 * min(average, centre)


@pytest.mark.filterwarnings("ignore::moetailor.MoetailorWarning")
def test_the_cliff_is_gone() -> None:
    """At about as many tokens as neurons the pseudo-inverse explodes; the ridge falls with every token more."""
    module, plan = related(3, 0.7), merge_into([0, 0, 0])
    fresh = routed_layer(module, 200, 99)
    sizes = (2, 3, INNER, 7, 12, 40, 200, 2000)
    errors = {}
    for name, options in (("pinv", PAPER | {"target": "gated"}), ("ridge", PAPER | BEST | {"features": "average"})):
        for size in sizes:
            layers = [routed_layer(module, size, seed) for seed in range(8)]
            errors[name, size] = (
                sum(loss(fresh, MergeMoE(**options).build(layer, plan), [0, 1, 2]) for layer in layers) / 8
            )
    average = loss(fresh, averages(fresh, plan, fresh.sums.count), [0, 1, 2])
    assert errors["pinv", INNER] > 3 * errors["pinv", 2000]
    ridge = [errors["ridge", size] for size in sizes]
    assert all(later <= 1.1 * earlier for earlier, later in itertools.pairwise(ridge))
    assert max(ridge) <= 1.5 * average


def test_too_few_tokens_are_named() -> None:
    layer = layer_with(random_experts(3), [3, 2, 1], tokens=3)
    with pytest.warns(moetailor.MoetailorWarning, match=r"layer 0: 1 of 1 merged experts .* \(3 at least\) .* \(5\)"):
        MergeMoE(**PAPER).build(layer, merge_into([0, 0, 2]))


def test_a_cluster_that_no_token_reached_is_the_average() -> None:
    layer = layer_with(random_experts(4), [0, 0, 3, 2])
    layer.sample.index[:] = 2
    plan = merge_into([0, 0, 2, 3])
    for options in (BEST, BEST | {"features": "average"}, PAPER | {"target": "gated"}):
        with pytest.warns(moetailor.MoetailorWarning):
            built = MergeMoE(**options).build(layer, plan)
        assert all(torch.isfinite(matrix).all() for matrix in built.values())


@pytest.mark.parametrize("options", [PAPER, BEST], ids=["paper", "best"])
def test_biases_are_fitted_with(options: dict) -> None:
    """Copies still merge without loss."""
    view, module = layer_with_biases()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[3] = parameter[0]
    built = MergeMoE(**options).build(view, merge_into([0, 1, 2, 0, *range(4, view.num_experts)]))
    assert set(built) == {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"}
    x, one = view.sample.hidden, {name: stack[0] for name, stack in built.items()}
    given = view.experts.hidden(one, x) @ one["down"].T + one["down_bias"]
    torch.testing.assert_close(given, view.experts.outputs(0, x), rtol=1e-3, atol=1e-3)
