"""Fidelity against a loop over tokens, and intervals with known answers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moetailor
from moetailor.calibration.layers import by_rows
from moetailor.checkpoint.original import Original
from moetailor.evaluation import fidelity as fidelity_module
from moetailor.evaluation.fidelity import Reference
from moetailor.evaluation.speed import measure_speed
from moetailor.runtime.parts import in_parts
from moetailor_cli import output
from support.families import tiny_model
from support.tiny import token_batches

Get = Callable[[str], Path]
HELD_OUT = Path(__file__).parent.parent / "examples" / "reference-moe" / "heldout.jsonl"


def test_numbers_equal_a_loop_over_tokens(tmp_path: Path) -> None:
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    batches = token_batches(2)
    found = Reference(tmp_path / "r", batches).record(one).compare(other, one)[""]
    kl, agree, nll, other_nll = [], [], [], []
    for batch in batches:
        with torch.no_grad():
            p, q = (model(batch.input_ids).logits.double().softmax(-1) for model in (one, other))
        for row in range(len(p)):
            for place in range(p.shape[1] - 1):
                a, b, word = p[row, place], q[row, place], batch.input_ids[row, place + 1]
                kl.append(sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True)))
                agree.append(float(a.argmax() == b.argmax()))
                nll.append(-math.log(float(a[word])))
                other_nll.append(-math.log(float(b[word])))
    count = len(kl)
    assert found.tokens == count == 33
    assert found.kl.mean == pytest.approx(sum(kl) / count, rel=1e-4)
    assert found.top1_agreement.mean == pytest.approx(sum(agree) / count)
    assert found.original_perplexity.mean == pytest.approx(math.exp(sum(nll) / count), rel=1e-4)
    assert found.compressed_perplexity.mean == pytest.approx(math.exp(sum(other_nll) / count), rel=1e-4)
    assert found.kl.low <= found.kl.mean <= found.kl.high


def test_a_last_block_of_one_token_predicts_nothing(tmp_path: Path) -> None:
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    last = moetailor.Batch.of(torch.tensor([[3]]))
    found, expected = (
        Reference(tmp_path / str(len(batches)), batches).record(one).compare(other, one)
        for batches in ([*token_batches(), last], token_batches())
    )
    assert found == expected


def test_what_ends_too_soon_is_no_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A StopIteration from somewhere inside a model does not pass for the end of the text."""
    model, broken = tiny_model("olmoe"), tiny_model("olmoe")
    reference = Reference(tmp_path / "r", token_batches()).record(model)
    monkeypatch.setattr(broken.model.layers[1].mlp, "forward", lambda *given, **more: next(iter(())))
    with pytest.raises(RuntimeError, match="StopIteration"):
        reference.compare(broken, model)


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    found = Reference(tmp_path / "r", token_batches()).record(model).compare(model, model)[""]
    assert found.kl == fidelity_module.Interval(0, 0, 0)
    assert found.top1_agreement.mean == 1
    assert found.original_perplexity == found.compressed_perplexity


def test_domains_split_the_tokens(tmp_path: Path) -> None:
    """The domain of a prediction is that of the token predicted; weighted means of domains give the whole."""
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    domain = torch.zeros(2, 12, dtype=torch.long)
    domain[:, 5:] = 1
    batches = [replace(token_batches(1)[0], domain=domain, domains=("fiction", "code"))]
    found = Reference(tmp_path / "r", batches).record(one).compare(other, one)
    assert set(found) == {"", "fiction", "code"}
    assert (found["fiction"].tokens, found["code"].tokens) == (8, 14)
    weighted = (8 * found["fiction"].kl.mean + 14 * found["code"].kl.mean) / 22
    assert found[""].kl.mean == pytest.approx(weighted)


def test_intervals_narrow_with_more_blocks(tmp_path: Path) -> None:
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)

    def width(count: int) -> float:
        found = Reference(tmp_path / str(count), token_batches(count)).record(one).compare(other, one)[""]
        return found.kl.high - found.kl.low

    assert width(64) < 0.6 * width(8)


def test_padding_is_not_predicted(tmp_path: Path) -> None:
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    ids = token_batches(1)[0].input_ids
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    found = Reference(tmp_path / "r", [moetailor.Batch.of(ids, mask)]).record(one).compare(other, one)[""]
    assert found.tokens == 11 + 7


def test_no_room_on_the_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(moetailor.MoetailorError, match="evaluate on less text"):
        Reference(tmp_path / "r", token_batches()).record(tiny_model("olmoe"))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    reference = Reference(tmp_path / "r", token_batches()).record(one)
    other.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(moetailor.MoetailorError, match="not finite"):
        reference.compare(other, one)


def test_speed_is_positive() -> None:
    speed = measure_speed(tiny_model("olmoe"), token_batches(1)[0].input_ids, new_tokens=2, repeats=3)
    assert 0 < speed.prefill_low < speed.prefill
    assert 0 < speed.decode_low < speed.decode


