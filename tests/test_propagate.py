"""Fitting front to back: against a naive run of both models, in memory and streamed alike."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Borrowed, Constant
from moetailor.checkpoint.files import open_checkpoint
from moetailor.planning.plan import Plan
from support.methods import REFUSED_BY, TINY_PARAMETERS
from support.tiny import anatomy_of, load, logits, token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
BUILDING = sorted(name for name, method in moetailor.METHODS.items() if method.builds)
FAMILIES = ["deepseek_v3", "gpt_oss", "olmoe", "qwen2_moe"]


def planned(calibration: moetailor.Calibration, method: str, layers: list[int] | None = None) -> Plan:
    keep = calibration.model.stacks[0].num_experts - calibration.model.groups.count
    return moetailor.make_plan(
        calibration, method, moetailor.Budget.parse(keep=keep), layers=layers, parameters=TINY_PARAMETERS.get(method)
    )


def experts_calls(model: torch.nn.Module, path: str) -> list[tuple[torch.Tensor, ...]]:
    """Run the calibration text and return the arguments of an experts module's calls."""
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args))
    for batch in token_batches():
        logits(model, batch.input_ids)
    handle.remove()
    return seen


def test_a_novice_is_the_mean_of_original_outputs_over_compressed_routing(
    checkpoint: Get, calibration: GetCalibration
) -> None:
    plan = planned(calibration("olmoe"), "mone")
    first, second = calibration("olmoe").layers[:2]
    original = load(checkpoint("olmoe"))
    path = anatomy_of(original).layers[second].experts
    half_plan = planned(calibration("olmoe"), "mone", layers=[first])
    half = moetailor.apply(half_plan, load(checkpoint("olmoe")), calibration=calibration("olmoe"))
    slots = list(plan.by_layer[second].of(Constant))
    total, count = torch.zeros(len(slots), 32), torch.zeros(len(slots))
    for (true, *_), (_, index, _) in zip(experts_calls(original, path), experts_calls(half, path), strict=True):
        for token, chosen in enumerate(index.tolist()):
            for slot in set(chosen) & set(slots):
                with torch.no_grad():
                    given = original.get_submodule(path)(
                        true[token : token + 1], torch.tensor([[slot]]), torch.ones(1, 1)
                    )
                total[slots.index(slot)] += given[0]
                count[slots.index(slot)] += 1
    assert count.min() > 0
    done = moetailor.apply(plan, load(checkpoint("olmoe")), calibration=calibration("olmoe"), propagate="compressed")
    torch.testing.assert_close(done.get_submodule(path).constant, total / count[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "family"), [(m, f) for m in BUILDING for f in FAMILIES if f not in REFUSED_BY.get(m, frozenset())]
)
@pytest.mark.filterwarnings("ignore::moetailor.MoetailorWarning")
def test_on_disk_as_in_memory(
    method: str, family: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = planned(calibration(family), method)
    options = {"calibration": calibration(family), "propagate": "compressed"}
    moetailor.apply(plan, checkpoint(family), tmp_path / "out", verify=False, **options)
    assert open_checkpoint(tmp_path / "out").nbytes == plan.nbytes
    assert not (tmp_path / "out" / "built").exists()
    assert json.loads((tmp_path / "out" / "moetailor_provenance.json").read_text())["fitted_on"] == "compressed"
    expected = logits(moetailor.apply(plan, load(checkpoint(family)), **options))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-4)


def test_the_first_layer_sees_what_it_always_saw(checkpoint: Get, calibration: GetCalibration) -> None:
    plan = planned(calibration("olmoe"), "linear")
    results = [
        moetailor.apply(plan, load(checkpoint("olmoe")), calibration=calibration("olmoe"), propagate=propagate)
        for propagate in ("original", "compressed")
    ]
    layers = anatomy_of(load(checkpoint("olmoe"))).layers
    first, last = min(layers), max(layers)
    one, other = (result.get_submodule(layers[first].experts).linear_constant for result in results)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    one, other = (result.get_submodule(layers[last].experts).linear_in for result in results)
    assert not torch.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("borrower", [0, 1])
def test_borrowed_experts_are_refused(
    borrower: int, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """Their layer is not loaded beside, and has yet to change or has changed already."""
    plan, layers = planned(calibration("olmoe"), "mone"), calibration("olmoe").layers
    prefixes = {stack.index: stack.prefix for stack in plan.model.stacks}
    mine, lender = plan.by_layer[layers[borrower]], layers[1 - borrower]
    slots = list(mine.slots)
    slots[min(mine.of(Constant))] = Borrowed(lender, plan.by_layer[lender].pool[0])
    borrowing = plan.layers | {prefixes[layers[borrower]]: dataclasses.replace(mine, slots=tuple(slots))}
    plan = dataclasses.replace(plan, layers=borrowing)
    message = f"propagate compressed: layers change one by one, and layer {layers[borrower]} borrows experts of other"
    for model, out in ((checkpoint("olmoe"), [tmp_path / "out"]), (load(checkpoint("olmoe")), [])):
        with pytest.raises(moetailor.PlanError, match=message):
            moetailor.apply(plan, model, *out, calibration=calibration("olmoe"), propagate="compressed")
    assert list(tmp_path.iterdir()) == []
    moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe"))


def test_a_plan_with_nothing_to_fit_is_refused(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    plan = planned(calibration("olmoe"), "reap")
    with pytest.raises(moetailor.PlanError, match="a plan of 'reap' has nothing to fit; leave it out"):
        moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", propagate="compressed")
    with pytest.raises(moetailor.PlanError, match="propagate 'compresed'; did you mean 'compressed'"):
        moetailor.apply(plan, load(checkpoint("olmoe")), propagate="compresed")
