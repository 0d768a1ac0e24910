"""What errors of a layer do to the predictions: against a forward of the whole model with one layer replaced."""

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.calibration.batch import evenly_spaced_sequences
from moetailor.calibration.effects import ERRORS, Errors
from moetailor.calibration.layers import ResidentModel
from moetailor.calibration.sensitivity import _kept, _rounded, measure_sensitivities
from moetailor.calibration.statistics import Sums
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.storage import Integers
from support.families import tiny_model
from support.tiny import anatomy_of, load, logits, token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def masked_batches() -> list[moetailor.Batch]:
    """Return two sequences of which some tokens do not count, and one with padding."""
    whole, other = token_batches()
    counted = whole.counted.clone()
    counted[0, :3], counted[1, 7] = False, False
    padded = torch.cat([other.input_ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    return [
        dataclasses.replace(whole, counted=counted),
        moetailor.Batch.of(padded, (torch.arange(17) < 12)[None].long()),
    ]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("text", [token_batches, masked_batches])
def test_a_sensitivity_is_the_kl_of_a_model_with_one_layer_replaced(
    name: str, text: Callable[[], list[moetailor.Batch]], kind: Errors, checkpoint: Get, tmp_path: Path
) -> None:
    batches = text()
    model, rounded = load(checkpoint(name)), load(checkpoint(name))
    measured = moetailor.calibrate(checkpoint(name), tmp_path / "c", text=batches, sensitivity=True)
    for index, layer in anatomy_of(rounded).layers.items():
        if kind != "constants":
            round_experts(rounded.get_submodule(layer.experts), measured.sums(index), int(kind[-1]))
    about = json.loads((measured.folder / "sensitivity.json").read_text())
    for index, layer in anatomy_of(model).layers.items():
        sums, experts = measured.sums(index), model.get_submodule(layer.experts)
        constants = (sums.gate_sq_output / sums.gate_sq[:, None].clamp_min(1e-300)).float()
        errors: list[float] = []
        other = rounded.get_submodule(layer.experts)

        def replace(module: object, args: tuple, y: torch.Tensor, constants: torch.Tensor = constants) -> torch.Tensor:
            if kind != "constants":
                errors.extend((other(*args) - y).square().sum(1).tolist())  # noqa: B023
                return other(*args)  # noqa: B023
            replaced = y.clone()
            for token, (chosen, gates) in enumerate(zip(args[1].tolist(), args[2].tolist(), strict=True)):
                instead = sum(gate * constants[expert] for expert, gate in zip(chosen, gates, strict=True))
                replaced[token] = instead
            errors.extend((replaced - y).square().sum(1).tolist())  # noqa: B023 (called in this round)
            return replaced

        kl, squared = 0.0, 0.0
        for batch in batches:
            for ids, counted in zip(batch.input_ids, batch.counted, strict=True):
                real = ids[:12][None]
                before = logits(model, real).log_softmax(-1)
                handle = experts.register_forward_hook(replace)
                after = logits(model, real).log_softmax(-1)
                handle.remove()
                for place in counted.nonzero().flatten().tolist():
                    kl += float((before[0, place].exp() * (before[0, place] - after[0, place])).sum())
                    squared += errors[place]
                errors.clear()
        found = about["layers"][str(index)][kind]
        assert found["squared_error"] == pytest.approx(squared, rel=0.02)
        assert found["kl"] == pytest.approx(kl, rel=0.02)
    assert about["tokens"] == (36 if text is token_batches else 32)


@pytest.mark.parametrize("kind", ERRORS)
def test_what_all_layers_together_lose_is_the_kl_of_a_model_with_all_replaced(
    kind: Errors, checkpoint: Get, tmp_path: Path
) -> None:
    model, batches = load(checkpoint("olmoe")), token_batches()
    measured = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=batches, sensitivity=True)
    other = load(checkpoint("olmoe"))
    for index, layer in anatomy_of(other).layers.items():
        module, sums = other.get_submodule(layer.experts), measured.sums(index)
        if kind != "constants":
            round_experts(module, sums, int(kind[-1]))
            continue
        constants = (sums.gate_sq_output / sums.gate_sq[:, None].clamp_min(1e-300)).float()
        module.register_forward_hook(
            lambda module, args, y, constants=constants: (constants[args[1]] * args[2][..., None]).sum(1)
        )
    kl = 0.0
    for batch in batches:
        before, after = (logits(each, batch.input_ids).log_softmax(-1) for each in (model, other))
        kl += float((before.exp() * (before - after)).sum())
    about = json.loads((measured.folder / "sensitivity.json").read_text())
    assert about["together"][kind] == pytest.approx(kl, rel=0.02)


def round_experts(module: torch.nn.Module, sums: Sums, bits: int) -> None:
    """Round every matrix, a row of one expert at a time; its width is one group. An expert has one bit more for four
    times the energy, from 2 to 8 of them.
    """
    experts = Experts(module)
    matrices = {name: stack.clone() for name, stack in experts.matrices().items()}
    energy = sums.gate_sq_norm_sq.tolist()
    levels = [math.log(max(each, 1e-4 * max(energy)), 4) for each in energy]
    of_each = [min(max(round(bits + level - sum(levels) / len(levels)), 2), 8) for level in levels]
    assert len(set(of_each)) > 1
    for name in experts.shape.matrices:
        for matrix, own in zip(matrices[name], of_each, strict=True):
            storage = Integers(bits=own, group=128, symmetric=False)
            for row in matrix:
                scale, zero = storage.fit(row[None, None], torch.ones(len(row)), torch.float32)
                code = storage.round(row[None, None], scale, zero)
                assert zero is not None
                row.copy_(((code.float() - zero.float()) * scale)[0, 0])
    with torch.no_grad():
        for name, tensor in experts.packed(matrices).items():
            getattr(module, name).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_rounded_experts_are_what_they_were_afterwards(dtype: torch.dtype, exact: bool, checkpoint: Get) -> None:
    """Numbers that bfloat16 holds are kept in it meanwhile, in half the memory of float32."""
    (layer, *_), model = anatomy_of(load(checkpoint("olmoe"))).layers.values(), load(checkpoint("olmoe")).to(dtype)
    module = model.get_submodule(layer.experts)
    if exact:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for name, numbers in before.items():
        kept = _kept(numbers)
        assert kept.dtype == (torch.bfloat16 if exact else dtype), name
        assert kept.data_ptr() != numbers.data_ptr()
    for wrong in (ValueError, None):
        with suppress(ValueError), _rounded(module, torch.full((layer.num_experts,), 3)):
            assert not any(torch.equal(found, before[name]) for name, found in module.named_parameters())
            if wrong:
                raise wrong
        assert all(torch.equal(found, before[name]) for name, found in module.named_parameters())


def test_weights_that_are_elsewhere_are_refused() -> None:
    module = tiny_model("olmoe").model.layers[0].mlp.experts.to("meta")
    with (
        pytest.raises(moetailor.CalibrationError, match="--stream in place of --device-map"),
        _rounded(module, torch.full((4,), 3)),
    ):
        pass


def test_sequences_are_from_everywhere_in_the_text() -> None:
    batches = token_batches(count=5)
    rows = [row.tolist() for batch in batches for row in batch.input_ids]
    for tokens, wanted in ((24, [0, 3]), (1, [0]), (1000, range(6))):
        sequences = evenly_spaced_sequences(batches, tokens)
        assert [batch.input_ids[0].tolist() for batch in sequences] == [rows[row] for row in wanted]
        assert all(len(part) == 1 for batch in sequences for part in (batch.input_ids, batch.document, batch.domain))


def test_how_many_sequences_does_not_hang_on_the_first_of_them() -> None:
    """100 of 1,010 tokens are a tenth of the sequences, whichever comes first."""
    short, long = moetailor.Batch.of(torch.ones(10, 1).long()), moetailor.Batch.of(torch.ones(10, 100).long())
    for batches in ([short, long], [long, short]):
        assert len(evenly_spaced_sequences(batches, 101)) == 2


def test_a_finished_folder_takes_sensitivities_later(checkpoint: Get, tmp_path: Path) -> None:
    plain = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches())
    assert plain.sensitivities() is None
    with pytest.raises(
        moetailor.PlanError, match=r"auto reads sensitivity, which .* does not hold; calibrate again with --sensitivity"
    ):
        moetailor.make_plan(plain, "auto", moetailor.Budget.parse(remove="25%"))
    before = {file.name: file.stat().st_mtime_ns for file in plain.folder.iterdir()}
    again = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches(), sensitivity=True)
    assert set(again.sensitivities() or {}) == set(again.layers)
    after = {file.name: file.stat().st_mtime_ns for file in plain.folder.iterdir()}
    assert set(after) - set(before) == {"sensitivity.json"}
    assert {name for name in before if before[name] != after[name]} == {"calibration.json"}
    about = json.loads((plain.folder / "sensitivity.json").read_text())
    assert about["tokens"] == sum(int(batch.counted.sum()) for batch in token_batches())


