"""What is written beside and around the experts: config, card, provenance, other files, layers that are not run."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import Constant, Linear
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.planning.budget import Budget
from moetailor.planning.layer_plan import LayerPlan
from moetailor.recovery.result import write_recovered
from moetailor.summary import summarise
from moetailor.transform.beside import copy_others
from support.families import tiny_model
from support.tiny import load, logits

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a checkpoint folder that a test may change."""
    folder = tmp_path / "source"
    with quiet_transformers():
        tiny_model("deepseek_v3").save_pretrained(folder, max_shard_size="40KB")
    return folder


def compressed(source: Path, tmp_path: Path, method: str = "reap", keep: int = 9) -> Path:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    calibration = moetailor.calibrate(source, tmp_path / "calibration", text=[moetailor.Batch.of(ids)])
    plan = moetailor.make_plan(calibration, method, Budget.parse(keep=keep))
    return moetailor.apply(plan, source, tmp_path / "out", calibration=calibration)


def test_shards_index_and_other_files_are_written(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("terms")
    (source / "model.gguf").write_text("weights of another kind")
    out = compressed(source, tmp_path)
    assert len(open_checkpoint(out).shards) > 1
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "LICENSE").read_text() == "terms"
    assert not (out / "model.gguf").exists()
    assert not out.with_name("out.partial").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == open_checkpoint(out).nbytes


BESIDE = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "vocab.bpe", "bpe.codes", "source.spm", "spiece.model", "tokenizer.model"),
    *("tokenizer.model.v3", "tekken.json", "qwen.tiktoken", "prophetnet.tokenizer", "preprocessor_config.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    *("LICENSE", "License.txt", "LICENCE.md", "LICENSE-MODEL", "NOTICE", "Notice.txt", "COPYING", "USE_POLICY.md"),
]
NOT_BESIDE = [
    *(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "model.onnx",
        "model.onnx_data",
        "tf_model.h5",
    ),
    *("consolidated.safetensors", "consolidated.safetensors.index.json", "model.safetensors.index.fp32.json"),
    *("optimizer.pt", "rng_state.pth", "training_args.bin", "flax_model.msgpack", "data.npz", "state.pkl"),
    *(".env", ".secret.json", ".gitattributes", "id_rsa", "events.out.tfevents.1", "figure.png", "train.jsonl"),
    *("adapter_config.json", "onnx/config.json", "original/params.json", "notes.md"),
    *("additional_chat_templates/notes.md", "additional_chat_templates/more/deep.jinja"),
]


