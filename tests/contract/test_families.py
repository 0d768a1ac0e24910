"""Every family: what design.md says holds by construction does hold."""

import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import Constant, Keep, Linear
from moetailor.answers.merged import clusters
from moetailor.calibration.layers import ResidentModel
from moetailor.calibration.statistics import Sums
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.anatomy import Anatomy, discover, tensors_of
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.layout import find_stacks
from moetailor.checkpoint.names import memory_names
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.planning.layer_plan import LayerPlan
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.reshape import LayerChange, reshape_model
from support import naive
from support.families import REFUSED, tiny_config, tiny_model
from support.tiny import (
    IDS,
    Get,
    GetCalibration,
    anatomy_of,
    eager,
    every_family,
    every_family_with,
    families_in_turn,
    load,
    logits,
    mixed_plan,
    stops_transformers_alone,
    token_batches,
)


def dropped_one(anatomy: Anatomy) -> dict[int, list[int]]:
    """Return one expert of each group, another one in each layer."""
    found = {}
    for layer in anatomy.layers.values():
        size = layer.num_experts // anatomy.groups.count
        found[layer.index] = [group * size + (layer.index + group) % size for group in range(anatomy.groups.count)]
    return found


@every_family
def test_tensors_on_disk_are_the_experts_in_memory(name: str, checkpoint: Get) -> None:
    opened = open_checkpoint(checkpoint(name))
    model = load(checkpoint(name))
    anatomy = anatomy_of(model)
    stacks = find_stacks(opened, anatomy, memory_names(opened, model))
    assert [stack.index for stack in stacks.values()] == sorted(anatomy.layers)
    for stack in stacks.values():
        layer = anatomy.layers[stack.index]
        tensors = tensors_of(model)
        in_memory = torch.zeros(layer.num_experts, dtype=torch.float64)
        for parameter in layer.expert_rows:
            in_memory += tensors[f"{layer.experts}.{parameter}"].detach().double().flatten(1).square().sum(1)
        on_disk = torch.zeros(layer.num_experts, dtype=torch.float64)
        for tensor, expert in stack.experts.items():
            on_disk[expert] += opened.tensors[tensor].read().double().square().sum()
        for tensor in stack.fused:
            on_disk += opened.tensors[tensor].read().double().flatten(1).square().sum(1)
        torch.testing.assert_close(on_disk, in_memory, rtol=1e-9, atol=0)
        assert stack.expert_bytes * stack.num_experts == sum(
            tensors[f"{layer.experts}.{parameter}"].nbytes for parameter in layer.expert_rows
        )


@families_in_turn(0)
def test_experts_read_one_by_one_are_those_of_the_layer(name: str, checkpoint: Get) -> None:
    naive.assert_read_alike(checkpoint(name))


@every_family
def test_an_identity_map_changes_no_bit(name: str) -> None:
    model = eager(tiny_model(name))
    before = logits(model)
    anatomy = anatomy_of(model)
    changes = {}
    for index, layer in anatomy.layers.items():
        everything = range(layer.num_experts)
        kept = LayerPlan(slots=tuple(Keep() for number in everything))
        changes[index] = LayerChange(experts=everything, slots=everything, slot_map=kept.slot_map())
    reshape_model(model, anatomy, changes)
    assert sum(isinstance(module, CompressedExperts) for module in model.modules()) == len(changes)
    assert torch.equal(logits(model), before)


@every_family
def test_walking_layer_by_layer_is_the_models_own_forward(name: str) -> None:
    model = eager(tiny_model(name))
    batches = token_batches()
    walk = Walk(ResidentModel(model), batches)
    stream = walk.begin()
    for _ in walk.layers():
        walk.advance(stream)
    last = next(module for path, module in model.named_modules() if path.endswith(f".layers.{stream.layer - 1}"))
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for batch in batches:
        logits(model, batch.input_ids)
    hook.remove()
    assert len(seen) == len(batches)
    assert all(torch.equal(stream[number], theirs) for number, theirs in enumerate(seen))


@every_family
def test_statistics_equal_a_loop_over_tokens(name: str, checkpoint: Get, calibration: GetCalibration) -> None:
    model = load(checkpoint(name))
    anatomy = anatomy_of(model)
    for index, layer in anatomy.layers.items():
        measured = calibration(name).sums(index)
        expected = naive.sums(model, layer, token_batches(), anatomy.probabilities)
        expected |= {"gated_norm_shift": naive.shifted(model, layer, token_batches())}
        for field in fields(Sums):
            torch.testing.assert_close(
                getattr(measured, field.name),
                expected[field.name].double(),
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, field=field: f"{field.name}: {text}",
            )


