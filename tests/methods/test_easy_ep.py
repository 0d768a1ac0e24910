"""EASY-EP: the statistic against the residual stream of a plain model, what records it, and what happens without."""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.calibration.folder import layer_file
from moetailor.calibration.statistics import ON_REQUEST, Sums
from moetailor.checkpoint.anatomy import discover
from moetailor.methods.easy_ep import EasyEP
from support import naive
from support.hand import layer_of, sums_of
from support.tiny import token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
REFERENCE = Path(__file__).parents[2] / "examples" / "reference-moe"


def test_the_sum_is_the_score() -> None:
    sums = sums_of([(expert, 1.0, [1.0]) for expert in range(3)], 3, 3)
    sums.gated_norm_shift = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    plan = EasyEP().plan(layer_of(sums), 1)
    assert plan.pool == [2]
    assert plan.scores == (0.5, 0, 2)


def test_a_plain_block_gives_the_papers_formula(checkpoint: Get, calibration: GetCalibration) -> None:
    """In olmoe the stream before is what the second norm of a layer takes in, and after is that plus the experts."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), dtype=torch.float32)
    for index, layer in discover(model.config, model).layers.items():
        norm = model.model.layers[index].post_attention_layernorm
        expected = torch.zeros(layer.num_experts, dtype=torch.float64)
        for batch in token_batches():
            before: list[torch.Tensor] = []
            watch = norm.register_forward_pre_hook(lambda module, args, kept=before: kept.append(args[0].flatten(0, 1)))
            seen = naive.run_recorded(model, layer, batch.input_ids)
            watch.remove()
            for token, h in enumerate(before[0]):
                given = [
                    (expert, gate, gate * naive.expert_output(model, layer, expert, seen["hidden"][token]))
                    for expert, gate in zip(seen["index"][token].tolist(), seen["gate"][token].tolist(), strict=True)
                ]
                after = h + torch.stack([output for *_, output in given]).sum(0)
                weight = max(0.0, 1 - float(torch.cosine_similarity(h.double(), after.double(), dim=0)))
                for expert, _, output in given:
                    expected[expert] += weight * float(output.norm())
        found = calibration("olmoe").sums(index).gated_norm_shift
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_without_it_plans_name_the_flag_and_all_else_is_the_same(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plain = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "plain", text=token_batches())
    with pytest.raises(moetailor.PlanError, match=r"reads gated_norm_shift, which .*plain does not hold.* --residual$"):
        moetailor.make_plan(plain, "easy_ep", moetailor.Budget.parse(keep=6))
    for layer in plain.layers:
        mine, other = plain.sums(layer), calibration("olmoe").sums(layer)
        assert mine.gated_norm_shift is None
        for field in fields(Sums):
            if field.name not in ON_REQUEST:
                assert torch.equal(getattr(mine, field.name), getattr(other, field.name)), field.name
        assert (mine + other).gated_norm_shift is None
        twice = (other + other).gated_norm_shift
        assert twice is not None
        assert other.gated_norm_shift is not None
        assert torch.equal(twice, 2 * other.gated_norm_shift)


def test_a_folder_without_it_is_not_taken_for_one_with_it(checkpoint: Get, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    moetailor.calibrate(checkpoint("olmoe"), folder, text=token_batches())
    with pytest.raises(moetailor.CalibrationError, match=r"another calibration \(residual differ\)"):
        moetailor.calibrate(checkpoint("olmoe"), folder, text=token_batches(), residual=True)


def test_a_folder_with_it_serves_who_does_not_ask(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    whole = calibration("olmoe")
    assert moetailor.calibrate(checkpoint("olmoe"), whole.folder, text=token_batches()) == whole
    # ... and one that was stopped goes on recording it.
    folder = tmp_path / "stopped"
    shutil.copytree(whole.folder, folder)
    (folder / "calibration.json").unlink()
    layer_file(folder, 1).unlink()
    resumed = moetailor.calibrate(checkpoint("olmoe"), folder, text=token_batches())
    assert layer_file(folder, 1).read_bytes() == layer_file(whole.folder, 1).read_bytes()
    assert resumed.fingerprint == whole.fingerprint


def test_a_damaged_file_is_told_from_one_without_it(calibration: GetCalibration, tmp_path: Path) -> None:
    shutil.copytree(calibration("olmoe").folder, tmp_path / "c")
    file = layer_file(tmp_path / "c", 0)
    tensors = load_file(file)
    del tensors["sum.count"]
    save_file(tensors, file)
    with pytest.raises(moetailor.CalibrationError, match="holds other values than were written"):
        moetailor.Calibration.open(tmp_path / "c").sums(0)


def test_tokens_that_do_not_count_do_not_count_here(checkpoint: Get, tmp_path: Path) -> None:
    ids = token_batches(1)[0].input_ids[:1]
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], 1)
    plain, masked = (
        moetailor.calibrate(checkpoint("olmoe"), tmp_path / name, text=[batch], residual=True).sums(1).gated_norm_shift
        for name, batch in (("plain", moetailor.Batch.of(ids)), ("masked", moetailor.Batch.of(padded, mask)))
    )
    torch.testing.assert_close(plain, masked, rtol=1e-4, atol=1e-6)


def test_compress_records_it_by_itself(tmp_path: Path) -> None:
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=2, length=32)
    budget = moetailor.Budget.parse(remove="25%")
    measured, plan = moetailor.compress(REFERENCE, tmp_path / "out", text=text, method="easy_ep", budget=budget)
    scores = torch.tensor(plan.by_layer[0].scores, dtype=torch.float64)
    torch.testing.assert_close(scores, measured.sums(0).gated_norm_shift, rtol=1e-5, atol=1e-9)
    # the same calibration serves another method
    moetailor.compress(
        REFERENCE, tmp_path / "other", text=text, method="reap", budget=budget, calibration=measured.folder
    )
