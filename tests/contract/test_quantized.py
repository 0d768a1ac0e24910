"""Quantized originals of every layout: each does what the plain checkpoint of its numbers does, and keeps its codes."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import moetailor
from moetailor.answers import WHOLE, Width
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import PlanError
from moetailor.planning.plan import Plan
from moetailor.summary import summarise
from support import naive
from support.quantized import LAYOUTS, fp8, write_source
from support.tiny import anatomy_of, eager, load, logits, token_batches
from support.training import blocks

every_layout = pytest.mark.parametrize("name", sorted(LAYOUTS))
# What stock transformers loads on a CPU. It cannot read GPTQ and AWQ there, drops zero points and the scales of whole
# matrices of fused experts, and the library behind it no longer knows orders of groups.
STOCK = ["fp8-blocks", "fp8-blocks-qwen3", "fp8-rows", "mxfp4", "w4a16", "w8a16"]


@dataclass
class Made:
    """A source and its twin, each calibrated."""

    source: Path
    twin: Path
    measured: moetailor.Calibration
    of_twin: moetailor.Calibration

    def plan(self, method: str, of_twin: bool = False, **budget: Any) -> Plan:
        """Return a plan, which keeps all but one expert of each group where no budget is given."""
        facts = self.measured.model
        budget = budget or {"keep": facts.stacks[0].num_experts - facts.groups.count}
        parameters = {"rank": 1} if method == "linear" else {}
        calibration = self.of_twin if of_twin else self.measured
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return moetailor.make_plan(calibration, method, moetailor.Budget.parse(**budget), parameters=parameters)

    def applied(self, plan: Plan, out: Path, of_twin: bool = False) -> Path:
        source, calibration = (self.twin, self.of_twin) if of_twin else (self.source, self.measured)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return moetailor.apply(plan, source, out, calibration=calibration, verify=False)


Get = Callable[[str], Made]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Return a layout's source and twin, made on first use."""
    there: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in there:
            folder = tmp_path_factory.mktemp(name)
            source, twin = write_source(LAYOUTS[name], folder)
            calibrations = [
                moetailor.calibrate(of, folder / f"c-{of.name}", text=token_batches()) for of in (source, twin)
            ]
            there[name] = Made(source, twin, *calibrations)
        return there[name]

    return get


def stock(folder: Path, dequantize: bool = True) -> torch.nn.Module:
    """Load a checkpoint as transformers alone does, in bfloat16, with activations as they are."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    ct = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if method == "compressed-tensors" else {}
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **ct)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return eager(model.eval())


def in_memory(folder: Path) -> torch.nn.Module:
    return eager(Original(folder).load(dtype=torch.float32, device="cpu"))


def dropped_by(plan: Plan, anatomy: Anatomy) -> dict[int, list[int]]:
    every = {index: range(layer.num_experts) for index, layer in anatomy.layers.items()}
    return {index: [slot for slot in every[index] if slot not in plan.by_layer[index].kept_slots] for index in every}


def expert_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of experts as they lie, as bytes."""
    tensors = load_file(folder / "model.safetensors").items()
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors if ".experts." in name}


def check_codes(plan: Plan, source: Path, out: Path) -> None:
    """Check that experts that stay as they lay have their bytes, under their new numbers, and no other is there."""
    before, after, expected = expert_parts(source), expert_parts(out), {}
    for prefix, layer in plan.layers.items():
        for name, tensor in before.items():
            if not name.startswith(f"{prefix}.") or not layer.plain:
                continue
            if (match := re.search(r"\.experts\.(\d+)\.", name)) is None:
                expected[name] = tensor[layer.plain]
            elif int(match[1]) in layer.plain:
                place = layer.plain.index(int(match[1]))
                expected[name.replace(match[0], f".experts.{place}.")] = tensor
    own = {name for name in after if re.search(r"experts\.(constant|linear|packed)", name)}
    assert after.keys() - own == expected.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["fp8-blocks", "w4a16", "awq"])
def test_codes_beside_experts_are_not_given_the_scheme_of_experts(name: str, made: Get, tmp_path: Path) -> None:
    """Attention in FP8 would else be read as numbers without scales."""
    plan = moetailor.make_plan(made(name).measured, "quantize", moetailor.Budget.parse(remove="0%"))
    with pytest.raises(PlanError, match=r"lies as codes too .*--format moetailor"):
        moetailor.apply(
            plan, made(name).source, tmp_path / "out", calibration=made(name).measured, format="compressed-tensors"
        )
    assert not list(tmp_path.iterdir())


