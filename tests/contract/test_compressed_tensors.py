"""The compressed-tensors format: every expert in 4 or 8 bits, as stock transformers and that library read it."""

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moetailor
from moetailor.answers import Width
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError
from moetailor.summary import summarise
from moetailor.transform.formats import FORMATS
from support.families import tiny_model
from support.reference import REFERENCE
from support.tiny import IDS, Get, GetCalibration, anatomy_of, eager, every_family_with, load, logits, token_batches

FORMAT = "compressed-tensors"
# transformers has all experts of a layer in one tensor, on disk too.
FUSED = {
    *("aria_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    "minimax_m3_vl_text",
}
# transformers merges other weights of these families, which it then loses where experts are packed.
MERGING = {"bailing_hybrid", "kimi_linear"}


def planned(
    calibration: moetailor.Calibration, bits: int = 4, codes: str = "int", remove: str | None = None
) -> moetailor.Plan:
    """Return a plan in groups that divide both widths of the experts."""
    shape = calibration.model.stacks[0].shape
    assert shape is not None
    group = Width.group if codes == "fp8" else math.gcd(shape.width, shape.intermediate, 16)
    width = Width(bits=bits, group=group, codes=codes)
    if remove:
        return moetailor.make_plan(calibration, "reap", moetailor.Budget.parse(remove=remove), width=width)
    given = {"bits": bits, "group": width.group, "codes": codes}
    return moetailor.make_plan(calibration, "quantize", moetailor.Budget.parse(remove=0), parameters=given)


def with_widths(plan: moetailor.Plan, *widths: dict) -> moetailor.Plan:
    """Return a plan whose first layers have other widths, a change of what they have each."""
    layers = dict(plan.layers)
    for (name, layer), change in zip(plan.layers.items(), widths, strict=False):
        layers[name] = replace(layer, widths={expert: replace(w, **change) for expert, w in layer.widths.items()})
    return replace(plan, layers=layers)


def ours(plan: moetailor.Plan, folder: Path, calibration: moetailor.Calibration) -> torch.Tensor:
    """Return the logits of our own runtime on the same codes."""
    return logits(eager(moetailor.apply(plan, load(folder), calibration=calibration)))


def greedy(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=16, min_new_tokens=16, do_sample=False)[:, IDS.shape[1] :]


@every_family_with("width", (4, "int"), (8, "fp8"), ids=["int4", "fp8"])
def test_stock_transformers_gives_what_our_runtime_gives(
    name: str, width: tuple[int, str], checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    bits, codes = width
    plan, folder = planned(calibration(name), bits, codes), checkpoint(name)
    if name in FUSED:
        with pytest.raises(moetailor.PlanError) as refused:
            moetailor.apply(plan, folder, tmp_path / "out", calibration=calibration(name), format=FORMAT)
        assert "biases" in str(refused.value) or "transformers has all of a layer's in" in str(refused.value)
        assert str(refused.value).endswith("format moetailor can hold it")
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", moetailor.MoetailorWarning)
        out = moetailor.apply(plan, folder, tmp_path / "out", calibration=calibration(name), format=FORMAT)
    lost = name in MERGING and codes == "int"
    assert lost == any("beside packed experts it loses" in str(one.message) for one in said)
    if lost:
        with pytest.raises(RuntimeError, match="issues during automatic conversion"):
            load(out)
    model = eager(Original(out).load(dtype=torch.float32, device="cpu")) if lost else load(out)
    torch.testing.assert_close(logits(model), ours(plan, folder, calibration(name)), rtol=1e-5, atol=1e-5)
    shapes = sum(len(layer.pool) for layer in plan.by_layer.values()) * len(plan.model.stacks[0].shape.matrices) * 16
    assert open_checkpoint(out).nbytes == plan.nbytes + shapes * (codes == "int")


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize(("bits", "remove"), [(4, None), (8, None), (4, "25%")])
def test_greedy_tokens_and_counts(
    name: str, bits: int, remove: str | None, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    measured, folder = calibration(name), checkpoint(name)
    plan = planned(measured, bits, remove=remove)
    out = moetailor.apply(plan, folder, tmp_path / "out", calibration=measured, format=FORMAT)
    model = load(out)
    in_memory = eager(moetailor.apply(plan, load(folder), calibration=measured))
    torch.testing.assert_close(logits(model), logits(in_memory), rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy(model), greedy(in_memory))
    kept = {len(layer.pool) for layer in plan.layers.values()}
    assert kept == {model.config.num_experts}
    assert (remove is None) == (kept == {plan.model.stacks[0].num_experts})
    assert getattr(model.config, "quantization_config", None) is None


def by_library(folder: Path) -> dict[str, torch.Tensor]:
    """Return every packed weight as compressed-tensors decodes it by config.json."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors, found = load_file(folder / "model.safetensors"), {}
    for key in tensors:
        if key.endswith(".weight_packed"):
            module = key.removesuffix(".weight_packed")
            (scheme,) = (s for s in config.config_groups.values() if match_name(module, s.targets[0]))
            parts = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
            found[module] = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
    return found


@pytest.mark.parametrize("kind", ["int", "uint"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_arrives(bits: int, kind: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    """Read by the library; one weight also word by word: (code - zero point) x scale, codes from the lowest bit up."""
    measured = calibration("qwen3_moe")
    plan = planned(measured, bits, kind, remove="25%")
    out = moetailor.apply(plan, checkpoint("qwen3_moe"), tmp_path / "out", calibration=measured, format=FORMAT)
    model = eager(moetailor.apply(plan, load(checkpoint("qwen3_moe")), calibration=measured))
    decoded, seen = by_library(out), 0
    for index, layer in anatomy_of(load(checkpoint("qwen3_moe"))).layers.items():
        module, (width,) = model.get_submodule(layer.experts), plan.by_layer[index].packed
        for name in ("gate", "up", "down"):
            for row, weight in enumerate(module.tensor(f"{width.stem}_{name}")):
                assert torch.equal(decoded[f"{layer.experts}.{row}.{name}_proj"], weight)
                seen += 1
    assert seen == len(decoded)

    tensors = load_file(out / "model.safetensors")
    module = next(iter(decoded))
    codes, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    each, half, size = 32 // bits, 2 ** (bits - 1), decoded[module].shape[1] // scale.shape[1]
    assert tensors[f"{module}.weight_shape"].tolist() == list(decoded[module].shape)
    for row, column in ((0, 0), (3, 9), (decoded[module].shape[0] - 1, decoded[module].shape[1] - 1)):
        code = (int(codes[row, column // each]) >> bits * (column % each)) % 2**bits - half
        zero = 0
        if kind == "uint":
            word = int(tensors[f"{module}.weight_zero_point"][row // each, column // size])
            zero = (word >> bits * (row % each)) % 2**bits - half
        assert float(decoded[module][row, column]) == pytest.approx(
            (code - zero) * float(scale[row, column // size]), rel=1e-6
        )
    assert (kind == "int") == (f"{module}.weight_zero_point" not in tensors)


def test_every_float_arrives(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    """Each weight is the float next to w 448 / (the largest of its row), times that scale again; the library agrees."""
    measured = calibration("qwen3_moe")
    plan = planned(measured, 8, "fp8")
    out = moetailor.apply(plan, checkpoint("qwen3_moe"), tmp_path / "out", calibration=measured, format=FORMAT)
    told = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    (scheme,), tensors = told.config_groups.values(), load_file(out / "model.safetensors")
    assert scheme.format == told.format == "float-quantized"
    assert (scheme.weights.num_bits, scheme.weights.type, scheme.weights.strategy) == (8, "float", "channel")
    assert (scheme.input_activations.num_bits, scheme.input_activations.strategy) == (8, "token")
    assert scheme.input_activations.dynamic is True
    model = eager(moetailor.apply(plan, load(checkpoint("qwen3_moe")), calibration=measured))
    seen, compressor = 0, BaseCompressor.get_value_from_registry("float-quantized")
    for index, layer in anatomy_of(load(checkpoint("qwen3_moe"))).layers.items():
        module, (width,) = model.get_submodule(layer.experts), plan.by_layer[index].packed
        for name in ("gate", "up", "down"):
            for row, weight in enumerate(module.tensor(f"{width.stem}_{name}")):
                stem = f"{layer.experts}.{row}.{name}_proj."
                parts = {part: tensors[stem + part] for part in ("weight", "weight_scale")}
                assert parts["weight"].dtype == torch.float8_e4m3fn
                assert parts["weight_scale"].shape == (len(weight), 1)
                assert torch.equal(parts["weight"].float() * parts["weight_scale"], weight)
                assert 256 < float(parts["weight"].float().abs().amax(1).min()) <= 448  # GPTQ moves them
                assert torch.equal(compressor.decompress(parts, scheme)["weight"], weight)
                seen += 1
    assert not [name for name in tensors if name.endswith("weight_shape")]
    assert seen == sum(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())


def test_schemes_are_of_the_experts_alone(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    """Shared experts, routers, attention, the head and layers that are not run are ignored and match no scheme."""
    measured = calibration("deepseek_v3")
    plan = planned(measured)
    out = moetailor.apply(plan, checkpoint("deepseek_v3"), tmp_path / "out", calibration=measured, format=FORMAT)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["format"], told["quantization_status"]) == (
        FORMAT,
        "pack-quantized",
        "compressed",
    )
    config, names = QuantizationConfig.model_validate(told), open_checkpoint(out).tensors
    (scheme,) = config.config_groups.values()
    weights = scheme.weights
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.type) == (4, 16, True, "int")
    packed = {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}
    for name in names:
        module = name.rpartition(".")[0]
        assert any(match_name(module, target) for target in scheme.targets) == (module in packed)
        assert any(match_name(module, target) for target in config.ignore) == (module not in packed)
    assert any("shared_experts" in name for name in names)
    assert "lm_head.weight" in names


def test_layers_that_do_not_run_stay_plain(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with quiet_transformers():
        tiny_model("deepseek_v3").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    beyond = {
        name.replace("layers.1.", "layers.9."): t.clone() for name, t in tensors.items() if ".layers.1.mlp." in name
    }
    save_file(tensors | beyond, source / "model.safetensors", metadata={"format": "pt"})
    measured = moetailor.calibrate(source, tmp_path / "c", text=token_batches())
    assert [stack.index for stack in measured.model.stacks][-1] is None
    plan = planned(measured, remove="25%")
    out = moetailor.apply(plan, source, tmp_path / "out", calibration=measured, format=FORMAT)
    told, names = (
        QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"]),
        open_checkpoint(out).tensors,
    )
    mine = [name for name in names if ".layers.9." in name and ".experts." in name]
    assert mine
    assert all(name.endswith("proj.weight") for name in mine)
    assert all(any(match_name(name.removesuffix(".weight"), one) for one in told.ignore) for name in mine)


def test_experts_that_lie_fused_are_written_one_by_one(tmp_path: Path) -> None:
    source = tmp_path / "fused"
    with quiet_transformers():
        tiny_model("qwen3_moe").save_pretrained(source, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in open_checkpoint(source).tensors)
    measured = moetailor.calibrate(source, tmp_path / "c", text=token_batches())
    plan = planned(measured)
    out = moetailor.apply(plan, source, tmp_path / "out", calibration=measured, format=FORMAT)
    torch.testing.assert_close(logits(load(out)), ours(plan, source, measured), rtol=1e-5, atol=1e-5)


# What transformers does not load


@pytest.mark.parametrize(
    ("codes", "widths"),
    [
        ("uint", []),
        ("int", [{"bits": 8}]),
        ("int", [{}, {"bits": 8}]),
        ("int", [{"codes": "uint"}]),
        ("int", [{}, {"codes": "uint"}]),
        ("int", [{"group": 4}]),
    ],
)
def test_what_transformers_cannot_read_stops_it_and_is_decoded_and_inspected_here(
    codes: str, widths: list[dict], checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """It has one scheme for all experts and no zero points: layers in 8 and in 4 bits would become wrong numbers."""
    measured = calibration("olmoe")
    plan = with_widths(planned(measured, codes=codes), *widths)
    with pytest.warns(moetailor.MoetailorWarning, match="vLLM loads it, transformers does not: it has one scheme"):
        out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format=FORMAT)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(out)
    read = eager(Original(out).load(dtype=torch.float32, device="cpu"))
    found, tensors = summarise(out), load_file(out / "model.safetensors")
    labels = {f"int{w.bits}, groups of {w.group}" for layer in plan.layers.values() for w in layer.packed}
    assert set(re.findall(r"int\d, groups of \d+", found.lies)) == labels
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.parameters == sum(tensor.numel() for tensor in load(checkpoint("olmoe")).state_dict().values())
    for layer in found.moe:
        alone = [t.nbytes for name, t in tensors.items() if f".{layer.layer}.mlp.experts.0." in name]
        assert layer.expert_bytes == sum(alone)
    torch.testing.assert_close(logits(read), ours(plan, checkpoint("olmoe"), measured), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "widths"),
    [("int4g32", []), ("uint4g32", []), ("int4g32", [{"bits": 8}, {}, {"codes": "uint"}])],
)
def test_results_are_evaluated(bits: str, widths: list[dict], tmp_path: Path) -> None:
    """KL as a loop over our own runtime's predictions gives it."""
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=2, length=64)
    measured = moetailor.calibrate(REFERENCE, tmp_path / "c", text=text)
    plan = moetailor.make_plan(measured, "reap", moetailor.Budget.parse(remove="25%"), width=Width.parse(bits))
    plan = with_widths(plan, *widths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", moetailor.MoetailorWarning)
        out = moetailor.apply(plan, REFERENCE, tmp_path / "out", calibration=measured, format=FORMAT)
    scores = moetailor.evaluate(out, REFERENCE, text=text, dtype="bfloat16")
    original, compressed = (AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.bfloat16) for _ in range(2))
    moetailor.apply(plan, compressed, calibration=measured)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    total, count = 0.0, 0
    for batch in moetailor.read_batches(text, tokenizer, max_length=512, vocab_size=4096):
        p, q = (logits(model, batch.input_ids)[:, :-1].double().log_softmax(-1) for model in (original, compressed))
        total, count = total + float((p.exp() * (p - q)).sum()), count + p[..., 0].numel()
    assert scores.overall.kl.mean == pytest.approx(total / count, rel=0.03)
    assert scores.overall.kl.mean > 1e-3
    assert scores.nbytes[1] == open_checkpoint(out).nbytes


# What is refused, and what would do


def test_refusals(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    measured = calibration("olmoe")
    plan = planned(measured)
    (first, layer), *_ = plan.layers.items()
    two = replace(layer, widths=layer.widths | {0: replace(layer.widths[0], bits=8)})
    some = replace(layer, widths={expert: width for expert, width in layer.widths.items() if expert > 2})
    uneven = moetailor.make_plan(measured, "mone", moetailor.Budget.parse(keep=6), width=Width(bits=4))
    cases = {
        "holds 4 and 8 bits, for which engines have kernels (W4A16, W8A16); the plan has 6 bits, symmetric": (
            with_widths(plan, {"bits": 6})
        ),
        "holds one width for all matrices of an expert; the plan has 4/6 bits, symmetric": (
            with_widths(plan, {"down": 6})
        ),
        "holds one width in each layer; this one has 4 bits, symmetric, 8 bits, symmetric": (
            replace(plan, layers=plan.layers | {first: two})
        ),
        "needs all experts in 4 or 8 bits, such as with --bits int4g32 or fp8; 3 lie as in the original": (
            replace(plan, layers=plan.layers | {first: some})
        ),
        "needs all experts in 4 or 8 bits, such as with --bits int4g32 or fp8; 8 lie as in the original": (
            replace(plan, layers={name: layer for name, layer in plan.layers.items() if name != first})
        ),
        "holds groups of one size; in groups of at most 12 there are 11+11+10 of 32 inputs and 8+8 of 16 inputs: use "
        "16": with_widths(plan, {"group": 12}),
    }
    for told, given in cases.items():
        with pytest.raises(moetailor.PlanError) as refused:
            moetailor.apply(given, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format=FORMAT)
        assert str(refused.value) == f"format {FORMAT} {told} ({first}); format moetailor can hold it"
    with pytest.raises(
        moetailor.PlanError, match=r"holds dropped slots only.* has stand-ins or remaps; format moetail"
    ):
        moetailor.apply(uneven, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format=FORMAT)
    with pytest.raises(moetailor.PlanError, match="format native holds experts as they lie in the original; this plan"):
        moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format="native")


def test_auto_does_not_choose_it(calibration: GetCalibration) -> None:
    plan = planned(calibration("olmoe"))
    assert FORMATS[FORMAT].refusal(plan) is None
    assert not FORMATS[FORMAT].automatic


def test_rows_that_are_one_group_are_channels(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    measured = calibration("olmoe")
    plan = with_widths(planned(measured), *[{"group": 128}] * 2)
    out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format=FORMAT)
    told = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (told["strategy"], told["group_size"]) == ("channel", None)
    torch.testing.assert_close(logits(load(out)), ours(plan, checkpoint("olmoe"), measured), rtol=1e-5, atol=1e-5)


# What the check of a result finds


def drop(tensors: dict, key: str) -> None:
    del tensors[key]


def nan(tensors: dict, key: str) -> None:
    tensors[key][0] = torch.nan


def cut(tensors: dict, key: str) -> None:
    tensors[key] = tensors[key][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "part", "said"),
    [
        (drop, "weight_zero_point", "weight_zero_point' is missing"),
        (drop, "weight_shape", "weight_shape' is missing"),
        (nan, "weight_scale", "holds NaN or Inf"),
        (
            cut,
            "weight_packed",
            r"is I32 \[32, 1\]; a weight of \[32, 16\] that is int4, groups of 16 has I32 \[32, 2\]",
        ),
    ],
)
def test_a_damaged_result_is_found(
    damage: Callable, part: str, said: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    measured = calibration("olmoe")
    plan = planned(measured, codes="uint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", moetailor.MoetailorWarning)
        out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format=FORMAT)
    FORMATS[FORMAT].verify(out, plan)
    tensors = load_file(out / "model.safetensors")
    damage(tensors, f"model.layers.1.mlp.experts.3.down_proj.{part}")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        FORMATS[FORMAT].verify(out, plan)
