"""Auto with bits on its menu: widths priced on tokens that they were not fitted on, and one knapsack over all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import moetailor
from moetailor.answers import Keep, Width
from moetailor.calibration.text import TextOptions
from moetailor.fitting.held_out import held_out
from moetailor.fitting.widths import WIDTHS, held_out_errors, quantized
from moetailor.planning.view import LayerView
from support.layers import layer_of_tokens, random_experts
from support.reference import REFERENCE

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def fitted_part(layer: LayerView) -> LayerView:
    """Return a layer whose sample has only the tokens that are fitted."""
    sample = layer.sample
    kept = ~held_out(torch.arange(len(sample.key)))
    found = {name: getattr(sample, name)[kept] for name in ("key", "hidden", "index", "gate", "logits")}
    other = replace(layer, read_sample=lambda: replace(sample, **found))
    return other


def test_a_price_is_the_share_of_the_constants_error_on_tokens_that_were_not_fitted() -> None:
    layer = layer_of_tokens(random_experts(3), tokens=600)
    widths = [Width(bits=2, group=4), Width(bits=4, down=6, group=4), Width(bits=8, group=4)]
    prices = held_out_errors(layer, widths, dtype=torch.float32)
    assert prices.shape == (3, 3)
    part = fitted_part(layer)
    for expert in range(3):
        token, gate = layer.routed(expert)
        judged = held_out(token)
        x, weight = layer.sample.hidden[token], gate.double().square()[:, None]
        y = layer.experts.outputs(expert, x).double()
        constant = (weight * y)[~judged].sum(0) / weight[~judged].sum()
        lost = float((weight * (y - constant).square())[judged].sum())
        for at, width in enumerate(widths):
            storages = width.storages(layer.shape)
            codes = quantized(part, [{expert: 1.0}], layer.experts.matrices([expert]), storages, dtype=torch.float32)
            own = {name: storages[name].numbers(codes[name])[0] for name in codes}
            given = F.linear(layer.experts.hidden(own, x[judged]), own["down"]).double()
            error = float((weight[judged] * (y[judged] - given).square()).sum())
            assert float(prices[expert, at]) == pytest.approx(error / lost, rel=1e-3)
    assert bool((prices[:, 0] > prices[:, 1]).all() and (prices[:, 1] > prices[:, 2]).all())


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.7])
def test_a_budget_is_met_in_widths_and_stand_ins(
    family: str, share: float, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    measured = calibration(family)
    facts, experts = (
        measured.model,
        sum(s.num_experts * s.expert_bytes for s in measured.model.stacks if s.index is not None),
    )
    size = facts.nbytes - experts + int(experts * share)
    first = measured.layers[0]
    plan = moetailor.make_plan(
        measured, "auto", moetailor.Budget.parse(size=size), parameters={"bits": True}, protect=[(first, 2)]
    )
    assert plan.nbytes <= size
    assert isinstance(plan.by_layer[first].slots[2], Keep)
    assert plan.expected is not None
    assert any(layer.widths for layer in plan.by_layer.values())
    dead = {index: measured.sums(index).count == 0 for index in measured.layers}
    for index, layer in plan.by_layer.items():
        for expert in dead[index].nonzero().flatten().tolist():
            assert layer.slots[expert] == Keep()  # that no text reached it may be the text's doing
            assert layer.widths[expert] in WIDTHS
    plan.save(tmp_path / "plan.json")
    assert moetailor.Plan.load(tmp_path / "plan.json") == plan
    moetailor.apply(plan, checkpoint(family), tmp_path / "out", calibration=measured)


@pytest.mark.slow
def test_on_the_reference_model_it_loses_less_than_equal_widths(tmp_path: Path) -> None:
    """In the bytes of 3 and of 4 bits everywhere: less than a third and a half of the KL, near what was foretold."""
    text = TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=128, length=256)
    held = TextOptions(data=(str(REFERENCE / "heldout.jsonl"),), sequences=16, length=256)
    measured = moetailor.calibrate(REFERENCE, tmp_path / "calibration", text=text, sensitivity=True)
    for bits, share in ((3, 1 / 3), (4, 1 / 2)):
        found = []
        equal = moetailor.make_plan(measured, "quantize", moetailor.Budget.parse(remove=0), parameters={"bits": bits})
        budget = moetailor.Budget.parse(size=equal.nbytes)
        mixed = moetailor.make_plan(measured, "auto", budget, parameters={"bits": True})
        for name, plan in (("equal", equal), ("mixed", mixed)):
            out = moetailor.apply(plan, REFERENCE, tmp_path / f"{name}{bits}", calibration=measured)
            scores = moetailor.evaluate(out, against=REFERENCE, text=held)
            found.append(scores.overall.kl.mean)
        assert mixed.nbytes <= equal.nbytes
        assert found[1] < share * found[0]
        assert mixed.expected == pytest.approx(found[1], rel=1.0)