def test_tokens_that_do_not_count_are_in_neither_sum(checkpoint: Get, tmp_path: Path) -> None:
    ids = token_batches(1)[0].input_ids
    padded = torch.cat([ids, torch.full((len(ids), 5), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 5, dtype=torch.long)], 1)
    found = []
    for name, batch in (("plain", moetailor.Batch.of(ids)), ("padded", moetailor.Batch.of(padded, mask))):
        made = moetailor.calibrate(checkpoint("olmoe"), tmp_path / name, text=[batch], sensitivity=True)
        found.append(json.loads((made.folder / "sensitivity.json").read_text()))
    plain, padded = found
    assert padded["tokens"] == plain["tokens"] == ids.numel()
    for layer, kinds in plain["layers"].items():
        for kind, sums in kinds.items():
            assert padded["layers"][layer][kind] == pytest.approx(sums, rel=1e-2)


def test_states_on_disk_go_and_a_loss_that_balances_routers_is_not_asked_for(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    plain = moetailor.calibrate(model, tmp_path / "plain", text=token_batches(), sensitivity=True)
    model.config.output_router_logits = True
    made = moetailor.calibrate(model, tmp_path / "c", text=token_batches(), sensitivity=True, states="disk")
    assert made.sensitivities() == pytest.approx(plain.sensitivities(), rel=1e-4)
    assert model.config.output_router_logits is True
    assert not (tmp_path / "c" / "states").exists()


def test_logits_that_overflow_are_refused(tmp_path: Path) -> None:
    made = moetailor.calibrate(tiny_model("olmoe"), tmp_path / "c", text=token_batches())
    model = tiny_model("olmoe")
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(moetailor.CalibrationError, match=r"layer 0: .* not finite"):
        measure_sensitivities(made, ResidentModel(model), anatomy_of(model))
    assert made.sensitivities() is None
