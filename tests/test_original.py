"""checkpoint/original.py and config.py: what is refused when a checkpoint is opened, and that transformers agrees."""

import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.checkpoint import anatomy
from moetailor.checkpoint import original as original_module
from moetailor.checkpoint.family import UNQUANTIZED
from moetailor.checkpoint.files import DTYPE_NAMES, Checkpoint, TensorInfo, open_checkpoint
from moetailor.checkpoint.folder import INDEX, SINGLE
from moetailor.checkpoint.models import resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError
from support.families import tiny_model
from support.tiny import token_batches

Get = Callable[[str], Any]
REFERENCE = Path(__file__).parents[1] / "examples" / "reference-moe"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(checkpoint: Get, tmp_path: Path) -> Callable[..., Path]:
    """Return a family's tiny checkpoint for a test of its own, changed as the test likes."""

    def made(family: str, tensors: Callable[[Tensors], object] | None = None, **config: object) -> Path:
        folder = tmp_path / family
        shutil.copytree(checkpoint(family), folder)
        if config:
            edit_config(folder, config)
        if tensors is not None:
            edit_tensors(folder, tensors)
        return folder

    return made


def edit_config(folder: Path, entries: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def refusal(folder: Path | str, **options: Any) -> str:
    """Open a checkpoint as far as any stage does, and return why it is refused."""
    with pytest.raises(CheckpointError) as refused:
        _ = Original(folder, **options).facts
    return str(refused.value)


def loads_whole(folder: Path) -> bool:
    """Say whether transformers finds everything that a model needs."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except RuntimeError:  # what it raises over a tensor of another shape
            return False
    return not info["missing_keys"]


# Every parameter is there


def kinds(names: Iterable[str]) -> list[str]:
    """Return one name of each kind: its number left out, from the last layer and expert."""
    return list({re.sub(r"\.\d+\.", ".*.", name): name for name in sorted(names)}.values())


# Tied words; a correction bias that may be missing; layers of several makes; experts that lie fused.
@pytest.mark.parametrize("family", ["granitemoe", "axk1", "nemotron_h", "gpt_oss"])
def test_a_tensor_is_missed_where_transformers_misses_it(family: str, copy: Callable[..., Path]) -> None:
    folder = copy(family)
    whole = load_file(folder / SINGLE)
    verdicts = set()
    for lost in kinds(whole):
        save_file({name: tensor for name, tensor in whole.items() if name != lost}, folder / SINGLE, {"format": "pt"})
        verdicts.add(whole_enough := loads_whole(folder))
        if whole_enough:
            _ = Original(folder).facts
        else:
            assert re.search("no tensor for|no experts for|incomplete|has shape", refusal(folder)), lost
    # Where nothing may be missing, nothing is taken; newer releases let the correction biases of axk1 be.
    assert verdicts == ({True, False} if tiny_model(family)._keys_to_ignore_on_load_missing else {False})


def test_the_message_names_what_is_missing_and_what_is_there_instead(copy: Callable[..., Path]) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.query"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")

    folder = copy("olmoe", rename)
    assert refusal(folder) == (
        f"{folder}: the checkpoint has no tensor for model.layers.1.self_attn.q_proj.weight; it has "
        "model.layers.1.self_attn.query, which the model does not load"
    )


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate.weight"]
)
def test_a_tensor_of_another_shape_is_refused(name: str, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", lambda tensors: tensors.update({name: tensors[name][:-1]}))
    assert not loads_whole(folder)
    assert "has shape" in refusal(folder)


def test_experts_of_other_shapes_are_refused(copy: Callable[..., Path]) -> None:
    def transpose(tensors: Tensors) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].T

    folder = copy("olmoe", transpose)
    assert not loads_whole(folder)
    assert re.search("cannot build|has shape", refusal(folder))


def test_a_bias_that_may_be_left_out_is_zero_streamed_and_in_memory(copy: Callable[..., Path]) -> None:
    def leave_out(tensors: Tensors) -> None:
        for name in [name for name in tensors if "correction_bias" in name]:
            del tensors[name]

    folder = copy("axk1", leave_out)
    if not loads_whole(folder):  # an older release of transformers
        assert re.search(r"no tensor for model.layers.\d.mlp.gate.e_score_correction_bias", refusal(folder))
        return
    original = Original(folder)
    layer = original.anatomy.layers[1]
    streamed = original.streamed(dtype=torch.float32)
    assert layer.correction is not None
    with streamed.loaded(layer.block):
        assert not dict(streamed.model.named_buffers())[layer.correction].any()
    loaded = original.load(dtype=torch.float32, device="cpu")
    assert not dict(loaded.named_buffers())[layer.correction].any()
    assert moetailor.ExpertWeights(original).correction(1) is None


# Tied words


def sensitivities(folder: Path, *, stream: bool) -> dict[int, float]:
    out = folder.with_name(f"{folder.name}-{stream}")
    made = moetailor.calibrate(folder, out, text=token_batches(), stream=stream, sensitivity=True)
    return made.sensitivities() or {}


@pytest.mark.parametrize("there", ["words", "head", "both, equal", "both"])
def test_tied_words_are_those_that_are_there(there: str, copy: Callable[..., Path]) -> None:
    words, head = "model.embed_tokens.weight", "lm_head.weight"

    def choose(tensors: Tensors) -> None:
        tensors.pop(head, None)
        if there == "head":
            tensors[head] = tensors.pop(words)
        elif there != "words":
            tensors[head] = tensors[words] * (2 if there == "both" else 1)

    folder = copy("granitemoe", choose)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = load_file(folder / SINGLE)
    assert torch.equal(model.lm_head.weight, stored.get(head, stored.get(words)))
    streamed = Original(folder).streamed(dtype=torch.float32)
    with streamed.loaded("model.embed_tokens", "lm_head") as part:
        assert torch.equal(part.lm_head.weight, model.lm_head.weight)
        assert torch.equal(part.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert sensitivities(folder, stream=True) == pytest.approx(sensitivities(folder, stream=False), rel=1e-5)


# What is measured is what is written


def test_experts_that_lie_fused_and_one_by_one_are_ambiguous(copy: Callable[..., Path]) -> None:
    def fuse(tensors: Tensors) -> None:
        parts = [tensors[f"model.layers.0.mlp.experts.{number}.down_proj.weight"] for number in range(8)]
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.stack(parts) * 2

    assert "is a part of; delete the one that is not meant" in refusal(copy("olmoe", fuse))


def test_a_parameter_under_two_names_is_ambiguous(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] * 2}))
    assert "'model.norm.weight' and 'norm.weight' are the same tensor; delete the one" in refusal(folder)


def test_shards_are_read_as_transformers_reads_them(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe")
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    (folder / "sub").mkdir()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "sub" / "a.safetensors", {"format": "pt"})
    save_file({name: tensors[name] for name in names[1::2]}, folder / "b.safetensors", {"format": "pt"})
    # One tensor is in a shard, but not in the index.
    weight_map = dict.fromkeys(names[::2], "sub/a.safetensors") | dict.fromkeys(names[3::2], "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert loads_whole(folder)
    original = Original(folder)
    assert original.facts.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    found = {name: info.read() for name, info in original.checkpoint.tensors.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_correction_bias_keeps_its_bits_in_a_narrower_model(tmp_path: Path, copy: Callable[..., Path]) -> None:
    def mix(tensors: Tensors) -> None:
        for name in tensors:
            exact = torch.linspace(0, 1, tensors[name].numel()).sin()
            tensors[name] = exact if "correction_bias" in name else tensors[name].bfloat16()

    folder = copy("minimax_m2", mix)
    measured = moetailor.calibrate(folder, tmp_path / "c", text=token_batches(), dtype="bfloat16")
    weights = moetailor.ExpertWeights(folder)
    plan = moetailor.make_plan(measured, "reap", moetailor.Budget.parse(remove=0.25), weights=weights)
    moetailor.apply(plan, folder, tmp_path / "out")
    before, after = (load_file(place / SINGLE) for place in (folder, tmp_path / "out"))
    name = next(name for name in before if "correction_bias" in name)
    kept = next(iter(plan.layers.values())).kept_slots
    assert torch.equal(after[name], before[name][kept])
    loaded = Original(folder).load(dtype=torch.bfloat16, device="cpu")
    layer = Original(folder).anatomy.layers[0]
    assert torch.equal(dict(loaded.named_buffers())[layer.correction or ""], before[name])


# config.json


@pytest.mark.parametrize("count", [10**9, 10**18, 20_000])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_experts", "n_shared_experts", "num_nextn_predict_layers"])
def test_counts_beyond_the_weights_are_refused_before_anything_is_built(
    name: str, count: int, copy: Callable[..., Path]
) -> None:
    folder = copy("olmoe", **{name: count})
    began = time.process_time()
    told = "its weights are numbered up to 7 and have up to 128 rows"
    assert refusal(folder) == f"{folder}/config.json: {name} = {count:,}; {told}"
    assert time.process_time() - began < 0.5


def test_there_is_room_for_as_many_experts_as_rows_but_not_for_layers(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", lambda tensors: tensors.update(x=torch.zeros(5000, 1)), num_hidden_layers=4000)
    assert "num_hidden_layers = 4,000; its weights are numbered up to 7 and have up to 5,000 rows" in refusal(folder)
    edit_config(folder, {"num_hidden_layers": 2, "num_experts": 4000})
    assert refusal(folder).startswith(f"{folder / 'config.json'}: layers have 4000 experts, but 'model.layers.0.")


def test_a_few_layers_too_many_are_told_by_what_they_lack(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", num_hidden_layers=3)
    assert refusal(folder) == f"{folder}: has no experts for MoE layers [2]; the checkpoint is incomplete"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("rms_norm_eps", 1),
        ("rms_norm_eps", "small"),
        ("dtype", "bf16"),
        ("num_experts", [8]),
        ("num_experts", "8"),
        ("num_experts_per_tok", "2"),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("pad_token_id", 999_999),
        ("hidden_act", "nonsense"),
        ("rope_parameters", 5),
        ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 1.0}),
        ("attn_implementation", "nonsense"),
        ("model_type", 7),
        ("model_type", ["olmoe"]),
        ("num_hidden_layers", 1.5),
        ("id2label", 5),
    ],
)
def test_a_value_that_cannot_be_used_is_blamed_by_name(name: str, value: object, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", **{name: value})
    said = refusal(folder)
    assert said.startswith(f"{folder}/config.json: ")
    assert name in said
    assert str(value) in said


@pytest.mark.parametrize(
    ("name", "value"), [("num_attention_heads", 8), ("intermediate_size", 8), ("vocab_size", 10**12)]
)
def test_a_value_that_the_weights_contradict_is_told_by_shapes(
    name: str, value: int, copy: Callable[..., Path]
) -> None:
    assert re.search(r"has shape \[.*\], the config says \[.*\]", refusal(copy("olmoe", **{name: value})))


@pytest.mark.parametrize("value", [0, -1, 9, 10**9])
def test_a_router_that_could_not_choose_is_refused(value: int, copy: Callable[..., Path]) -> None:
    said = refusal(copy("olmoe", num_experts_per_tok=value))
    assert said == f"config.json: a token goes to {value} experts, layer 0 has 8 to choose from"


@pytest.mark.parametrize(("count", "used"), [(5, 1), (3, 0), (3, 4), (0, 1), (1, 0), (-3, 1)])
def test_groups_that_do_not_come_out_even_are_refused(count: int, used: int, copy: Callable[..., Path]) -> None:
    said = refusal(copy("deepseek_v3", n_group=count, topk_group=used))
    assert f"12 experts in {count} groups, of which a token uses {used}" in said


def test_more_experts_than_the_groups_of_a_token_have_are_refused(copy: Callable[..., Path]) -> None:
    said = refusal(copy("deepseek_v3", n_group=3, topk_group=1, num_experts_per_tok=5))
    assert said == "config.json: a token goes to 5 experts, layer 1 has 4 to choose from"


def test_two_counts_that_differ_are_ambiguous(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", num_experts=8, num_local_experts=6)
    assert refusal(folder).startswith(f"{folder}/config.json: num_experts = 8, num_local_experts = 6; which of them")
    edit_config(folder, {"num_local_experts": 8})
    assert Original(folder).anatomy.layers[0].num_experts == 8


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "1" * 5000])
def test_a_config_of_many_brackets_or_digits_is_refused(text: str, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe")
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"{folder}/config.json: not JSON")


@pytest.mark.parametrize(
    ("stored", "run"),
    [
        ("BF16 BF16 F32", torch.bfloat16),
        ("F16 F32 F32", torch.float32),
        ("I32 I32 I32 F16", torch.float16),
        ("F8_E4M3 F8_E4M3 BF16", torch.bfloat16),
        ("U8 F4", torch.bfloat16),
    ],
)
def test_a_model_runs_in_a_dtype_that_models_run_in(stored: str, run: torch.dtype) -> None:
    infos = {str(n): TensorInfo(str(n), name, (8,), Path(), 0, 8) for n, name in enumerate(stored.split())}
    assert resolve_dtype(None, "meta", Checkpoint(Path(), "", {}, infos)) == run


# Quantized sources


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "hqq"}},
        {"quantization_config": {"format": "hqq"}},
        {"compression_config": {"format": "hqq"}},
        {"quantization": {"quant_method": "hqq", "bits": 4}},
        {"text": {"quantization_config": {"quant_method": "hqq"}}},
    ],
)
def test_quantized_weights_are_refused_however_the_config_says_it(config: dict, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", **config)
    said = "weights are quantized (hqq): not supported yet; give the bf16 or fp32 original"
    assert refusal(folder) == f"{folder / 'config.json'}: {said}"


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_word_of_quantization_means_nothing(value: object, copy: Callable[..., Path]) -> None:
    assert Original(copy("olmoe", quantization_config=value)).facts.top_k == 2


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_that_says_quantized_is_enough(name: str, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe")
    (folder / name).write_text("{}")
    assert refusal(folder).startswith(f"{folder}: weights are quantized, says {name}: not supported yet")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv",
        "model.layers.1.mlp.experts.3.input_scale",
        "model.layers.0.mlp.experts.down_proj_scales",
        "model.layers.0.mlp.gate.correction",
    ],
)
def test_what_lies_unloaded_with_experts_is_refused_by_name(name: str, copy: Callable[..., Path]) -> None:
    shape = (8,) if name.endswith("correction") else (2, 3)
    folder = copy("olmoe", lambda tensors: tensors.update({name: torch.ones(shape)}))
    assert refusal(folder) == (
        f"{folder}: tensor {name!r} belongs to experts, but transformers does not load it; if it scales quantized "
        "weights, these are not supported yet; give the bf16 or fp32 original"
    )


def test_what_lies_unloaded_elsewhere_is_copied(tmp_path: Path, copy: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = copy("olmoe", lambda tensors: tensors.update({name: torch.arange(4.0)}))
    assert Original(folder).facts.nbytes == open_checkpoint(folder).nbytes


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4"])
def test_codes_are_refused_by_what_they_mean(dtype: str, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe")
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, end = json.loads(raw[8 : 8 + length]), len(raw) - 8 - length
    header["model.layers.0.x"] = {"dtype": dtype, "shape": [8], "data_offsets": [end, end + (8 if "8" in dtype else 4)]}
    text = json.dumps(header).encode()
    data = raw[8 + length :] + bytes(8 if "8" in dtype else 4)
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    meant = {"F8_E8M0": "powers of two, the scales of blocks", "F4": "4-bit floats"}[dtype]
    told = f"'model.layers.0.x' is {dtype}, {meant}"
    assert refusal(folder) == f"{folder}: weights are quantized ({told}): {UNQUANTIZED}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.3.up_proj.weight"])
def test_weights_that_are_no_floats_are_refused(name: str, dtype: torch.dtype, copy: Callable[..., Path]) -> None:
    folder = copy("olmoe", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert refusal(folder).startswith(f"{folder / SINGLE}: tensor {name!r} is {DTYPE_NAMES[dtype]}, which model.")


def test_a_tokenizer_that_cannot_read_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(REFERENCE, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": "../x"}))
    with pytest.raises(CheckpointError, match="its tokenizer cannot read text: "):
        Original(folder).tokenizer()


# The hub


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("olmoe", {"quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantized (bitsandbytes)"),
        (
            "olmoe",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weights are quantized (fp8): weight_block_size = [128]",
        ),
        ("olmoe", {"model_type": "dbrx"}, "model type 'dbrx' is not supported"),
        ("olmoe", {"text_config": {}}, "wraps a text model inside a multi-modal one"),
        ("olmoe", {"model_type": "llama"}, "model type 'llama' has no MoE layers"),
        ("olmoe", {"model_type": "nonsense"}, "nonsense"),
        ("olmoe", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1,000,000,000"),
        ("olmoe", {"num_experts_per_tok": 9}, "a token goes to 9 experts, layer 0 has 8"),
        ("olmoe", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (
            "olmoe",
            {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
            "pass --trust-remote-code if you trust it",
        ),
    ],
)
def test_what_the_config_tells_is_refused_before_weights_are_downloaded(
    family: str, config: dict, said: str, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(family, **config)
    (folder / SINGLE).unlink()

    def download(name: str, **options: object) -> str:
        assert "allow_patterns" not in options, "weights were asked for"
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert said in refusal("some/moe")
    assert said in refusal("some/moe", takes="results")


# Code that comes with the checkpoint

CODE = {
    "configuration_own.py": """
from transformers import OlmoeConfig
class OwnConfig(OlmoeConfig):
    model_type = "own_moe"
""",
    "modeling_own.py": """
from transformers import OlmoeForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(OlmoeForCausalLM):
    config_class = OwnConfig
""",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that only exists as code in the checkpoint: OLMoE under another name, stored as it is in memory."""
    folder = tmp_path_factory.mktemp("code") / "own"
    with quiet_transformers():
        tiny_model("olmoe").save_pretrained(folder, save_original_format=False)
    for name, code in CODE.items():
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, {"model_type": "own_moe", "auto_map": auto_map, "architectures": ["OwnForCausalLM"]})
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_batches()[0].input_ids).logits


