"""The vllm-mone format: what vLLM 0.33 makes of it by its rules, and the same read again by our runtime."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moetailor
from moetailor.answers import Answer, Constant, Drop, Keep, Linear, Remap, Width
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.errors import CheckpointError
from moetailor.planning.layer_plan import LayerPlan
from moetailor.recovery.examples import ExampleOptions
from moetailor.transform.formats import FORMATS
from support.tiny import Get, GetCalibration, eager, families_in_turn, load, logits

FORMAT, VALUE = "vllm-mone", "approx_value"


def planned(calibration: moetailor.Calibration, remove: str = "25%") -> moetailor.Plan:
    return moetailor.make_plan(calibration, "mone", moetailor.Budget.parse(remove=remove))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def as_vllm_reads(folder: Path, experts: int) -> dict[int, dict[int, torch.Tensor]]:
    """Return the vector of each constant by layer and expert, or fail where vLLM's loading would.

    vLLM takes experts by the ids in config.json, and a vector by its name: the one number in the path before the
    expert's own is the layer. Ids are unique, of the layer, and not all of them; each has its vector, no other has one.
    """
    told = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in told
    wanted = {int(layer): ids for layer, ids in told["approximate_experts"].items()}
    assert all(len(set(ids)) == len(ids) < experts and {*ids} <= {*range(experts)} for ids in wanted.values())
    found: dict[int, dict[int, torch.Tensor]] = {layer: {} for layer in wanted}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(f".{VALUE}"):
            path, _, expert = name.removesuffix(f".{VALUE}").rpartition(".")
            (layer,) = (int(part) for part in path.split(".") if part.isdigit())
            found[layer][int(expert)] = tensor
    assert {layer: sorted(values) for layer, values in found.items()} == {n: sorted(ids) for n, ids in wanted.items()}
    return found


def put_in_place(model: nn.Module, values: dict[int, dict[int, torch.Tensor]]) -> None:
    """Have a model's experts give what vLLM's give: w_r E(x) for each kept slot of a token, w_r v for each constant."""
    for index, layer in discover(model.config, model).layers.items():
        module, constants = model.get_submodule(layer.experts), values.get(index, {})

        def forward(
            x_TD: torch.Tensor,
            ids_TK: torch.Tensor,
            gates_TK: torch.Tensor,
            *rest: object,
            run: object = module.forward,
            constants: dict[int, torch.Tensor] = constants,
        ) -> torch.Tensor:
            out_TD = torch.zeros_like(x_TD)
            for token, (ids, gates) in enumerate(zip(ids_TK.tolist(), gates_TK, strict=True)):
                for expert, gate in zip(ids, gates, strict=True):
                    one = x_TD[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1)
                    value = constants[expert].float() if expert in constants else run(*one, *rest)[0]
                    out_TD[token] += gate * value
            return out_TD

        module.forward = forward


@families_in_turn(0)
def test_vllm_gives_what_our_runtime_gives(
    name: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan, folder = planned(calibration(name)), checkpoint(name)
    given = {"calibration": calibration(name), "format": FORMAT}
    if fused := sorted(key for stack in Original(folder).stacks.values() for key in stack.fused):
        with pytest.raises(moetailor.PlanError) as refused:
            moetailor.apply(plan, folder, tmp_path / "out", **given)
        assert str(refused.value) == (
            f"format vllm-mone: vLLM reads experts one by one here, and {fused[0]!r} holds all of a layer's; use "
            "--format moetailor"
        )
        return
    out = moetailor.apply(plan, folder, tmp_path / "out", **given)
    slots = plan.model.stacks[0].num_experts
    values, original = as_vllm_reads(out, slots), tensors_of(folder)
    gone = {
        key
        for stack in Original(folder).stacks.values()
        for key, expert in stack.experts.items()
        if expert in values.get(stack.index, {})
    }
    stays = {key: tensor for key, tensor in tensors_of(out).items() if not key.endswith(VALUE)}
    assert stays.keys() == original.keys() - gone
    assert all(torch.equal(tensor.view(torch.uint8), original[key].view(torch.uint8)) for key, tensor in stays.items())
    assert open_checkpoint(out).nbytes == plan.nbytes

    served = load(folder)
    put_in_place(served, values)
    expected = logits(served)
    read = Original(out, takes="anything")
    torch.testing.assert_close(
        logits(eager(read.load(dtype=torch.float32, device="cpu"))), expected, rtol=1e-4, atol=1e-5
    )
    ours = moetailor.apply(plan, folder, tmp_path / "ours", calibration=calibration(name), verify=False)
    torch.testing.assert_close(logits(load(ours)), expected, rtol=1e-4, atol=1e-5)


def test_transformers_alone_does_not_load_it(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    given = {"calibration": calibration("olmoe"), "format": FORMAT}
    out = moetailor.apply(planned(calibration("olmoe")), checkpoint("olmoe"), tmp_path / "out", **given)
    with pytest.raises(Exception, match="ignore_mismatched_sizes"):
        load(out)


def behind(plan: moetailor.Plan, answer: Answer, **fields: object) -> moetailor.Plan:
    """Return a plan with an answer behind the first slot of its first layer."""
    (name, layer), *_ = plan.layers.items()
    return replace(plan, layers=plan.layers | {name: replace(layer, slots=(answer, *layer.slots[1:]), **fields)})


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Drop(), "dropped"),
        (Remap(1), "expert 1"),
        (Linear(2), "linear of rank 2"),
    ],
)
def test_other_answers_are_refused(answer: Answer, told: str, calibration: GetCalibration) -> None:
    plan = behind(planned(calibration("olmoe")), answer)
    reason = FORMATS[FORMAT].refusal(plan)
    assert reason is not None
    assert reason.startswith("holds kept experts and constants, and the router as it was; slot 0 of model.layers.0 is ")
    assert told in reason


def test_what_vllm_refuses_is_refused(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    plan = planned(calibration("olmoe"))
    refusal = FORMATS[FORMAT].refusal
    (name, layer), *_ = plan.layers.items()
    none = replace(plan, layers=plan.layers | {name: LayerPlan(slots=(Constant(),) * len(layer.slots))})
    assert refusal(none) == "holds at least one expert in each layer; model.layers.0 keeps none"
    few = replace(plan, layers=plan.layers | {name: layer.narrowed(Width(bits=4))})
    assert refusal(few) == (
        "holds experts as they lie, vLLM takes no quantized ones beside constants; model.layers.0 has 4 bits"
    )
    given = {"calibration": calibration("olmoe"), "format": FORMAT}
    dropped = moetailor.make_plan(calibration("olmoe"), "reap", moetailor.Budget.parse(keep=6))
    with pytest.raises(
        moetailor.PlanError, match=r"^format vllm-mone holds kept experts .*; format native can hold it$"
    ):
        moetailor.apply(dropped, checkpoint("olmoe"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    assert not FORMATS[FORMAT].automatic


@pytest.fixture
def written(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> Path:
    """A result in which one layer has nothing replaced."""
    plan = planned(calibration("olmoe"))
    name = list(plan.layers)[1]
    layers = {name: replace(plan.layers[name], slots=(Keep(),) * len(plan.layers[name].slots))}
    given = {"calibration": calibration("olmoe"), "format": FORMAT}
    return moetailor.apply(replace(plan, layers=plan.layers | layers), checkpoint("olmoe"), tmp_path / "out", **given)


def test_it_is_read_to_be_evaluated_and_for_nothing_else(checkpoint: Get, written: Path, tmp_path: Path) -> None:
    told = json.loads((written / "config.json").read_text())
    assert set(told["approximate_experts"]) == {"0"}
    model, original = (Original(source, takes="anything") for source in (written, checkpoint("olmoe")))
    assert model.written_here
    assert model.substituted
    assert not original.substituted
    with pytest.raises(CheckpointError, match=r"approximate_experts: experts are replaced already; give the original"):
        Original(written)
    text = ExampleOptions(data=(str(tmp_path / "none.jsonl"),))
    with pytest.raises(moetailor.MoetailorError, match=r"constants as vLLM's MoNE layout has them\), and only numbers"):
        moetailor.recover(written, tmp_path / "trained", examples=text, train=("router",), loss="task")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("lost", "layer 0: expert {} has no tensors"),
        ("unnamed", "layer 0: expert {} is not named a constant and has model.layers.0.mlp.experts.{}.approx_value"),
        ("short", "layer 0: constants have the shapes"),
    ],
)
def test_a_damaged_one_is_refused(change: str, told: str, written: Path) -> None:
    tensors, config = load_file(written / "model.safetensors"), json.loads((written / "config.json").read_text())
    first, *others = config["approximate_experts"]["0"]
    name = f"model.layers.0.mlp.experts.{first}.{VALUE}"
    if change == "lost":
        del tensors[name]
    if change == "unnamed":
        config["approximate_experts"]["0"] = others
    if change == "short":
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refused:
        Original(written, takes="anything")
    assert told.format(first, first) in str(refused.value)
    assert str(refused.value).endswith("the checkpoint is damaged: write it again")
