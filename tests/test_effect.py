"""What errors of a layer do to the predictions: against a plain forward of the whole model with one layer moved."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.calibration import effect
from moetailor.calibration.batch import spread
from moetailor.calibration.layers import ResidentModel
from support.families import tiny_model
from support.tiny import anatomy_of, load, logits, token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "granitemoe"])
def test_the_effect_is_the_kl_of_a_model_with_one_layer_moved(
    name: str, checkpoint: Get, calibration: GetCalibration
) -> None:
    model, measured = load(checkpoint(name)), calibration(name)
    for index, layer in anatomy_of(model).layers.items():
        sums, experts = measured.sums(index), model.get_submodule(layer.experts)
        constants = (sums.gate_sq_output / sums.gate_sq[:, None].clamp_min(1e-300)).float()
        squared = 0.0

        def move(module: object, args: tuple, y: torch.Tensor, constants: torch.Tensor = constants) -> torch.Tensor:
            nonlocal squared
            moved = y.clone()
            for token, (chosen, gates) in enumerate(zip(args[1].tolist(), args[2].tolist(), strict=True)):
                instead = sum(gate * constants[expert] for expert, gate in zip(chosen, gates, strict=True))
                moved[token] = instead
            squared += float((moved - y).square().sum())
            return moved

        kl = 0.0
        for batch in token_batches():
            before = logits(model, batch.input_ids).log_softmax(-1)
            handle = experts.register_forward_hook(move)
            after = logits(model, batch.input_ids).log_softmax(-1)
            handle.remove()
            kl += float((before.exp() * (before - after)).sum())
        assert measured.effects()[index] == pytest.approx(kl / squared, rel=0.02)


def test_sequences_are_taken_from_everywhere_in_the_text() -> None:
    batches = token_batches(count=5)
    rows = [row.tolist() for batch in batches for row in batch.input_ids]
    for tokens, wanted in ((24, [0, 3]), (1, [0]), (1000, range(6))):
        taken = spread(batches, tokens)
        assert [batch.input_ids[0].tolist() for batch in taken] == [rows[row] for row in wanted]
        assert all(len(part) == 1 for batch in taken for part in (batch.input_ids, batch.document, batch.domain))


def test_a_finished_folder_takes_the_effect_later(checkpoint: Get, tmp_path: Path) -> None:
    plain = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches())
    assert plain.effects() is None
    with pytest.raises(
        moetailor.PlanError, match=r"auto reads effect, which .* does not hold; calibrate again with --effect"
    ):
        moetailor.make_plan(plain, "auto", moetailor.Budget.parse(remove="25%"))
    before = {file.name: file.stat().st_mtime_ns for file in plain.folder.iterdir()}
    again = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches(), effect=True)
    assert set(again.effects() or {}) == set(again.layers)
    after = {file.name: file.stat().st_mtime_ns for file in plain.folder.iterdir()}
    assert set(after) - set(before) == {"effect.json"}
    assert {name for name in before if before[name] != after[name]} == {"calibration.json"}
    about = json.loads((plain.folder / "effect.json").read_text())
    assert about["tokens"] == sum(int(batch.counted.sum()) for batch in token_batches())


def test_tokens_that_do_not_count_are_in_neither_sum(checkpoint: Get, tmp_path: Path) -> None:
    ids = token_batches(1)[0].input_ids
    padded = torch.cat([ids, torch.full((len(ids), 5), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 5, dtype=torch.long)], 1)
    found = []
    for name, batch in (("plain", moetailor.Batch.of(ids)), ("padded", moetailor.Batch.of(padded, mask))):
        made = moetailor.calibrate(checkpoint("olmoe"), tmp_path / name, text=[batch], effect=True)
        found.append(json.loads((made.folder / "effect.json").read_text()))
    plain, padded = found
    assert padded["tokens"] == plain["tokens"] == ids.numel()
    for layer, sums in plain["layers"].items():
        assert padded["layers"][layer] == pytest.approx(sums, rel=1e-3)


def test_states_on_disk_go_and_a_loss_that_balances_routers_is_not_asked_for(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    plain = moetailor.calibrate(model, tmp_path / "plain", text=token_batches(), effect=True)
    model.config.output_router_logits = True
    made = moetailor.calibrate(model, tmp_path / "c", text=token_batches(), effect=True, states="disk")
    assert made.effects() == pytest.approx(plain.effects(), rel=1e-4)
    assert model.config.output_router_logits is True
    assert not (tmp_path / "c" / "states").exists()


def test_logits_that_overflow_are_refused(tmp_path: Path) -> None:
    made = moetailor.calibrate(tiny_model("olmoe"), tmp_path / "c", text=token_batches())
    model = tiny_model("olmoe")
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(moetailor.CalibrationError, match=r"layer 0: .* not finite"):
        effect.measure_effects(made, ResidentModel(model), anatomy_of(model))
    assert made.effects() is None