@every_layout
def test_experts_read_one_by_one_are_those_of_the_layer(name: str, made: Get) -> None:
    naive.assert_read_alike(made(name).source)


@every_layout
def test_each_weight_reads_as_its_numbers(name: str, made: Get) -> None:
    source, twin = Original(made(name).source).checkpoint, open_checkpoint(made(name).twin)
    assert source.numbers.keys() == twin.tensors.keys()
    assert len(source.coded) > 3
    for key, info in twin.tensors.items():
        expected, found = info.read(), source.numbers[key].read()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), key


@every_layout
def test_it_is_inspected(name: str, made: Get) -> None:
    source, twin = summarise(made(name).source), summarise(made(name).twin)
    assert source.lies == LAYOUTS[name].label
    assert (source.parameters, source.routed_parameters) == (twin.parameters, twin.routed_parameters)
    tensors = load_file(made(name).source / "model.safetensors")
    assert source.nbytes == sum(tensor.nbytes for tensor in tensors.values()) < twin.nbytes
    layer = source.moe[0]
    fused = [t.nbytes // layer.experts for n, t in tensors.items() if f"layers.{layer.layer}.mlp.experts.gate_up" in n]
    fused += [t.nbytes // layer.experts for n, t in tensors.items() if f"layers.{layer.layer}.mlp.experts.down_" in n]
    alone = [t.nbytes for n, t in tensors.items() if re.search(rf"layers\.{layer.layer}\..*experts\.0\.", n)]
    assert layer.expert_bytes == sum(fused or alone)
    assert made(name).measured.model.stacks[0].expert_bytes == layer.expert_bytes


@every_layout
def test_calibration_is_that_of_the_numbers_streamed_and_in_memory(name: str, made: Get, tmp_path: Path) -> None:
    streamed = moetailor.calibrate(made(name).source, tmp_path / "streamed", text=token_batches(), stream=True)
    assert streamed.hashes == made(name).measured.hashes == made(name).of_twin.hashes


@every_layout
def test_drops_keep_codes_and_the_form_of_the_original(name: str, made: Get, tmp_path: Path) -> None:
    plan = made(name).plan("reap")
    assert plan.native
    out = made(name).applied(plan, tmp_path / "out")
    assert open_checkpoint(out).nbytes == plan.nbytes
    check_codes(plan, made(name).source, out)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made(name).source, out))
    assert after["quantization_config"] == before["quantization_config"] == LAYOUTS[name].entry
    model = in_memory(made(name).source)
    anatomy = anatomy_of(model)
    with naive.masked(model, anatomy.layers.values(), dropped_by(plan, anatomy)):
        expected = logits(model)
    torch.testing.assert_close(logits(in_memory(out)), expected, rtol=1e-5, atol=1e-5)


LAYOUT_AND_FAMILY = [
    pytest.param(layout, family, marks=() if (number + turn) % 2 else pytest.mark.slow)
    for number, layout in enumerate(["fp8-blocks", "fp8-rows", "w4a16", "w8a16", "gptq", "awq"])
    for turn, family in enumerate(["deepseek_v3", "glm4_moe", "mixtral", "qwen3_moe"])
]


@pytest.mark.parametrize(("name", "family"), LAYOUT_AND_FAMILY)
def test_families_do_not_matter(name: str, family: str, tmp_path: Path) -> None:
    """Groups, shared experts, dense first layers, other names of matrices: streamed as in memory, dropped as masked."""
    source, twin = write_source(replace(LAYOUTS[name], family=family), tmp_path)
    folders = [tmp_path / "memory", tmp_path / "streamed", tmp_path / "numbers"]
    measured = moetailor.calibrate(source, folders[0], text=token_batches())
    assert measured.hashes == moetailor.calibrate(source, folders[1], text=token_batches(), stream=True).hashes
    assert measured.hashes == moetailor.calibrate(twin, folders[2], text=token_batches()).hashes
    plan = Made(source, twin, measured, measured).plan("reap")
    out = moetailor.apply(plan, source, tmp_path / "out")
    check_codes(plan, source, out)
    model = in_memory(source)
    anatomy = anatomy_of(model)
    with naive.masked(model, anatomy.layers.values(), dropped_by(plan, anatomy)):
        expected = logits(model)
    torch.testing.assert_close(logits(in_memory(out)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STOCK)
def test_transformers_alone_loads_drops(name: str, made: Get, tmp_path: Path) -> None:
    if name == "fp8-rows" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers gives other numbers for FP8 by row before 5.23")
    plan = made(name).plan("reap")
    out = made(name).applied(plan, tmp_path / "out")
    model, anatomy = stock(made(name).source), anatomy_of(load(made(name).twin))
    ours = eager(Original(made(name).source).load(dtype=torch.bfloat16, device="cpu"))
    assert torch.equal(logits(model), logits(ours))
    with naive.masked(model, anatomy.layers.values(), dropped_by(plan, anatomy)):
        expected = logits(model)
    torch.testing.assert_close(logits(stock(out)), expected, rtol=2e-2, atol=2e-2)


@every_layout
def test_headers_alone_say_what_the_whole_says(name: str, tmp_path: Path) -> None:
    """As of a model on the hub: numbers are holes."""
    source, _ = write_source(LAYOUTS[name], tmp_path)
    whole, file = summarise(source).to_json(), source / "model.safetensors"
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, 8 + header)
    os.truncate(file, size)
    assert summarise(source).to_json() == whole


