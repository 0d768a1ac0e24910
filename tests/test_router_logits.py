"""The balance of routers that lost slots, against loops over layers, tokens and slots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetailor
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.evaluation.search import with_slots
from moetailor.planning.budget import Budget
from support.tiny import IDS, load

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
FAMILIES = ["olmoe", "qwen3_moe", "gpt_oss", "mixtral", "qwen3_next"]


def balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> float:
    """Return slots * sum_i f_i P_i: f the tokens that chose slot i, P its mean probability, over layers and tokens."""
    slots = max(logits.shape[1] for logits in router_logits)
    chosen, probability, rows = [0.0] * slots, [0.0] * slots, 0
    for logits in router_logits:
        for token in logits.double().softmax(-1):
            rows += 1
            for slot in token.topk(top_k).indices.tolist():
                chosen[slot] += 1
            for slot, value in enumerate(token.tolist()):
                probability[slot] += value
    return slots * sum(f / rows * p / rows for f, p in zip(chosen, probability, strict=True))


def check(model: Any, widths: list[int]) -> None:
    output = model(IDS, labels=IDS, output_router_logits=True)
    widest = max(widths)
    assert [logits.shape[1] for logits in output.router_logits] == [widest] * len(widths)
    for logits, width in zip(output.router_logits, widths, strict=True):
        assert torch.isfinite(logits[:, :width]).all()
        assert (logits[:, width:] == -torch.inf).all()
    own = tuple(logits[:, :width].detach() for logits, width in zip(output.router_logits, widths, strict=True))
    top_k = getattr(model.config, "num_experts_per_tok", None)
    assert float(output.aux_loss.detach()) == pytest.approx(balance(own, top_k), rel=1e-4)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    plain = model(IDS, labels=IDS)
    assert torch.equal(plain.logits, output.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_routers_that_lost_slots_are_balanced(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path, name: str
) -> None:
    made, source = calibration(name), checkpoint(name)
    count = made.model.stacks[0].num_experts
    even = moetailor.make_plan(made, "reap", Budget.parse(keep=count - 2))
    uneven = moetailor.make_plan(made, "reap", Budget.parse(keep=count - 2), layers=made.layers[1:2])
    cases = [
        (even, "native", [count - 2] * 2),
        (even, "moetailor", [count - 2] * 2),
        (uneven, "moetailor", [count, count - 2]),
    ]
    for number, (plan, format, widths) in enumerate(cases):
        check(moetailor.apply(plan, load(source)), widths)
        out = moetailor.apply(plan, source, tmp_path / str(number), format=format)
        loaded = load(out)
        check(loaded, widths)
        with quiet_transformers():
            loaded.save_pretrained(tmp_path / f"{number} again")
        check(load(tmp_path / f"{number} again"), widths)


def test_a_search_sees_its_candidates_balanced(checkpoint: Get) -> None:
    """Candidates share the original's tensors; the original is as it was."""
    model = load(checkpoint("olmoe"))
    anatomy = discover(model.config, model)
    for slots in ({0: [0, 2, 5, 7]}, {0: [1, 2, 3, 4, 5], 1: [0, 1, 2]}):
        candidate = with_slots(model, anatomy, slots)
        check(candidate, [len(slots.get(layer, range(8))) for layer in (0, 1)])
    check(model, [8, 8])