def test_what_tokenizers_and_generation_need_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    for name in (*BESIDE, *NOT_BESIDE, "config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy_others(source, out, left_out={"config.json"})
    copied = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert copied == {name: name for name in BESIDE}


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_copied_when_it_is_trusted_and_named_otherwise(source: Path, tmp_path: Path, trusted: bool) -> None:
    (source / "encoding").mkdir()
    for name in ("modeling_own.py", "configuration_own.py", "encoding/encode.py"):
        (source / name).write_text("raise RuntimeError")
    out = tmp_path / "out"
    out.mkdir()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        copy_others(source, out, left_out=(), trust_remote_code=trusted)
    assert {path.name for path in out.rglob("*.py")} == (
        {"modeling_own.py", "configuration_own.py", "encode.py"} if trusted else set()
    )
    told = [str(warning.message) for warning in said if warning.category is moetailor.MoetailorWarning]
    assert told == [
        f"{source}: left out configuration_own.py, encoding/encode.py, modeling_own.py: code is copied with "
        "--trust-remote-code only; what loads with trust_remote_code needs it"
    ] * (not trusted)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    source, out, away = tmp_path / "source", tmp_path / "out", tmp_path / "away"
    for folder in (source, out, away):
        folder.mkdir()
    (away / "secret").write_text("PRIVATE KEY")
    (away / "tool_use.jinja").write_text("elsewhere")
    (source / "real.json").write_text("{}")
    links = {
        "vocab.txt": "../away/secret",
        "added_tokens.json": str(away / "secret"),
        "additional_chat_templates": "../away",
        "merges.txt": "../away/nothing",
        "tokenizer.json": "real.json",
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    with pytest.warns(moetailor.MoetailorWarning) as said:
        copy_others(source, out, left_out=())
    assert {path.name: path.read_text() for path in out.rglob("*")} == {"real.json": "{}", "tokenizer.json": "{}"}
    assert not (out / "tokenizer.json").is_symlink()
    assert str(said[0].message) == (
        f"{source}: left out added_tokens.json, additional_chat_templates/tool_use.jinja, merges.txt, vocab.txt: "
        "links that lead out of the folder are not followed"
    )


def test_snapshots_of_the_hub_are_copied_as_files(tmp_path: Path) -> None:
    """Their files are links into the blobs of the same model; other blobs are none of theirs."""
    cached, out = tmp_path / "hub" / "models--org--name", tmp_path / "out"
    source = cached / "snapshots" / "0123abc"
    for folder in (cached / "blobs", source, out, tmp_path / "hub" / "models--org--other" / "blobs"):
        folder.mkdir(parents=True)
    (cached / "blobs" / "feed").write_text("words")
    (tmp_path / "hub" / "models--org--other" / "blobs" / "beef").write_text("others")
    (source / "vocab.txt").symlink_to("../../blobs/feed")
    (source / "merges.txt").symlink_to("../../../models--org--other/blobs/beef")
    link = tmp_path / "link"
    link.symlink_to(source)
    for folder in (source, link):
        with pytest.warns(moetailor.MoetailorWarning, match=r"left out merges\.txt: links"):
            copy_others(folder, out, left_out=())
        assert {path.name: path.read_text() for path in out.iterdir()} == {"vocab.txt": "words"}
        assert not (out / "vocab.txt").is_symlink()


def test_a_huge_file_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetailor.transform.beside.LARGEST", 2**20)
    (tmp_path / "out").mkdir()
    (tmp_path / "log.txt").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "vocab.txt").write_bytes(b"x" * 2**20)
    with pytest.warns(moetailor.MoetailorWarning, match=r"left out log\.txt: files above 1 MiB are not copied"):
        copy_others(tmp_path, tmp_path / "out", left_out=())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vocab.txt"}


def test_the_config_is_patched_not_rewritten(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"made_up_field": [1, 2]}))
    out = json.loads((compressed(source, tmp_path) / "config.json").read_text())
    assert out == config | {"made_up_field": [1, 2], "n_routed_experts": 9}


def test_untouched_tensors_are_copied_to_the_byte(source: Path, tmp_path: Path) -> None:
    before, after = open_checkpoint(source), open_checkpoint(compressed(source, tmp_path, "mone"))
    for name, info in before.tensors.items():
        if ".experts." not in name:
            assert torch.equal(info.read(), after.tensors[name].read()), name
            assert info.dtype == after.tensors[name].dtype


def test_plan_and_provenance_travel_with_the_weights(source: Path, tmp_path: Path) -> None:
    out = compressed(source, tmp_path, "mone")
    assert moetailor.Plan.load(out / "moetailor_plan.json").method == "mone"
    told = json.loads((out / "moetailor_provenance.json").read_text())
    assert told["original"]["fingerprint"] == open_checkpoint(source).fingerprint()
    assert told["calibration"]["text"]["counted"] == 24
    assert told["bytes"]["compressed"] == open_checkpoint(out).nbytes


