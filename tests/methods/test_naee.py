"""NAEE against the model itself with experts masked in its router, and against a loop over all subsets."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.calibration.statistics import Sample
from moetailor.checkpoint.family import Groups
from moetailor.methods.naee import Naee
from moetailor.methods.routing import own_gates, routing_of
from moetailor.methods.subsets import _all, _drawn, _exchanged, subset_errors
from support.hand import layer_of, sums_of
from support.naive import masked_outputs
from support.tiny import view

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def subset(experts: int, kept: set[int]) -> torch.Tensor:
    return torch.tensor([[expert in kept for expert in range(experts)]])


# softmax without and with normalised gates, top-k before softmax, groups with a factor, shared experts, a correction
# bias on sigmoids with groups and on a softmax
@pytest.mark.parametrize(
    "family",
    ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v2", "qwen2_moe", "mixtral", "deepseek_v3", "ernie4_5_moe"],
)
def test_gates_and_error_of_a_subset_are_those_of_the_masked_router(
    family: str, checkpoint: Get, calibration: GetCalibration
) -> None:
    layer = view(calibration(family))
    # one of each group
    dropped = list(range(1, layer.num_experts, layer.num_experts // layer.groups))
    kept = subset(layer.num_experts, set(range(layer.num_experts)) - set(dropped))
    whole, _ = masked_outputs(checkpoint(family), [])
    outputs, gates = masked_outputs(checkpoint(family), dropped)
    rule, known = routing_of(layer.sample, layer.limits, layer.correction, "here")
    assert bool(known.all())
    found = rule.gates(kept)[0]
    # the sample lies in the order of its keys: compare as sets of rows
    order, other = (
        torch.argsort(rows.double() @ torch.arange(1.0, rows.shape[1] + 1).double()) for rows in (found, gates)
    )
    torch.testing.assert_close(found[order], gates[other], rtol=1e-4, atol=1e-5)
    error = float(subset_errors(layer, 10_000, "here")(kept))
    assert error == pytest.approx(float((whole - outputs).double().square().sum()), rel=1e-3)


def test_the_whole_set_loses_nothing(calibration: GetCalibration) -> None:
    layer = view(calibration("qwen3_moe"))
    errors = subset_errors(layer, 10_000, "here")
    everything = torch.ones(1, layer.num_experts, dtype=torch.bool)
    assert float(errors(everything)) < 1e-6 * float(errors(subset(layer.num_experts, {0, 1, 2})))


def test_the_best_of_all_subsets_stays(calibration: GetCalibration) -> None:
    layer = view(calibration("olmoe"))
    errors = subset_errors(layer, 512, "here")
    subsets = list(itertools.combinations(range(8), 5))
    best = min(subsets, key=lambda kept: float(errors(subset(8, set(kept)))))
    assert Naee().plan(layer, 5).pool == list(best)
    # A descent by exchanges from one random subset ends no better, and where it ends no exchange helps.
    drawn = Naee(exhaustive=0, samples=1, swaps=20).plan(layer, 5)
    least = float(errors(subset(8, set(drawn.pool))))
    assert least >= float(errors(subset(8, set(best)))) * (1 - 1e-9)
    near = [set(drawn.pool) - {out} | {into} for out in drawn.pool for into in set(range(8)) - set(drawn.pool)]
    assert all(float(errors(subset(8, other))) >= least * (1 - 1e-9) for other in near)


def test_subsets_respect_groups_and_protection() -> None:
    layer = layer_of(sums_of([(e, 1.0, [1.0]) for e in range(6)], 6, 6), groups=2, protected=frozenset({1}))
    every = {tuple(row.nonzero().flatten().tolist()) for row in _all(layer, 2)}
    # of (0, 1, 2) two with 1, of (3, 4, 5) any two
    assert every == {(*a, *b) for a in ((0, 1), (1, 2)) for b in ((3, 4), (3, 5), (4, 5))}
    drawn = {tuple(row.nonzero().flatten().tolist()) for row in _drawn(layer, 2, 200, 0)}
    assert drawn == every
    near = {tuple(row.nonzero().flatten().tolist()) for row in _exchanged(layer, subset(6, {0, 1, 3, 4})[0])}
    assert near == {(0, 1, 3, 4), (1, 2, 3, 4), (0, 1, 4, 5), (0, 1, 3, 5)}


def sample(logits: list[list[float]], index: list[list[int]], gate: list[list[float]]) -> Sample:
    return Sample(
        key=torch.arange(len(index)),
        hidden=torch.zeros(len(index), 1),
        index=torch.tensor(index, dtype=torch.int32),
        gate=torch.tensor(gate),
        logits=torch.tensor(logits),
    )


def test_a_rule_worked_by_hand() -> None:
    # sigmoids 1/2, 2/3, 3/4 of the logits 0, ln 2, ln 3; the two largest, normalised, times 2.5
    ln2, ln3 = 0.6931472, 1.0986123
    share = torch.tensor([2 / 3, 3 / 4]) / (2 / 3 + 3 / 4) * 2.5
    rule, known = routing_of(sample([[0.0, ln2, ln3]], [[2, 1]], [share.flip(0).tolist()]), Groups(), None, "here")
    assert (rule.sigmoid, rule.normalised, known.tolist()) == (True, True, [True])
    assert rule.scale == pytest.approx(2.5)
    expected = torch.tensor([1 / 2, 0, 3 / 4]) / (1 / 2 + 3 / 4) * 2.5
    torch.testing.assert_close(rule.gates(subset(3, {0, 2}))[0, 0], expected)


def test_groups_bar_the_largest_logit() -> None:
    # Groups (0, 1) and (2, 3), one may be used, by the sum of its two largest probabilities: .73 + .69 beats .82 + 0
    logits = torch.tensor([[1.0, 0.8, 1.5, -9.0], [-9.0, -9.0, 0.3, 0.1]])
    gate = torch.stack([logits[0, :2], logits[1, 2:]]).sigmoid()
    given = sample(logits.tolist(), [[0, 1], [2, 3]], gate.tolist())
    rule, known = routing_of(given, Groups(count=2, used=1, least=2), None, "here")
    assert (rule.sigmoid, rule.normalised, known.tolist()) == (True, False, [True, True])
    torch.testing.assert_close(own_gates(given), rule.gates(torch.ones(1, 4, dtype=torch.bool))[0])


def test_what_no_rule_gives_is_refused_with_the_reason() -> None:
    with pytest.raises(
        moetailor.PlanError, match=r"^here: .*for 100% .* did not choose the largest logits; .*such as reap$"
    ):
        routing_of(sample([[3.0, 2.0, 1.0]], [[1, 2]], [[0.5, 0.5]]), Groups(), None, "here")
    logits = [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]
    with pytest.raises(moetailor.PlanError, match="for 100% of the sampled tokens its gates are no softmax or sigmoid"):
        routing_of(sample(logits, [[0, 1], [1, 2]], [[0.9, 0.2], [0.2, 0.9]]), Groups(), None, "here")


def test_ties_that_went_the_other_way_are_left_out() -> None:
    """With rounded logits many tokens tie; the kernel's choice among equals says nothing against the rule."""
    gate = torch.tensor([3.0, 2.0]).softmax(0).tolist()
    other = 3 - int(torch.tensor([3.0, 2.0, 2.0]).topk(2).indices[1])  # what topk does not take here
    tied = sample([[3.0, 2.0, 2.0]] * 4 + [[3.0, 2.0, 1.0]], [[0, other]] * 4 + [[0, 1]], [gate] * 5)
    _, known = routing_of(tied, Groups(), None, "here")
    assert known.tolist() == [False] * 4 + [True]
