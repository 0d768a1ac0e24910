"""Merging: averages by hand, what permutations may and may not change, and who joins whom."""

import pytest
import torch

import moetailor
from moetailor.answers import Context, Drop, Keep, Merged, Remap
from moetailor.answers.merged import clusters
from moetailor.fitting.align import permuted
from moetailor.methods import ream
from moetailor.methods.hc_smoe import HCSMoE
from moetailor.methods.m_smoe import MSMoE
from moetailor.methods.method import Method
from moetailor.methods.ream import Ream
from moetailor.methods.sub_moe import SubMoE
from moetailor.planning.layer_plan import LayerPlan, merge_into
from support.hand import layer_of, sums_of
from support.layers import INNER, layer_with, random_experts, with_copy


def test_the_average_is_weighted_by_use() -> None:
    module = random_experts(3)
    layer = layer_with(module, [1, 3, 2])
    plan = merge_into([1, 1, 2])
    built = HCSMoE().build(layer, plan)
    every = layer.experts.matrices()
    for name in ("gate", "up", "down"):
        torch.testing.assert_close(built[name], (0.25 * every[name][0] + 0.75 * every[name][1])[None])


def test_experts_that_nobody_used_weigh_the_same() -> None:
    layer = layer_with(random_experts(3), [0, 0, 2])
    built = HCSMoE().build(layer, merge_into([0, 0, 2]))
    torch.testing.assert_close(built["down"][0], layer.experts.matrices()["down"][:2].mean(0))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 1, 4, 0, 2]])
@pytest.mark.parametrize("method", [MSMoE(align=True), Ream(tokens=60)], ids=["m_smoe", "ream"])
def test_matched_copies_merge_without_loss(method: Method, order: list[int]) -> None:
    module = with_copy(random_experts(3), order=order)
    layer = layer_with(module, [4, 3, 2, 1])
    built = method.build(layer, merge_into([0, 1, 2, 0]))
    for name in ("gate", "up", "down"):
        torch.testing.assert_close(built[name][0], layer.experts.expert(0)[name])


def test_unmatched_copies_in_another_order_do_not() -> None:
    module = with_copy(random_experts(3), order=[3, 1, 4, 0, 2])
    built = MSMoE(align=False).build(layer_with(module, [4, 3, 2, 1]), merge_into([0, 1, 2, 0]))
    assert not torch.allclose(built["down"][0], module.down_proj[0], atol=0.1)


@pytest.mark.parametrize("method", ["hc_smoe", "sub_moe"])
def test_copies_are_found_whatever_the_order_of_their_neurons(method: str) -> None:
    found = moetailor.METHODS[method]
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        layer = layer_with(with_copy(random_experts(3), order=order), [4, 3, 2, 1])
        plan = found().plan(layer, 3)
        assert clusters(plan.slots) == {0: [0, 3]}
        assert plan.slots[1] == Keep()


def test_m_smoe_joins_by_the_routers_logits() -> None:
    layer = layer_with(random_experts(4), [5, 4, 2, 1])
    layer.sample.logits[:, 2] = 3 * layer.sample.logits[:, 1]
    layer.sample.logits[:, 3] = layer.sample.logits[:, 0] + 0.01
    plan = MSMoE().plan(layer, 2)
    assert clusters(plan.slots) == {0: [0, 3], 1: [1, 2]}


def test_a_global_budget_gives_layers_what_they_use() -> None:
    layers = [layer_with(random_experts(4), [9, 8, 7, 6]), layer_with(random_experts(4), [97, 1, 1, 1])]
    plans = list(MSMoE(budget="global").plan_layers(layers, [2, 2]))
    # shares of use: .3 .27 .23 .2 and .97 .01 .01 .01; the best of each layer stays, then the most used
    assert [len(plan.pool) for plan in plans] == [3, 1]