ONE_SCALE = fp8((0, 0), "weight_scale", torch.float32, 0)
FP8 = {
    "one scale for a matrix": ({"activation_scheme": "dynamic"}, fp8((0, 0), "weight_scale_inv", torch.float32, 0)),
    "which other tools call so": ({"activation_scheme": "static"}, ONE_SCALE),
    "blocks, as MiniMax-M2 says": ({"fmt": "float8_e4m3fn", "weight_block_size": [8, 8]}, None),
}


@pytest.mark.parametrize(("entry", "quantize"), FP8.values(), ids=FP8)
def test_fp8_has_other_spellings(entry: dict[str, Any], quantize: Any, tmp_path: Path) -> None:
    layout = LAYOUTS["fp8-blocks-qwen3"]
    layout = replace(layout, entry={"quant_method": "fp8"} | entry, quantize=quantize or layout.quantize)
    source, twin = write_source(layout, tmp_path)
    assert torch.equal(logits(in_memory(source)), logits(in_memory(twin)))
    streamed = [
        moetailor.calibrate(folder, tmp_path / f"c-{folder.name}", text=token_batches(), stream=True)
        for folder in (source, twin)
    ]
    assert streamed[0].hashes == streamed[1].hashes
    made = Made(source, twin, *streamed)
    beside, plain = (
        made.applied(made.plan("mone", of_twin), tmp_path / f"{of_twin}", of_twin) for of_twin in (False, True)
    )
    torch.testing.assert_close(logits(load(beside)), logits(load(plain)), rtol=1e-4, atol=1e-4)


BESIDE = [(name, method) for name in sorted(LAYOUTS) for method in ("mone", "hc_smoe")]


@pytest.mark.parametrize(("name", "method"), [*BESIDE, ("mxfp4", "refit"), ("fp8-rows", "refit"), ("awq", "linear")])
def test_stand_ins_and_merges_lie_beside_codes(name: str, method: str, made: Get, tmp_path: Path) -> None:
    plan, of_twin = made(name).plan(method), made(name).plan(method, of_twin=True)
    assert [layer.slots for layer in plan.layers.values()] == [layer.slots for layer in of_twin.layers.values()]
    for layer in plan.layers.values():
        assert layer.widths == dict.fromkeys(layer.rebuilt, WHOLE)
        assert bool(layer.rebuilt) == (method in ("hc_smoe", "refit"))
    out = made(name).applied(plan, tmp_path / "out")
    assert open_checkpoint(out).nbytes == plan.nbytes <= of_twin.nbytes
    check_codes(plan, made(name).source, out)
    expected = logits(load(made(name).applied(of_twin, tmp_path / "twin", of_twin=True)))
    model = load(out)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    # What was loaded are numbers, and so is what is saved of it.
    with quiet_transformers():
        model.save_pretrained(tmp_path / "again")
    assert "source" not in json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=1e-4, atol=1e-4)
    assert summarise(out).parameters == summarise(tmp_path / "twin").parameters


@pytest.mark.parametrize("name", ["fp8-blocks-qwen3", "gptq", "mxfp4"])
@pytest.mark.parametrize("method", ["reap", "mone", "hc_smoe", "refit"])
def test_a_size_is_not_exceeded(name: str, method: str, made: Get) -> None:
    """Merged and fitted experts take more than those that stay: how many is not known before they are chosen."""
    size = made(name).measured.model.nbytes - 1
    plan = made(name).plan(method, size=size)
    assert plan.layers
    assert plan.nbytes <= size