def test_scores_have_the_keys_that_people_read(checkpoint: Get, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent / "examples" / "reference-moe"
    text = moetailor.TextOptions(data=(str(root / "heldout.jsonl"),), sequences=2, length=64, batch_size=1)
    scores = moetailor.evaluate(root, root, text=text).to_json()
    assert scores["kl"]["mean"] == 0
    assert scores["original"]["perplexity"] == scores["compressed"]["perplexity"] > 1
    assert scores["bytes"] == {"original": 18536832, "compressed": 18536832}
    # bf16 on disk, float32 in memory, and a few rotary frequencies
    assert scores["resident_bytes"]["original"] == pytest.approx(2 * 18536832, rel=1e-4)
    assert set(scores["domains"]) == {"dialogue"}
    assert scores["tokens_per_second"]["compressed"]["decode"] > 0
    assert {"low", "high"} <= set(scores["top1_agreement"])


@pytest.mark.parametrize(
    ("method", "parameters", "remove"),
    [("mone", {}, "50%"), ("conmoe", {"scope": 2}, "50%"), ("reap", {}, "25%"), ("auto", {}, "65%")],
)
def test_streamed_equals_in_memory(
    method: str, parameters: dict, remove: str, calibration: Callable[[str], moetailor.Calibration], tmp_path: Path
) -> None:
    """Experts of other layers among them."""
    measured = calibration("olmoe")
    plan = moetailor.make_plan(measured, method, moetailor.Budget.parse(remove=remove), parameters=parameters)
    out = moetailor.apply(plan, measured.model.source, tmp_path / "out", calibration=measured)
    original, small = Original(measured.model.source), Original(out, takes="anything")
    run: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    loaded = Reference(tmp_path / "m", token_batches()).record(original.load(**run))
    streamed = Reference(tmp_path / "s", token_batches()).record(in_parts(original, **run))
    found = loaded.compare(small.load(**run), original.load(**run))[""]
    other = streamed.compare(in_parts(small, **run), in_parts(original, **run))[""]
    assert found.kl.mean > 0
    for name in ("kl", "original_perplexity", "compressed_perplexity"):
        assert getattr(other, name).mean == pytest.approx(getattr(found, name).mean, rel=1e-5)


def test_what_is_streamed_has_no_speed(tmp_path: Path) -> None:
    text, scratch = moetailor.TextOptions(data=(str(HELD_OUT),), sequences=2, length=64), tmp_path / "a" / "b"
    found = moetailor.evaluate(HELD_OUT.parent, HELD_OUT.parent, text=text, stream=True, scratch=scratch)
    assert (found.speed, found.resident, found.overall.kl.mean) == (None, None, 0)
    assert "tokens_per_second" not in found.to_json()
    assert list(scratch.iterdir()) == []
    output.scores(found)


def test_what_is_said_of_rows_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BCV, words_BC = torch.arange(40.0).view(2, 5, 4), torch.arange(10).view(2, 5)
    monkeypatch.setattr("moetailor.calibration.layers.passing_nbytes", lambda device: 3 * 4 * 4)
    said = by_rows(lambda a_RV, b_R: {"sum": a_RV[:, 0] + b_R}, logits_BCV, words_BC)
    assert torch.equal(said["sum"], logits_BCV[..., 0] + words_BC)


@pytest.mark.parametrize(("given", "flag"), [({"device_map": "auto"}, "--device-map"), ({"tasks": "arc"}, "--tasks")])
def test_what_needs_the_whole_model_is_refused_beside_stream(given: dict, flag: str) -> None:
    text = moetailor.TextOptions(data=(str(HELD_OUT),), sequences=1, length=32)
    if "tasks" in given:
        given = {"tasks": moetailor.TaskOptions(tasks=(given["tasks"],))}
    with pytest.raises(moetailor.MoetailorError, match=rf"--stream {flag}: needs the whole model in memory"):
        moetailor.evaluate("any", "other", text=text, stream=True, **given)


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("size", [1, 7, 2**24])
def test_heads_run_on_some_tokens_at_a_time(
    family: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a family does to its logits; of some of these tokens three rows are judged at a time."""
    one, other = tiny_model(family, seed=0), tiny_model(family, seed=1)
    batches = token_batches(2)
    monkeypatch.setattr("moetailor.calibration.layers.PREDICTIONS", size * 2 * one.config.vocab_size)
    monkeypatch.setattr("moetailor.calibration.layers.passing_nbytes", lambda device: 3 * 4 * one.config.vocab_size)
    found = Reference(tmp_path / "r", batches).record(one).compare(other, one)[""]
    total, same, losses, count = 0.0, 0, [0.0, 0.0], 0
    for batch in batches:
        with torch.no_grad():
            p, q = (model(batch.input_ids).logits.double().log_softmax(-1)[:, :-1] for model in (one, other))
        total, count = total + float((p.exp() * (p - q)).sum()), count + p[..., 0].numel()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        words = batch.input_ids[:, 1:, None]
        losses = [loss - float(logp.gather(2, words).sum()) for loss, logp in zip(losses, (p, q), strict=True)]
    assert found.kl.mean == pytest.approx(total / count, rel=1e-4)
    assert found.top1_agreement.mean == pytest.approx(same / count)
    perplexities = [found.original_perplexity.mean, found.compressed_perplexity.mean]
    assert perplexities == pytest.approx([math.exp(loss / count) for loss in losses], rel=1e-4)