def test_code_of_a_checkpoint_reaches_every_stage_that_builds_a_model(own: Path, tmp_path: Path) -> None:
    made = {
        stream: moetailor.calibrate(
            own, tmp_path / f"{stream}", text=token_batches(), stream=stream, sensitivity=True, trust_remote_code=True
        )
        for stream in (False, True)
    }
    assert torch.equal(made[True].sums(1).norm_sq, made[False].sums(1).norm_sq)
    assert made[True].sensitivities() == pytest.approx(made[False].sensitivities(), rel=1e-5)
    original = Original(own, trust_remote_code=True)
    weights = moetailor.ExpertWeights(own, trust_remote_code=True)
    # Native, with fitted experts; and the moetailor format, which reshapes the model as it loads.
    for method, propagate in (("refit", "original"), ("linear", "compressed")):
        plan = moetailor.make_plan(made[False], method, moetailor.Budget.parse(remove=0.25), weights=weights)
        out = tmp_path / method
        options: dict[str, Any] = {"calibration": made[False], "propagate": propagate, "trust_remote_code": True}
        moetailor.apply(plan, own, out, **options)
        result = Original(out, takes="results", trust_remote_code=True)
        assert result.written_here == (method == "linear")
        loaded = original.load(dtype=torch.float32, device="cpu")
        in_memory = moetailor.apply(plan, loaded, calibration=made[False], propagate=propagate)
        found = logits(result.load(dtype=torch.float32, device="cpu"))
        torch.testing.assert_close(found, logits(in_memory), rtol=1e-5, atol=1e-5)