@pytest.mark.parametrize("name", ["fp8-blocks-qwen3", "mxfp4"])
def test_merges_that_make_it_larger_are_said(name: str, made: Get) -> None:
    facts = made(name).measured.model
    said = (
        f"the original {facts.nbytes:,}: what is computed anew lies in 16 bits, other experts are {LAYOUTS[name].label}"
    )
    budget = moetailor.Budget.parse(keep=facts.stacks[0].num_experts - 1)
    with pytest.warns(moetailor.MoetailorWarning, match=said):
        plan = moetailor.make_plan(made(name).measured, "refit", budget)
    assert plan.nbytes > facts.nbytes


@pytest.mark.parametrize("name", ["fp8-blocks-qwen3", "w4a16", "gptq"])
def test_a_plan_for_the_numbers_fits_the_codes(name: str, made: Get, tmp_path: Path) -> None:
    plan = made(name).plan("hc_smoe", of_twin=True)
    assert not any(layer.widths for layer in plan.layers.values())
    measured = made(name).of_twin
    out = moetailor.apply(plan, made(name).source, tmp_path / "out", calibration=measured, allow_other_weights=True)
    expected = moetailor.apply(plan, made(name).twin, tmp_path / "twin", calibration=measured)
    torch.testing.assert_close(logits(load(out)), logits(load(expected)), rtol=1e-4, atol=1e-4)
    check_codes(Plan.load(out / "moetailor_plan.json"), made(name).source, out)


def test_experts_that_stay_may_be_rounded_to_few_bits(made: Get, tmp_path: Path) -> None:
    """They are rounded from their numbers: the result is that of the twin, experts or not."""
    budget = moetailor.Budget.parse(keep=9)
    plans = [
        moetailor.make_plan(of, "mone", budget, width=Width(bits=4))
        for of in (made("fp8-rows").measured, made("fp8-rows").of_twin)
    ]
    out = made("fp8-rows").applied(plans[0], tmp_path / "out")
    expected = made("fp8-rows").applied(plans[1], tmp_path / "twin", of_twin=True)
    assert plans[0].nbytes < plans[1].nbytes
    torch.testing.assert_close(logits(load(out)), logits(load(expected)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8-blocks-qwen3", "w4a16", "mxfp4"])
def test_a_result_that_lost_its_scales_does_not_load(name: str, made: Get, tmp_path: Path) -> None:
    out = made(name).applied(made(name).plan("mone"), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    scales = [key for key in tensors if ".experts." in key and "scale" in key]
    save_file({key: tensor for key, tensor in tensors.items() if key not in scales}, out / "model.safetensors")
    with pytest.raises(RuntimeError, match="issues during automatic conversion"), quiet_transformers():
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(moetailor.CheckpointError, match="is missing; the checkpoint is damaged or incomplete"):
        summarise(out)


def test_layers_that_do_not_run_are_cut_too(made: Get, tmp_path: Path) -> None:
    """Multi-token prediction: the experts with the largest weights stay there, codes and scales."""
    folder = shutil.copytree(made("fp8-blocks").source, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    begin, end = "model.layers.2.mlp.", "model.layers.3.mlp."
    more = {key.replace(begin, end): tensor.clone() for key, tensor in tensors.items() if key.startswith(begin)}
    for key, tensor in more.items():
        if match := re.search(r"experts\.(\d+)\..*scale_inv", key):
            tensor.fill_(1.0 + int(match[1]))
        elif ".experts." in key:
            tensor.copy_(torch.ones(tensor.shape).to(tensor.dtype))
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    measured = moetailor.calibrate(folder, tmp_path / "c", text=token_batches())
    plan = moetailor.make_plan(measured, "reap", moetailor.Budget.parse(keep=9))
    after = load_file(moetailor.apply(plan, folder, tmp_path / "out") / "model.safetensors")
    scales = [float(after[f"{end}experts.{n}.up_proj.weight_scale_inv"][0, 0]) for n in range(9)]
    # Three groups of four experts, of which the first, whose scales are the smallest, goes.
    assert scales == [2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 10.0, 11.0, 12.0]
    assert f"{end}experts.9.up_proj.weight" not in after


def test_what_lies_as_codes_is_not_trained(made: Get, tmp_path: Path) -> None:
    with pytest.raises(
        moetailor.MoetailorError, match=r"weights lie as codes \(FP8 by row\), and only numbers are trained"
    ):
        moetailor.recover(made("fp8-rows").source, tmp_path / "out", examples=blocks(), loss="task")


def test_memory_is_up_to_the_engine(made: Get) -> None:
    with pytest.raises(moetailor.PlanError, match="--memory: experts are MXFP4, and what they take in memory is up to"):
        made("mxfp4").plan("mone", memory="1MB")
