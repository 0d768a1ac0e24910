"""ConMoE: its distance by the direct form, its map by hand, the functional distance by its algebra."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import moetailor
from moetailor.answers import Borrowed, Keep, Remap
from moetailor.calibration.statistics import Sample
from moetailor.checkpoint.experts import Experts
from moetailor.fitting.distances import functional_distances, weight_distances, weight_products
from moetailor.methods.conmoe import ConMoE
from moetailor.planning.view import LayerView
from support.hand import TinyExperts, layer_of, sums_of


def random_experts(count: int = 4, width: int = 6, inner: int = 5) -> TinyExperts:
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, inner, width), (count, inner, width), (count, width, inner)]
    return TinyExperts(*(torch.randn(shape, generator=generator) for shape in shapes))


def layer_with(module: nn.Module, contributions: list[float], tokens: int = 40) -> LayerView:
    """Return a layer whose experts have given mean gated norms, with a sample routed to all of them in turn."""
    count, width = len(contributions), module.down_proj.shape[1]
    pairs = [(expert, value, [1.0] + [0.0] * (width - 1)) for expert, value in enumerate(contributions)]
    generator = torch.Generator().manual_seed(1)
    sample = Sample(
        key=torch.arange(tokens),
        hidden=torch.randn(tokens, width, generator=generator),
        index=(torch.arange(tokens)[:, None] % count).int(),
        gate=torch.rand(tokens, 1, generator=generator),
        logits=torch.zeros(tokens, count),
    )
    return layer_of(sums_of(pairs, count, tokens), sample=sample, module=module)


@pytest.mark.parametrize("nbytes", [1, 1500, None])  # one expert, some and all at a time
def test_the_gram_form_is_the_direct_distance(nbytes: int | None) -> None:
    layer = layer_with(random_experts(), [1.0] * 4)
    layer.open_experts = lambda: nullcontext(Experts(random_experts(), nbytes))
    matrices = layer.experts.matrices()
    found = weight_distances(weight_products([layer]))
    for a in range(4):
        for b in range(4):
            direct = [
                2 * float((w[a] - w[b]).norm()) / (float(w[a].norm()) + float(w[b].norm())) for w in matrices.values()
            ]
            assert float(found[a, b]) == pytest.approx(sum(direct) / 3, abs=1e-5)


def test_the_map_by_hand() -> None:
    # Scalar experts 1, 1.1, 5, 6 in every matrix: 2|a-b|/(a+b) pairs 0 with 1 (.095) and 2 with 3 (.182).
    values = torch.tensor([1.0, 1.1, 5.0, 6.0])[:, None, None]
    layer = layer_with(TinyExperts(values, values, values), [3.0, 1.0, 1.0, 2.0])
    (plan,) = ConMoE().plan_layers([layer], [2])
    # a = 3 1 1 2 -> minmax 1 0 0 .5; b -> 0 0 1 1; the products are 0 0 0 .5: 3 stays, and of the tied the lowest, 0
    assert plan.slots == (Keep(), Remap(0), Remap(3), Keep())
    assert plan.kept_slots == [0, 1, 2, 3]


def test_permuting_neurons_moves_the_weight_distance_only() -> None:
    module = random_experts()
    order = torch.tensor([3, 1, 4, 0, 2])
    gate, up = module.gate_up_proj.detach().chunk(2, 1)
    shuffled = TinyExperts(
        torch.cat([gate, gate[:1, order]]),
        torch.cat([up, up[:1, order]]),
        torch.cat([module.down_proj.detach(), module.down_proj.detach()[:1, :, order]]),
    )
    layer = layer_with(shuffled, [1.0] * 5)
    assert float(weight_distances(weight_products([layer]))[0, 4]) > 0.5
    functional, _ = functional_distances([layer], 40, False)
    assert float(functional[0, 4]) == pytest.approx(0, abs=1e-9)


def test_the_scale_fits_a_scaled_copy_and_never_hurts() -> None:
    module = random_experts(3)
    copy = TinyExperts(
        *(torch.cat([part, part[:1]]) for part in module.gate_up_proj.detach().chunk(2, 1)),
        torch.cat([module.down_proj.detach(), 2 * module.down_proj.detach()[:1]]),
    )
    layer = layer_with(copy, [1.0] * 4)
    scaled, scales = functional_distances([layer], 40, True)
    plain, ones = functional_distances([layer], 40, False)
    # expert 3 is twice expert 0: 3 answers 0 with half its output, without loss
    assert float(scales[0, 3]) == pytest.approx(0.5, rel=1e-4)
    assert float(scaled[0, 3]) == pytest.approx(0, abs=1e-6)
    assert float(scales[3, 0]) == pytest.approx(1.5)  # 2, clipped
    assert (ones == 1).all()
    # the fit interpolates remapping (c = 1) and deletion (c = 0, which loses 1)
    off = ~torch.eye(4, dtype=torch.bool)
    assert (scaled[off] <= torch.minimum(plain, torch.ones_like(plain))[off] + 1e-9).all()


def test_an_unreached_expert_maps_somewhere_and_is_finite() -> None:
    layer = layer_with(random_experts(), [1.0, 2.0, 3.0, 0.0])
    layer.sums.count[3] = layer.sums.gated_norm[3] = 0
    for options in ({}, {"distance": "functional", "scale": True}):
        (plan,) = ConMoE(**options).plan_layers([layer], [2])
        assert plan.slots[3].expert(3) in plan.pool
        assert all(0 <= slot.scale <= 1.5 for slot in plan.slots)


def test_equal_scores_divide_by_nothing() -> None:
    values = torch.ones(3, 1, 1)
    (plan,) = ConMoE().plan_layers([layer_with(TinyExperts(values, values, values), [1.0, 1.0, 1.0])], [1])
    assert plan.pool == [0]


def test_unknown_distance_is_refused() -> None:
    with pytest.raises(moetailor.PlanError, match="distance=cosine"):
        list(ConMoE(distance="cosine").plan_layers([layer_with(random_experts(), [1.0] * 4)], [2]))


def test_a_scope_shares_its_prototypes_across_layers() -> None:
    # Layer 0 has scalar experts 1 and 5, layer 1 has 1.1 and 6; they pair up across the layers.
    def layer(index: int, values: list[float], contributions: list[float]) -> LayerView:
        weights = torch.tensor(values)[:, None, None]
        view = layer_with(TinyExperts(weights, weights, weights), contributions)
        view.index = index
        return view

    first, second = layer(3, [1.0, 5.0], [4.0, 1.0]), layer(7, [1.1, 6.0], [1.0, 2.0])
    plans = list(ConMoE(scope=2).plan_layers([first, second], [1, 1]))
    # a = 4 1 1 2 -> 1 0 0 .33; b: .095 .182 .095 .182 -> 0 1 0 1; products 0 0 0 .33; the best of layer 3 is its first
    assert plans[0].slots == (Keep(), Borrowed(7, 1))
    assert plans[1].slots == (Borrowed(3, 0), Keep())


def test_a_scope_of_one_is_the_layer_alone() -> None:
    layers = [layer_with(random_experts(), [1.0, 2.0, 3.0, 4.0]) for _ in range(2)]
    alone = [plan for layer in layers for plan in ConMoE().plan_layers([layer], [2])]
    assert list(ConMoE(scope=1).plan_layers(layers, [2, 2])) == alone


def test_layers_of_other_shapes_cannot_share() -> None:
    layers = [layer_with(random_experts(4, 6, 5), [1.0] * 4), layer_with(random_experts(4, 6, 7), [1.0] * 4)]
    for distance in ("weights", "functional"):
        with pytest.raises(moetailor.PlanError, match="only layers of one shape can share"):
            list(ConMoE(scope=2, distance=distance).plan_layers(layers, [2, 2]))