def test_code_of_a_checkpoint_does_not_run_unasked(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(own, folder)
    (folder / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for takes in ("originals", "results", "anything"):
        with pytest.raises(CheckpointError, match="pass --trust-remote-code if you trust it"):
            _ = Original(folder, takes=takes).config
    assert not (tmp_path / "ran").exists()


def test_code_of_a_family_that_transformers_knows_runs_where_it_is_trusted(copy: Callable[..., Path]) -> None:
    def add(tensors: Tensors) -> None:
        tensors["extra.weight"] = torch.ones(2, 2)

    folder = copy("olmoe", add, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (folder / "modeling_own.py").write_text("""
from torch import nn
from transformers import OlmoeForCausalLM
class OwnForCausalLM(OlmoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Linear(2, 2, bias=False)
        self.post_init()
""")
    assert "extra.weight" not in Original(folder).skeleton.names
    trusted = Original(folder, trust_remote_code=True)
    assert trusted.skeleton.names["extra.weight"] == "extra.weight"
    assert trusted.anatomy == Original(folder).anatomy


def test_code_whose_names_are_not_on_disk_is_told_which_are(own: Path, tmp_path: Path, checkpoint: Get) -> None:
    folder = tmp_path / "own"
    shutil.copytree(own, folder)
    shutil.copy(checkpoint("olmoe") / SINGLE, folder)
    said = refusal(folder, trust_remote_code=True)
    assert "has no experts for MoE layers [0, 1]; it has 'model.layers.0.mlp.experts.0.down_proj.weight'" in said


# Opened once


def test_stages_in_one_go_open_the_original_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def open_counted(source: Path, **options: Any) -> object:
        opened.append(Path(source))
        return open_checkpoint(source, **options)

    monkeypatch.setattr(original_module, "open_checkpoint", open_counted)
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=2, length=16)
    budget = moetailor.Budget.parse(remove=0.25)
    moetailor.compress(REFERENCE, tmp_path / "out", text=text, method="refit", budget=budget)
    # The result is opened to be verified.
    assert opened == [REFERENCE, tmp_path / ".out.moetailor" / "new"]


def test_models_that_are_only_read_are_built_once(checkpoint: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one config, however often it is asked for; of another one anew."""
    monkeypatch.setattr(anatomy, "_LOOKED_AT", {})
    built = Mock(side_effect=anatomy.build_skeleton)
    monkeypatch.setattr(anatomy, "build_skeleton", built)
    config = Original(checkpoint("olmoe")).config
    small = built(config)
    first, again = anatomy.discover(config, small), anatomy.discover(config, small)
    assert (first, built.call_count) == (again, 2)  # and with twice the experts
    config.num_experts, config.num_experts_per_tok = 6, 2
    assert anatomy.discover(config, built(config)).layers[0].num_experts == 6
    assert built.call_count == 4