def test_the_licence_is_carried_over(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: some-terms\nlanguage: en\n---\n# Original\n")
    card = (compressed(source, tmp_path) / "README.md").read_text()
    assert "license: other\nlicense_name: some-terms\n" in card
    assert "# Original" not in card


def test_layers_for_multi_token_prediction_are_cut_by_weight(source: Path, tmp_path: Path) -> None:
    """A layer on disk that transformers does not run has the same experts, and one config serves both."""
    opened = open_checkpoint(source)
    last = {name: info.read() for name, info in opened.tensors.items() if name.startswith("model.layers.2.")}
    extra = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
    for name, tensor in extra.items():
        # expert e is scaled by e + 1: of each group of four the last three are the largest
        expert = name.partition("experts.")[2].partition(".")[0]
        if expert.isdigit():
            tensor *= 0.01 * (int(expert) + 1)
    extra["model.layers.3.eh_proj.weight"] = torch.ones(4, 4)
    save_file(extra, source / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    out = open_checkpoint(compressed(source, tmp_path))
    plan = moetailor.Plan.load(out.folder / "moetailor_plan.json")
    assert plan.native
    assert plan.layers["model.layers.3"].pool == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    kept = [1, 2, 3, 5, 6, 7, 9, 10, 11]
    for row, expert in enumerate(kept):
        name = "model.layers.3.mlp.experts.{}.down_proj.weight"
        assert torch.equal(out.tensors[name.format(row)].read(), extra[name.format(expert)])
    router = out.tensors["model.layers.3.mlp.gate.weight"].read()
    assert torch.equal(router, extra["model.layers.3.mlp.gate.weight"][kept])
    bias = out.tensors["model.layers.3.mlp.gate.e_score_correction_bias"].read()
    assert torch.equal(bias, extra["model.layers.3.mlp.gate.e_score_correction_bias"][kept])
    assert torch.equal(out.tensors["model.layers.3.eh_proj.weight"].read(), torch.ones(4, 4))
    with quiet_transformers():
        assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(out.folder))).all()
    # Constants leave such layers whole.
    whole = open_checkpoint(compressed_again(source, tmp_path))
    assert len([name for name in whole.tensors if name.startswith("model.layers.3.mlp.experts.")]) == 36
    # So do counts that differ by layer: the result is no native one.
    calibration = moetailor.Calibration.open(tmp_path / "calibration")
    uneven = moetailor.make_plan(calibration, "frequency", Budget.parse(keep=9), allocation={1: 6, 2: "100%"})
    assert list(uneven.layers) == ["model.layers.1"]


def compressed_again(source: Path, tmp_path: Path) -> Path:
    calibration = moetailor.Calibration.open(tmp_path / "calibration")
    plan = moetailor.make_plan(calibration, "mone", Budget.parse(keep=8))
    return moetailor.apply(plan, source, tmp_path / "again", calibration=calibration)


def test_counts_that_differ_by_layer(source: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 128, (2, 12))
    calibration = moetailor.calibrate(source, tmp_path / "calibration", text=[moetailor.Batch.of(ids)])
    plan = moetailor.make_plan(calibration, "reap", Budget.parse(keep=9), layers=[2])
    assert not plan.native
    out = moetailor.apply(plan, source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["n_routed_experts"] == 12
    assert config["quantization_config"]["layers"] == {"2": {"rows": list(range(9)), "experts": 9}}
    in_memory = moetailor.apply(plan, load(source))
    torch.testing.assert_close(logits(load(out)), logits(in_memory), rtol=1e-5, atol=1e-5)
    assert [(layer.slots, layer.experts) for layer in summarise(out).moe] == [(12, 12), (9, 9)]


def test_sharded_and_single_files_give_the_same_tensors(source: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    with quiet_transformers():
        tiny_model("deepseek_v3").save_pretrained(single)
    (tmp_path / "one").mkdir()
    one, many = open_checkpoint(compressed(single, tmp_path / "one")), open_checkpoint(compressed(source, tmp_path))
    assert len(one.shards) == 1
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.tensors[name].read(), many.tensors[name].read()) for name in one.tensors)