@families_in_turn(1)
def test_router_probabilities_choose_as_the_router_did(name: str, checkpoint: Get) -> None:
    """The gate of a token is its probability, up to one factor a token: the proof of the table of sigmoids."""
    model = load(checkpoint(name))
    anatomy = anatomy_of(model)
    for layer in anatomy.layers.values():
        seen = naive.run_recorded(model, layer, IDS)
        values = seen["logits"].double()
        values = values.sigmoid() if anatomy.probabilities == "sigmoid" else values.softmax(-1)
        ratio = seen["gate"].double() / values.gather(1, seen["index"])
        if name != "phimoe":  # its sparse mixer weights each choice by a softmax of its own
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)


@every_family
def test_dropping_is_masking(name: str) -> None:
    model, dropped_model = eager(tiny_model(name)), eager(tiny_model(name))
    anatomy = anatomy_of(model)
    dropped = dropped_one(anatomy)
    changes = {}
    for index, layer in anatomy.layers.items():
        left = [slot for slot in range(layer.num_experts) if slot not in dropped[index]]
        changes[index] = LayerChange(experts=left, slots=left)
    reshape_model(dropped_model, anatomy, changes)
    after = logits(dropped_model)
    with naive.masked(model, anatomy.layers.values(), dropped):
        expected = logits(model)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_streamed_calibration_is_that_in_memory(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    resident = calibration(name)
    streamed = moetailor.calibrate(
        checkpoint(name), tmp_path / "streamed", text=token_batches(), residual=True, sensitivity=True, stream=True
    )
    assert streamed.sensitivities() == pytest.approx(resident.sensitivities(), rel=1e-3)
    assert streamed.fingerprint == resident.fingerprint
    assert streamed.layers == resident.layers
    for layer in resident.layers:
        for read in ("sums", "sample"):
            one, other = getattr(resident, read)(layer), getattr(streamed, read)(layer)
            for field in fields(one):
                torch.testing.assert_close(
                    getattr(one, field.name), getattr(other, field.name), rtol=1e-5, atol=1e-6, msg=field.name
                )


@every_family_with("drop", False, True, ids=["slots-kept", "slots-dropped"])
def test_the_moetailor_format_round_trips(
    name: str, drop: bool, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = mixed_plan(calibration(name), drop)
    if drop and plan.model.groups.count > 1:
        plan = mixed_plan(calibration(name), False)
    moetailor.apply(plan, checkpoint(name), tmp_path / "out", calibration=calibration(name))
    assert open_checkpoint(tmp_path / "out").nbytes == plan.nbytes
    from_disk = load(tmp_path / "out")
    in_memory = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    expected = logits(in_memory)
    torch.testing.assert_close(logits(from_disk), expected, rtol=1e-5, atol=1e-5)
    for implementation in ("grouped_mm", "batched_mm"):
        from_disk.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(from_disk), expected, rtol=1e-4, atol=1e-4)
    with quiet_transformers():
        eager(from_disk).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(expected).all()
    with quiet_transformers():
        in_memory.save_pretrained(tmp_path / "memory")
    assert all(stops_transformers_alone(tmp_path / folder) for folder in ("out", "again", "memory"))


@families_in_turn(0)
def test_stand_ins_and_remaps_are_what_they_say(name: str, checkpoint: Get, calibration: GetCalibration) -> None:
    """The output of a compressed layer is the sum over slots of gate x what the plan put behind the slot."""
    plan = mixed_plan(calibration(name), False)
    original = load(checkpoint(name))
    layer = next(iter(anatomy_of(original).layers.values()))
    sums = calibration(name).sums(layer.index)
    constant = (sums.gate_sq_output / sums.gate_sq.clamp_min(1e-300)[:, None]).float()
    compressed = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    seen = naive.run_recorded(compressed, layer, IDS)
    slots, experts = plan.by_layer[layer.index].slots, compressed.get_submodule(layer.experts)
    expected = torch.zeros(len(seen["hidden"]), layer.width)
    for token, (chosen, gates) in enumerate(zip(seen["index"].tolist(), seen["gate"].tolist(), strict=True)):
        for number, gate in zip(chosen, gates, strict=True):
            answer = slots[number]
            if isinstance(answer, Constant):
                expected[token] += gate * constant[number]
            elif isinstance(answer, Linear):
                inner, outer = experts.linear_in @ seen["hidden"][token], experts.linear_out
                expected[token] += gate * (experts.linear_constant[0] + inner @ outer)
            else:
                y = naive.expert_output(original, layer, answer.expert(number), seen["hidden"][token])
                expected[token] += gate * answer.scale * y
    with torch.no_grad():
        got = compressed.get_submodule(layer.experts)(seen["hidden"], seen["index"], seen["gate"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@every_family_with("method", "hc_smoe", "ream", ids=["slots-kept", "slots-dropped"])
def test_merged_experts_round_trip(
    name: str, method: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    facts = calibration(name).model
    keep = facts.stacks[0].num_experts - facts.groups.count
    plan = moetailor.make_plan(calibration(name), method, moetailor.Budget.parse(keep=keep))
    assert all(layer.rebuilt for layer in plan.layers.values())
    assert plan.native == (method == "ream")
    moetailor.apply(plan, checkpoint(name), tmp_path / "out", calibration=calibration(name), verify=False)
    assert open_checkpoint(tmp_path / "out").nbytes == plan.nbytes
    in_memory = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    expected = logits(in_memory)
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    # The merged expert is what it says: the average of its members, which the original's modules still hold.
    original = load(checkpoint(name))
    layer = next(iter(anatomy_of(original).layers.values()))
    layer_plan = plan.by_layer[layer.index]
    centre, members = next(iter(clusters(layer_plan.slots).items()))
    before, after = (Experts(model.get_submodule(layer.experts)) for model in (original, in_memory))
    if method == "hc_smoe":
        count = calibration(name).sums(layer.index).count[members].float()
        share = count / count.sum() if count.sum() else torch.full_like(count, 1 / len(members))
        for part, stack in before.matrices(members).items():
            mean = (share.view(-1, *[1] * (stack.dim() - 1)) * stack).sum(0)
            torch.testing.assert_close(after.expert(layer_plan.pool.index(centre))[part], mean, rtol=1e-4, atol=1e-5)


@every_family
def test_an_expert_is_its_matrices(name: str, checkpoint: Get) -> None:
    """What moetailor computes from an expert's matrices is what the family's own module gives."""
    model = load(checkpoint(name))
    layer = next(iter(anatomy_of(model).layers.values()))
    experts, module = Experts(model.get_submodule(layer.experts)), model.get_submodule(layer.experts)
    width = module.down_proj.shape[-1 if experts.transposed else -2]
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    for number in (0, layer.num_experts - 1):
        with torch.no_grad():
            expected = module(x, torch.full((5, 1), number), torch.ones(5, 1))
        torch.testing.assert_close(experts.outputs(number, x), expected, rtol=1e-5, atol=1e-6)
    packed = experts.packed(experts.matrices())
    assert sorted(packed) == sorted(layer.expert_rows)
    assert all(torch.equal(tensor, getattr(module, part)) for part, tensor in packed.items())


@families_in_turn(1)
def test_native_drops_load_in_stock_transformers(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    facts = calibration(name).model
    keep = facts.stacks[0].num_experts - facts.groups.count
    plan = moetailor.make_plan(calibration(name), "reap", moetailor.Budget.parse(keep=keep))
    assert plan.native
    moetailor.apply(plan, checkpoint(name), tmp_path / "out", verify=False)
    assert "quantization_config" not in open_checkpoint(tmp_path / "out").config
    assert open_checkpoint(tmp_path / "out").nbytes == plan.nbytes
    in_memory = eager(moetailor.apply(plan, load(checkpoint(name))))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(in_memory), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_families_are_named_with_the_reason(name: str) -> None:
    config = tiny_config(name)
    with pytest.raises(moetailor.CheckpointError, match=config.model_type):
        discover(config)


@families_in_turn(2)
def test_dtypes_are_those_of_transformers_and_correction_biases_stay_wide(name: str, checkpoint: Get) -> None:
    """Some families round correction biases, most do not: a router must choose as it does from the numbers on disk."""
    folder = checkpoint(name)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    original = Original(folder)
    streamed = original.streamed(dtype=torch.bfloat16)
    biases = {layer.correction for layer in original.anatomy.layers.values() if layer.correction}
    expected = {
        key: torch.float32 if key in biases else tensor.dtype
        for key, tensor in tensors_of(whole).items()
        if key in streamed.names.values()
    }
    for model in (streamed.model, original.load(dtype=torch.bfloat16, device="cpu")):
        assert {key: tensors_of(model)[key].dtype for key in expected} == expected