def test_ream_packs_what_goes_into_the_most_salient_centroid() -> None:
    layer = layer_with(random_experts(5), [1, 1, 1, 1, 1])
    layer.sums.gate_sq_norm.copy_(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    plan = Ream(tokens=60).plan(layer, 3)
    assert clusters(plan.slots) == {0: [0, 3, 4]}
    assert plan.slots[3] == Drop(0)
    assert plan.native
    assert plan.kept_slots == [0, 1, 2]
    # a group of two has room for one more; the next goes to the next centroid
    assert sorted(map(len, clusters(Ream(tokens=60, group=2).plan(layer, 3).slots).values())) == [2, 2]


@pytest.mark.parametrize(
    ("saliency", "scores", "share"),
    [("gate_squared", (0.25, 0.2, 0.064), 0.064 / 0.314), ("gate", (0.5, 1.0, 0.16), 0.16 / 1.16)],
)
def test_ream_ranks_and_weighs_by_one_saliency(
    saliency: str, scores: tuple[float, ...], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate squared: .5^2 x 1 = .25, (.2^2 x 5 + .2^2 x 5) / 2 = .2, .4^2 x .4 = .064. Gate: .5, 1, .16."""
    pairs = [(0, 0.5, [1.0, 0.0]), (1, 0.2, [3.0, 4.0]), (1, 0.2, [-4.0, 3.0]), (2, 0.4, [0.0, 0.4])]
    module = random_experts(3)
    sample = layer_with(module, [1, 1, 1]).sample
    layer = layer_of(sums_of(pairs, 3, 4), sample=sample, module=module)
    method = Ream.of({"saliency": saliency, "tokens": 60})
    plan = method.plan(layer, 2)
    assert plan.scores == pytest.approx(scores)
    ((centre, members),) = clusters(plan.slots).items()
    # the more salient of the two that stay takes the third
    assert (centre, members) == ((0, [0, 2]) if saliency == "gate_squared" else (1, [1, 2]))
    monkeypatch.setattr(ream, "match", lambda cost: torch.arange(INNER))
    built = method.build(layer, plan)
    every = layer.experts.matrices()
    for name in ("gate", "up", "down"):
        torch.testing.assert_close(built[name][0], (1 - share) * every[name][centre] + share * every[name][2])


def test_a_protected_centre_answers_unmerged() -> None:
    layer = layer_with(random_experts(4), [5, 4, 2, 1], protected=frozenset({3}))
    plan = MSMoE().plan(layer, 1)
    assert plan.pool == [3]
    assert not plan.rebuilt
    assert plan.slots == (Remap(3), Remap(3), Remap(3), Keep())


def test_the_joint_svd_with_all_vectors_is_the_average() -> None:
    """U S sum_i p_i V_i of the matrices side by side, by torch's SVD."""
    layer = layer_with(random_experts(3), [1, 3, 2])
    built = SubMoE(subspace=1.0).build(layer, merge_into([1, 1, 1]))
    halved = SubMoE(subspace=0.4).build(layer, merge_into([1, 1, 1]))
    share = torch.tensor([1.0, 3.0, 2.0]) / 6
    for name, matrices in layer.experts.matrices().items():
        u, s, v = torch.linalg.svd(torch.cat(list(matrices), 1), full_matrices=False)
        parts = v.split(matrices.shape[2], 1)
        merged = u * s @ sum(p * part for p, part in zip(share, parts, strict=True))
        torch.testing.assert_close(built[name][0], merged, rtol=1e-4, atol=1e-5)
        rank = round(0.4 * matrices.shape[1])
        cut = u[:, :rank] * s[:rank] @ sum(p * part[:rank] for p, part in zip(share, parts, strict=True))
        torch.testing.assert_close(halved[name][0], cut, rtol=1e-4, atol=1e-5)


def test_a_plan_of_merges_reads_back_and_refuses_what_cannot_be() -> None:
    plan = merge_into([0, 0, 2, 2, 4])
    assert plan.to_json()["merged"] == [{"into": 0, "slots": [0, 1]}, {"into": 2, "slots": [2, 3]}]
    assert LayerPlan.from_json(plan.to_json(), "here") == plan
    dropped = merge_into([0, 0, 2, 2, 4], drop=True)
    assert LayerPlan.from_json(dropped.to_json(), "here") == dropped
    for slots, said in (
        ((Keep(), Merged(0)), "slot 1 is merged into 0, whose own slot is not"),
        ((Keep(), Drop(0)), "slot 1 is merged into 0, whose own slot is not"),
        ((Merged(0), Merged(0), Remap(0)), "slot 2 asks for expert 0 unchanged, which is merged"),
    ):
        context = Context(where="here", slots=slots, top_k=1)
        with pytest.raises(moetailor.PlanError, match=said):
            [answer.check(slot, context) for slot, answer in enumerate(slots)]


def test_permuting_is_no_change_of_function() -> None:
    layer = layer_with(random_experts(2), [1, 1])
    matrices = layer.experts.expert(0)
    other = permuted(matrices, torch.tensor([3, 1, 4, 0, 2]))
    x = layer.sample.hidden
    outputs = [layer.experts.hidden(expert, x) @ expert["down"].T for expert in (matrices, other)]
    torch.testing.assert_close(outputs[0], outputs[1])