def test_a_model_called_partial_stays(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "out.partial")
    out = compressed(tmp_path / "out.partial", tmp_path)
    assert open_checkpoint(tmp_path / "out.partial").fingerprint() == open_checkpoint(source).fingerprint()
    assert sorted(os.listdir(out.parent)) == ["calibration", "out", "out.partial", "source"]


def test_written_files_are_safetensors(source: Path, tmp_path: Path) -> None:
    out = compressed(source, tmp_path, "mone")
    for shard in open_checkpoint(out).shards:
        assert load_file(shard)
        assert (shard.stat().st_size - 8) % 4 == 0


def test_constants_load_no_experts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Novices come from sums alone: carrying them out must not cost the memory of a layer's weights."""
    calibration = moetailor.calibrate(
        source, tmp_path / "calibration", text=[moetailor.Batch.of(torch.randint(3, 99, (2, 12)))]
    )
    plan = moetailor.make_plan(calibration, "mone", Budget.parse(keep=9))
    monkeypatch.setattr(
        "moetailor.checkpoint.weights.ExpertWeights.open", lambda *_: pytest.fail("experts were opened")
    )
    assert moetailor.apply(plan, source, tmp_path / "out", calibration=calibration).is_dir()


def test_in_memory_a_layer_that_needs_no_experts_may_come_first(checkpoint: Get, calibration: GetCalibration) -> None:
    """Experts of the second layer are opened when the first has changed."""
    made = calibration("olmoe")
    plan = moetailor.make_plan(made, "linear", Budget.parse(keep=7), parameters={"rank": 2})
    first, second = plan.layers
    alike = {slot: Constant() for slot in plan.layers[first].of(Linear)}
    constants = LayerPlan(slots=tuple(alike.get(n, slot) for n, slot in enumerate(plan.layers[first].slots)))
    plan = replace(plan, layers={first: constants, second: plan.layers[second]})
    model = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), dtype="float32").eval()
    changed = moetailor.apply(plan, model, calibration=made)
    assert [[kind.kind for kind in slots.kinds] for _, slots in sorted(plan.slot_maps.items())] == [
        ["constant"],
        ["linear"],
    ]
    assert torch.isfinite(logits(changed, torch.arange(3, 15)[None])).all()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_result_with_a_value_that_is_not_finite_is_not_kept(source: Path, tmp_path: Path, name: str) -> None:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    calibration = moetailor.calibrate(source, tmp_path / "calibration", text=[moetailor.Batch.of(ids)])
    plan = moetailor.make_plan(calibration, "random", Budget.parse(keep=9), protect=[(2, 3)])
    shard = open_checkpoint(source).tensors[name].file
    tensors = load_file(shard)
    tensors[name].view(-1)[-1] = float("nan")  # of the last word, of which no text consists
    save_file(tensors, shard, {"format": "pt"})
    parameter = name.removesuffix(".weight").replace("experts.3", "experts")
    with pytest.raises(
        moetailor.CheckpointError, match=rf"^{tmp_path / 'out'}: {parameter}.* holds NaN or Inf;.* nothing was kept$"
    ):
        moetailor.apply(plan, source, tmp_path / "out", allow_other_weights=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "source"]
    out = moetailor.apply(plan, source, tmp_path / "out", allow_other_weights=True, verify=False)
    assert torch.isnan(load_file(out / shard.name)[name]).any() or "experts" in name


def test_trained_numbers_that_overflow_when_they_are_stored_are_refused(tmp_path: Path) -> None:
    model = tiny_model("olmoe").half()
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    trained, name = model.float(), "model.layers.1.mlp.gate.weight"
    trained.get_parameter(name).data[0, 0] = 7e4
    settings = {"settings": {}, "overwrite": False}
    with pytest.raises(moetailor.CheckpointError, match=rf"{name} has numbers beyond 65,504, the most that float16"):
        write_recovered(tmp_path / "out", open_checkpoint(tmp_path / "source"), trained, [name], **settings)
    assert not (tmp_path / "out").exists()
