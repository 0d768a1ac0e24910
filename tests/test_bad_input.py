"""What a user can get wrong: each refused with one message that names the cure, exit code 1, and nothing lost.

The command line is run in this process, so an error that is not refused on purpose shows as its own traceback here.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moetailor
from moetailor.answers import ANSWERS, Constant
from moetailor.calibration.finite import check_weights
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.files import INDEX, SINGLE, open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError
from moetailor_cli import app
from support.families import REFUSED, tiny_config, tiny_model

REFERENCE = Path(__file__).parents[1] / "examples" / "reference-moe"
VOCABULARY = 4096
EXPERTS, TOP_K, LAYERS = 8, 2, 2
# Two layers of tiny qwen2_moe in float32: an expert is three matrices of 16 x 32, a slot one row of the router.
EXPERT_BYTES, SLOT_BYTES, VECTOR_BYTES = 3 * 16 * 32 * 4, 32 * 4, 32 * 4
TEXT = ("--sequences", 6, "--length", 48, "--batch-size", 2)
# An earlier result: moetailor replaces a folder only if it wrote all that is in it.
OLD = {
    "out/config.json": b"old",
    "out/moetailor_provenance.json": b'{"files": ["config.json", "moetailor_provenance.json"]}',
}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Run:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one message of a refused call."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert self.code == 1, self
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


Cli = Callable[..., Run]
Edit = Callable[[Any], object]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["moetailor", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Run(code, *capsys.readouterr())

    return run


def save(name: str, folder: Path, *, seed: int = 0, edit: Edit | None = None) -> Path:
    """Write a family's tiny model with the words and the tokenizer of the reference model, in several shards."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        model = tiny_model(name, seed)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.get_input_embeddings().weight.normal_(std=0.2)
        if edit is not None:
            edit(model)
        model.save_pretrained(folder, max_shard_size="60KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / file, folder)
    return folder


def bare(folder: Path, config: dict) -> Path:
    """Write a folder that has a config.json and hardly any weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(2)}, folder / SINGLE)
    return folder


def state(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def edit_json(file: Path, edit: Edit) -> Path:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return file


@dataclass(frozen=True)
class World:
    """An original, text, its calibration and two plans."""

    original: Path
    text: Path
    calibration: Path
    reap: Path
    mone: Path

    def calibrate(self, model: Path, out: Path, *more: object) -> tuple[object, ...]:
        return ("calibrate", model, "-o", out, "--data", self.text, *TEXT, *more)

    def compress(self, model: Path, out: Path, *more: object, method: str = "reap") -> tuple[object, ...]:
        return ("compress", model, "-o", out, "--data", self.text, *TEXT, "--method", method, *more)

    def plan(self, out: Path, *more: object, method: str = "reap") -> tuple[object, ...]:
        return ("plan", self.calibration, "-o", out, "--method", method, *more)

    def evaluate(self, compressed: Path, against: Path, *more: object) -> tuple[object, ...]:
        text = ("--data", self.text, "--sequences", 2, "--length", 48)
        return ("evaluate", compressed, "--against", against, *text, *more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    original = save("qwen2_moe", folder / "original")
    lines = (REFERENCE / "calibration.jsonl").read_text().splitlines()[:6]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    text = moetailor.TextOptions(data=(str(folder / "text.jsonl"),), sequences=6, length=48, batch_size=2)
    calibration = moetailor.calibrate(original, folder / "calibration", text=text)
    for method in ("reap", "mone"):
        moetailor.make_plan(calibration, method, moetailor.Budget(keep=6)).save(folder / f"{method}.json")
    return World(original, folder / "text.jsonl", folder / "calibration", folder / "reap.json", folder / "mone.json")


@pytest.fixture(scope="module")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shapes with other weights."""
    return save("qwen2_moe", tmp_path_factory.mktemp("sibling") / "sibling", seed=7)


@pytest.fixture(scope="module")
def compressed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result in the moetailor format."""
    out = tmp_path_factory.mktemp("compressed") / "compressed"
    calibration = moetailor.Calibration.open(world.calibration)
    return moetailor.apply(moetailor.Plan.load(world.mone), world.original, out, calibration=calibration)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose router chooses two of three groups of four experts, and its calibration."""
    folder = tmp_path_factory.mktemp("grouped")
    original = save("deepseek_v3", folder / "original")
    ids = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    moetailor.calibrate(original, folder / "calibration", text=[moetailor.Batch.of(ids)])
    return original, folder / "calibration"


@pytest.fixture
def original(world: World, tmp_path: Path) -> Path:
    """A copy of the original that may be damaged."""
    return Path(shutil.copytree(world.original, tmp_path / "original"))


@pytest.fixture
def calibration(world: World, tmp_path: Path) -> Path:
    """A copy of the calibration that may be damaged."""
    return Path(shutil.copytree(world.calibration, tmp_path / "calibration"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier result in the place of the new one."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in OLD.items():
        (tmp_path / name).write_bytes(content)
    return folder


def expert_shard(original: Path) -> Path:
    """Return a shard that holds experts."""
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    return original / json.loads((original / INDEX).read_text())["weight_map"][name]


# Checkpoints


def truncate(original: Path) -> None:
    os.truncate(expert_shard(original), 1000)


def lose_shard(original: Path) -> None:
    expert_shard(original).unlink()


def index_names_more(original: Path) -> None:
    edit_json(original / INDEX, lambda index: index["weight_map"].update(ghost=expert_shard(original).name))


def lie_twice(original: Path) -> None:
    name = "model.norm.weight"
    home = json.loads((original / INDEX).read_text())["weight_map"][name]
    other = next(file for file in sorted(original.glob("*.safetensors")) if file.name != home)
    save_file(load_file(other) | {name: load_file(original / home)[name]}, other)


def index_leaves(original: Path) -> None:
    edit_json(original / INDEX, lambda index: index["weight_map"].update(ghost="../elsewhere.safetensors"))


def only_pickles(original: Path) -> None:
    for file in original.glob("*.safetensors*"):
        file.unlink()
    (original / "pytorch_model.bin").write_bytes(b"never read")


def lose_experts(original: Path) -> None:
    shard = expert_shard(original)
    kept = {name: tensor for name, tensor in load_file(shard).items() if "experts.0.down_proj" not in name}
    save_file(kept, shard)
    edit_json(original / INDEX, lambda index: index["weight_map"].pop("model.layers.1.mlp.experts.0.down_proj.weight"))


DAMAGES = {
    truncate: r"truncated: 1000 bytes, its (tensors|header alone) needs? \d+; download the shard again$",
    lose_shard: r"shard model-\d+-of-\d+.safetensors is missing; download it again$",
    index_names_more: r"1 tensors are not where it says, first 'ghost' in model-",
    lie_twice: r"^tensor 'model.norm.weight' lies in .*model-.*safetensors and in .*model-.*; write it again with one$",
    index_leaves: r"names '../elsewhere.safetensors', which leaves the folder; refused$",
    only_pickles: r"weights are pickles \(pytorch_model.bin\), which can run code when read; save the model as",
    lose_experts: r": expert 0 of model.layers.1 has 4,096 bytes, others 6,144; the checkpoint is incomplete$",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verb", ["calibrate", "apply", "compress"])
def test_damaged_checkpoint_is_refused_by_every_verb(
    cli: Cli, world: World, original: Path, old: Path, tmp_path: Path, verb: str, damage: Edit
) -> None:
    damage(original)
    calls = {
        "calibrate": world.calibrate(original, tmp_path / "new"),
        "apply": ("apply", original, world.reap, "-o", old, "--overwrite"),
        "compress": world.compress(original, old, "--keep", 6, "--overwrite"),
    }
    before = state(tmp_path)
    assert re.search(DAMAGES[damage], cli(*calls[verb]).refusal)
    assert state(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_refused_by_inspect(cli: Cli, original: Path, damage: Edit) -> None:
    damage(original)
    assert re.search(DAMAGES[damage], cli("inspect", original).refusal)


@pytest.mark.parametrize("damage", [truncate, only_pickles], ids=lambda damage: damage.__name__)
def test_damaged_result_is_refused_before_the_original_runs(
    cli: Cli, world: World, original: Path, damage: Edit
) -> None:
    damage(original)
    assert re.search(DAMAGES[damage], cli(*world.evaluate(original, world.original)).refusal)
    assert re.search(DAMAGES[damage], cli(*world.evaluate(world.original, original)).refusal)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "config.json: not JSON"),
        ("[1]", "config.json: not a JSON object"),
        ("{}", "config.json: transformers cannot read it"),
        ('{"model_type": "nonsense"}', "model type `nonsense`"),
    ],
)
def test_config_that_is_none_is_refused(cli: Cli, original: Path, config: str, said: str) -> None:
    (original / "config.json").write_text(config)
    refusal = cli("inspect", original).refusal
    assert refusal.startswith(str(original))
    assert said in refusal


def test_folder_that_is_no_checkpoint_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    cure = "no config.json; give the folder of a Hugging Face checkpoint"
    assert cli("inspect", tmp_path).refusal == f"{tmp_path}: {cure}"
    assert cli("inspect", tmp_path / "none").refusal == f"{tmp_path / 'none'}: no such folder"
    assert cli("inspect", world.calibration).refusal == f"{world.calibration}: {cure}"


def test_empty_checkpoint_is_refused(cli: Cli, world: World, original: Path, tmp_path: Path) -> None:
    for file in original.glob("*.safetensors*"):
        file.unlink()
    save_file({}, original / SINGLE)
    for call in (("inspect", original), world.compress(original, tmp_path / "new", "--keep", 6, "--dry-run")):
        assert cli(*call).refusal == f"{original}: has no experts for MoE layers [0, 1]; the checkpoint is incomplete"


def test_code_of_a_checkpoint_does_not_run_unasked(cli: Cli, original: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (original / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    edit_json(original / "config.json", lambda config: config.update(own))
    assert cli("inspect", original).refusal == (
        f"{original / 'config.json'}: code beside it would have to be run; pass --trust-remote-code if you trust it"
    )
    assert not mark.exists()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_dense_model_is_refused(cli: Cli, world: World, tmp_path: Path, name: str) -> None:
    dense = bare(tmp_path / "dense", {"model_type": name, "num_hidden_layers": 1, "hidden_size": 32})
    said = f"model type '{name}' has no MoE layers (its config names no expert count: num_experts, "
    assert cli("inspect", dense).refusal.startswith(said)
    assert cli(*world.compress(dense, tmp_path / "new", "--keep", 6)).refusal.startswith(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_moe_config_without_a_sparse_layer_is_refused(cli: Cli, tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe").to_dict() | {"mlp_only_layers": [0, 1, 2]}
    said = "model type 'qwen3_moe' has no MoE layers that transformers runs as stacked experts"
    assert cli("inspect", bare(tmp_path / "dense", config)).refusal == said


@pytest.mark.parametrize("name", REFUSED)
def test_family_that_breaks_the_contract_is_refused_by_name(cli: Cli, tmp_path: Path, name: str) -> None:
    config = tiny_config(name).to_dict()
    refusal = cli("inspect", bare(tmp_path / "model", config)).refusal
    assert refusal.startswith(f"{tmp_path / 'model' / 'config.json'}: model type '{config['model_type']}' ")
    assert " is not supported: " in refusal or "has no MoE layers that transformers runs as stacked" in refusal


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe", "llama4", "gemma4"])
def test_vision_wrapped_model_is_refused_by_name(cli: Cli, tmp_path: Path, name: str) -> None:
    if name not in CONFIG_MAPPING:  # newer than the oldest transformers that is supported
        pytest.skip(f"this transformers has no {name}")
    refusal = cli("inspect", bare(tmp_path / "model", {"model_type": name})).refusal
    assert f"model type '{name}' " in refusal
    assert "multi-modal" in refusal or "vision-wrapped" in refusal


@pytest.mark.parametrize(
    ("name", "method"), [("qwen3_moe", "bitsandbytes"), ("gpt_oss", "quanto"), ("qwen3_moe", "unheard_of")]
)
def test_quantized_source_is_refused_by_name(cli: Cli, world: World, tmp_path: Path, name: str, method: str) -> None:
    config = tiny_config(name).to_dict() | {"quantization_config": {"quant_method": method, "bits": 4}}
    model = bare(tmp_path / "model", config)
    file = model / "config.json"
    said = f"{file}: weights are quantized ({method}): not supported yet; give the bf16 or fp32 original"
    assert cli("inspect", model).refusal == said
    assert cli(*world.calibrate(model, tmp_path / "new")).refusal == said
    assert cli(*world.compress(model, tmp_path / "new", "--keep", 4)).refusal == said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_result_of_moetailor_can_be_inspected(cli: Cli, compressed: Path) -> None:
    found = json.loads(cli("inspect", compressed, "--json").out)
    assert [(layer["slots"], layer["experts"], layer["stand_ins"]) for layer in found["moe"]] == [(8, 6, 2)] * LAYERS


def test_result_of_moetailor_is_refused_as_an_original(
    cli: Cli, world: World, compressed: Path, tmp_path: Path
) -> None:
    file = compressed / "config.json"
    said = f"{file}: this checkpoint is already compressed by moetailor; give the original instead"
    assert cli(*world.compress(compressed, tmp_path / "new", "--keep", 4)).refusal == said
    assert cli(*world.calibrate(compressed, tmp_path / "new")).refusal == said
    assert cli("apply", compressed, world.reap, "-o", tmp_path / "new").refusal == said
    refusal = cli(*world.evaluate(compressed, compressed)).refusal
    assert refusal == f"{compressed}: was written by moetailor; --against takes the original"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda entry: entry.update(version=3), "is of moetailor format 3, this moetailor reads up to 2; update it"),
        (
            lambda entry: entry["layers"]["0"].update(bases=1),
            "layers, 0: unknown keys ['bases'], perhaps of another moetailor",
        ),
        (
            lambda entry: entry["layers"].update({"9": entry["layers"]["0"]}),
            "names layers [9], which are no MoE layers",
        ),
    ],
)
def test_result_of_a_later_moetailor_is_refused(
    cli: Cli, world: World, compressed: Path, tmp_path: Path, edit: Edit, said: str
) -> None:
    later = Path(shutil.copytree(compressed, tmp_path / "later"))
    edit_json(later / "config.json", lambda config: edit(config["quantization_config"]))
    assert said in cli(*world.evaluate(later, world.original)).refusal


# Values that are not finite


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["memory", "stream"])
@pytest.mark.parametrize(("layer", "expert", "name", "value"), [(1, 3, "down_proj", NAN), (0, 5, "gate_up_proj", -INF)])
def test_damaged_expert_is_named(
    cli: Cli, world: World, tmp_path: Path, how: tuple, layer: int, expert: int, name: str, value: float
) -> None:
    def damage(model: PreTrainedModel) -> None:
        getattr(model.model.layers[layer].mlp.experts, name)[expert, 1, 2] = value

    model = save("qwen2_moe", tmp_path / "model", edit=damage)
    refusal = cli(*world.compress(model, tmp_path / "out", "--keep", 6, *how)).refusal
    assert refusal == f"layer {layer}, expert {expert}: {name} holds NaN or Inf; the checkpoint is damaged"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["memory", "stream"])
def test_activations_that_overflow_are_named_with_the_cure(cli: Cli, world: World, tmp_path: Path, how: tuple) -> None:
    def enlarge(model: PreTrainedModel) -> None:
        # Finite in float16, whose largest number is 65,504; the output of the expert is not.
        model.model.layers[1].mlp.experts.gate_up_proj.mul_(100)
        model.model.layers[1].mlp.experts.down_proj.mul_(20_000)

    model = save("qwen2_moe", tmp_path / "model", edit=enlarge)
    refusal = cli(*world.calibrate(model, tmp_path / "half", "--dtype", "float16", *how)).refusal
    assert re.match(r"layer 1, expert \d: outputs are not finite \(\d experts in this layer\)", refusal)
    assert "wider --dtype" in refusal
    assert cli(*world.calibrate(model, tmp_path / "full", *how)).code == 0


def test_damaged_weight_before_the_experts_is_not_called_an_overflow(cli: Cli, world: World, tmp_path: Path) -> None:
    def damage(model: PreTrainedModel) -> None:
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = NAN

    refusal = cli(*world.calibrate(save("qwen2_moe", tmp_path / "model", edit=damage), tmp_path / "new")).refusal
    assert refusal.startswith("layer 1")
    assert "not finite" in refusal
    assert "damaged" in refusal


@pytest.mark.parametrize("layer", [0, 1])
def test_damaged_router_is_named(cli: Cli, world: World, tmp_path: Path, layer: int) -> None:
    def damage(model: PreTrainedModel) -> None:
        model.model.layers[layer].mlp.gate.weight[3, 0] = NAN

    refusal = cli(*world.calibrate(save("qwen2_moe", tmp_path / "model", edit=damage), tmp_path / "new")).refusal
    said = f"layer {layer}, slot 3: the router's gate.weight holds NaN or Inf; the checkpoint is damaged"
    assert refusal == said


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["memory", "stream"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("mlp.experts.down_proj", "expert 5: down_proj is finite as it is stored and overflows in float16 (1 experts"),
        ("mlp.{}.weight", "slot 5: the router's {}.weight is finite as it is stored and overflows in float16 (1 slots"),
    ],
)
def test_weights_that_overflow_are_not_called_damaged(
    cli: Cli, world: World, tmp_path: Path, how: tuple, name: str, part: str, said: str
) -> None:
    """One expert of those that lie one by one and of those that lie stacked, and a router's row."""
    router = {"qwen2_moe": "gate", "gpt_oss": "router"}[name]

    def enlarge(model: PreTrainedModel) -> None:
        model.get_parameter(f"model.layers.1.{part.format(router)}")[5, 1] = 7e4

    model = save(name, tmp_path / "model", edit=enlarge)
    refusal = cli(*world.calibrate(model, tmp_path / "half", "--dtype", "float16", *how)).refusal
    assert refusal == f"layer 1, {said.format(router)} in this layer); calibrate in a wider --dtype"
    assert cli(*world.calibrate(model, tmp_path / "full", *how)).code == 0


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_damage_is_named_before_overflow(cli: Cli, world: World, tmp_path: Path, name: str) -> None:
    def edit(model: PreTrainedModel) -> None:
        model.model.layers[0].mlp.experts.down_proj[2, 1, 2] = 7e4
        model.model.layers[0].mlp.experts.down_proj[6, 1, 2] = INF

    model = save(name, tmp_path / "model", edit=edit)
    refusal = cli(*world.calibrate(model, tmp_path / "half", "--dtype", "float16")).refusal
    assert refusal == "layer 0, expert 6: down_proj holds NaN or Inf; the checkpoint is damaged"


def test_large_finite_weights_are_no_damage() -> None:
    """Their sum is not finite in float32."""
    model = tiny_model("qwen2_moe")
    model.model.layers[0].mlp.experts.down_proj.data[1] = 3e38
    check_weights(model, discover(model.config, model).layers[0], None)
    model.model.layers[0].mlp.experts.down_proj.data[1, 0, 0] = NAN
    with pytest.raises(moetailor.CalibrationError, match=r"^layer 0, expert 1: down_proj holds NaN or Inf$"):
        check_weights(model, discover(model.config, model).layers[0], None)


def test_predictions_that_are_not_finite_are_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    model = save("qwen2_moe", tmp_path / "model", edit=lambda model: model.lm_head.weight.fill_(INF))
    said = "is not finite, since its lm_head.weight holds NaN or Inf; it is damaged"
    assert cli(*world.evaluate(model, world.original)).refusal == f"a prediction of the compressed model {said}"
    assert cli(*world.evaluate(world.original, model)).refusal == f"a prediction of the original {said}"


def test_predictions_that_overflow_are_told_from_weights_that_do(cli: Cli, world: World, tmp_path: Path) -> None:
    large = save("qwen2_moe", tmp_path / "large", edit=lambda model: model.lm_head.weight.fill_(7e4))
    model = save("qwen2_moe", tmp_path / "model", edit=lambda model: model.lm_head.weight.fill_(6e4))
    half = ("--dtype", "float16")
    assert cli(*world.evaluate(large, world.original, *half)).refusal == (
        "a prediction of the compressed model is not finite, since its lm_head.weight is not, in float16; evaluate in "
        "a wider --dtype, which shows whether it is damaged"
    )
    assert cli(*world.evaluate(model, world.original, *half)).refusal == (
        "a prediction of the compressed model is not finite, though its weights are: activations overflow in float16; "
        "evaluate in a wider --dtype"
    )
    assert cli(*world.evaluate(large, world.original)).code == 0


# Text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", b"", "--data {file}: holds no text"),
        ("t.jsonl", b'{"text": "tiny"}', "{file}: 4 tokens of text, at least 48 are needed"),
        (
            "t.jsonl",
            b'{"text": "good"}\n{nope\n',
            "{file}, line 2: expected a row with `messages`, with `prompt` and `completion`, or with `text`",
        ),
        ("t.jsonl", b'{"text": "good"}\n\n{"txt": "a"}\n', "{file}, line 3: expected a row with `messages`"),
        (
            "t.jsonl",
            b'{"text": "good"}\n{"text": 5}\n',
            "{file}, line 2: expected a row with `messages`, with `prompt` and `completion`, or with `text`",
        ),
        ("t.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', "{file}"),
        ("t.txt", b"\xff\xfe\x00", "{file}"),
        ("t.csv", b"text", "--data {file}: ends in .csv; known are .parquet, .jsonl, .json, .txt"),
    ],
)
@pytest.mark.parametrize("verb", ["calibrate", "compress", "evaluate"])
def test_text_that_cannot_be_used_is_refused_and_leaves_nothing(
    cli: Cli, world: World, tmp_path: Path, verb: str, name: str, content: bytes, said: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    calls = {
        "calibrate": ("calibrate", world.original, "-o", tmp_path / "new"),
        "compress": ("compress", world.original, "-o", tmp_path / "new", "--method", "reap", "--keep", 6),
        "evaluate": ("evaluate", world.original, "--against", world.original),
    }
    refusal = cli(*calls[verb], "--data", file, *TEXT).refusal
    assert refusal.startswith(said.format(file=file))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("verb", ["calibrate", "compress", "evaluate", "compare"])
def test_a_dry_run_refuses_a_text_that_is_not_there(cli: Cli, world: World, tmp_path: Path, verb: str) -> None:
    calls = {
        "calibrate": ("calibrate", world.original, "-o", tmp_path / "new", *TEXT, "--data"),
        "compress": ("compress", world.original, "-o", tmp_path / "new", "--method=reap", "--keep=6", *TEXT, "--data"),
        "evaluate": ("evaluate", world.original, "--against", world.original, *TEXT, "--data"),
        "compare": ("compare", world.original, "-o", tmp_path / "new", "--data", world.text, "--held-out"),
    }
    missing = tmp_path / "missing.jsonl"
    assert cli(*calls[verb], missing, "--dry-run").refusal == f"--data {missing}: no such file"


def test_a_dry_run_refuses_a_place_that_is_not_ours(cli: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for call in (
        world.calibrate(world.original, tmp_path),
        ("compare", world.original, "-o", tmp_path, "--data", world.text, "--held-out", world.text),
    ):
        assert f"{tmp_path}: holds notes.txt, and no c" in cli(*call, "--dry-run").refusal


def test_evaluating_refuses_early_what_it_cannot_do(cli: Cli, world: World, compressed: Path) -> None:
    call = world.evaluate(compressed, world.original)
    for more in ((), ("--dry-run",)):
        assert "--stream --tasks: needs" in cli(*call, "--stream", "--tasks", "piqa", *more).refusal
    refusal = cli(*call, "--scratch", compressed / "here").refusal
    assert refusal == f"--scratch {compressed / 'here'}: lies in the model {compressed}; choose another folder"


@pytest.mark.parametrize("verb", ["calibrate", "compress"])
def test_text_is_refused_before_weights_are_loaded(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Original, "load", load)
    (tmp_path / "t.jsonl").write_text("{nope\n")
    call = world.calibrate if verb == "calibrate" else world.compress
    more = () if verb == "calibrate" else ("--keep", 6)
    assert "line 1" in cli(*call(world.original, tmp_path / "new", *more), "--data", tmp_path / "t.jsonl").refusal


@pytest.mark.parametrize("verb", ["calibrate", "compress", "evaluate"])
def test_sequences_longer_than_the_model_takes_are_refused(cli: Cli, world: World, tmp_path: Path, verb: str) -> None:
    calls = {
        "calibrate": world.calibrate(world.original, tmp_path / "new"),
        "compress": world.compress(world.original, tmp_path / "new", "--keep", 6),
        "evaluate": world.evaluate(world.original, world.original),
    }
    refusal = cli(*calls[verb], "--length", 65).refusal
    assert refusal == "--length 65 is more than the model takes (64); use at most 64"


def test_sequences_of_one_token_predict_nothing(cli: Cli, world: World) -> None:
    refusal = cli(*world.evaluate(world.original, world.original, "--length", 1)).refusal
    assert refusal.startswith("--length 1")


@pytest.mark.parametrize("option", [("--sequences", 0), ("--length", 0), ("--batch-size", 0), ("--sample-tokens", 0)])
def test_numbers_below_one_are_usage_errors(cli: Cli, world: World, tmp_path: Path, option: tuple) -> None:
    ran = cli(*world.calibrate(world.original, tmp_path / "new"), *option)
    assert ran.code == 2
    assert str(option[0]) in ran.err
    assert not list(tmp_path.iterdir())


def test_text_that_ends_early_is_noted_with_the_numbers(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli(*world.calibrate(world.original, tmp_path / "new"), "--sequences", 10_000)
    assert ran.code == 0
    assert re.search(r"note: the text ended after [\d,]+ of 480,000 tokens; plans rest on fewer tokens", ran.err)


def test_message_shows_what_the_user_wrote(cli: Cli, world: World, tmp_path: Path) -> None:
    # A terminal library could read :-1: as the name of a picture.
    refusal = cli("calibrate", world.original, "-o", tmp_path / "new", "--data", f"{world.text}:-1", *TEXT).refusal
    assert refusal == f"--data {world.text}:-1: the weight -1 is not positive"


def test_folder_without_a_tokenizer_is_refused(cli: Cli, world: World, original: Path, tmp_path: Path) -> None:
    (original / "tokenizer.json").unlink()
    (original / "tokenizer_config.json").unlink()
    refusal = cli(*world.calibrate(original, tmp_path / "new")).refusal
    assert refusal.startswith(f"{original}: ")
    assert "tokenizer" in refusal
    assert not (tmp_path / "new").exists()


def test_tokenizer_with_more_words_than_the_model_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with quiet_transformers():
        tiny_model("qwen2_moe").save_pretrained(model)  # 128 words
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / file, model)
    for call in (world.calibrate(model, tmp_path / "new"), world.evaluate(model, model)):
        refusal = cli(*call).refusal
        assert "tokenizer" in refusal
        assert "128" in refusal
    assert not (tmp_path / "new").exists()


def test_models_with_other_words_cannot_be_compared(cli: Cli, world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with quiet_transformers():
        tiny_model("qwen2_moe").save_pretrained(model)
    refusal = cli(*world.evaluate(model, world.original)).refusal
    assert refusal.startswith(f"{world.original} cannot be the original of {model}: its ")
    assert refusal.endswith("words: 4096, the model's: 128")


def test_name_of_a_folder_is_printed_as_it_is(cli: Cli, original: Path) -> None:
    # A terminal library could read [red] as a colour and [/] as the end of one.
    named = original.parent / "a[red]b[" / "]"
    named.parent.mkdir()
    original.rename(named)
    ran = cli("inspect", named)
    assert ran.code == 0
    assert str(named) in ran.out


def test_expert_that_no_token_reached_is_noted_and_every_method_goes_on(cli: Cli, world: World, tmp_path: Path) -> None:
    def silence(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.router.bias[3] = -1e4

    model = save("gpt_oss", tmp_path / "model", edit=silence)
    for method in ("reap", "mone", "conmoe"):
        out = tmp_path / method
        more = ("--keep", 6, "--calibration", tmp_path / "calibration")
        ran = cli(*world.compress(model, out, *more, method=method))
        assert ran.code == 0
        note = "note: 1 experts were reached by no token (layer 1: 1); more or broader text would tell what they do"
        assert note in ran.err
        assert (out / "config.json").exists()
    # The constant of an expert without a token is zero.
    moetailor.make_plan(
        moetailor.Calibration.open(tmp_path / "calibration"), "mone", moetailor.Budget(keep=4), protect=[(1, 0)]
    ).save(tmp_path / "plan.json")
    plan = moetailor.Plan.load(tmp_path / "plan.json").by_layer[1]
    constants = list(plan.of(Constant))
    assert 3 in constants
    arguments = ("apply", model, tmp_path / "plan.json", "-o", tmp_path / "out", "--calibration")
    assert cli(*arguments, tmp_path / "calibration").code == 0
    stored = open_checkpoint(tmp_path / "out").tensors
    constant = stored["model.layers.1.mlp.experts.constant"].read()
    assert constant[constants.index(3)].count_nonzero() == 0
    assert constant.isfinite().all()


# Methods, parameters and budgets


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("reep", (), "no method 'reep'; did you mean 'reap'? Known: "),
        ("zzz", (), "no method 'zzz'. Known: "),
        (
            "mone",
            ("novise=mean",),
            "method 'mone' has no parameter 'novise'; did you mean 'novice'? Known: frequency, ",
        ),
        ("mone", ("novice=meen",), "parameter novice=meen; did you mean 'mean'? Known: gate_mean, mean, optimal, zero"),
        ("mone", ("score=fusoin",), "parameter score=fusoin; did you mean 'fusion'? Known: exact, frequency, fusion"),
        ("conmoe", ("distance=weight",), "parameter distance=weight; did you mean 'weights'? Known: functional"),
        ("mone", ("shrinkage=abc",), "method 'mone': shrinkage=abc is not of type float (default 0.0)"),
        ("random", ("seed=1.5",), "method 'random': seed=1.5 is not of type int (default 0)"),
        ("conmoe", ("scale=maybe",), "method 'conmoe': scale=maybe is not of type bool (default False)"),
        ("reap", ("seed=1",), "method 'reap' has no parameter 'seed'; it has none"),
        ("mone", ("shrinkage=nan",), "method 'mone': shrinkage=nan"),
        ("mone", ("shrinkage=-3",), "method 'mone': shrinkage=-3"),
        ("conmoe", ("distance=functional", "tokens=0"), "method 'conmoe': tokens=0"),
        ("conmoe", ("distance=functional", "tokens=-5"), "method 'conmoe': tokens=-5"),
    ],
)
def test_unknown_method_or_parameter_is_refused_with_and_without_data(
    cli: Cli, world: World, tmp_path: Path, method: str, parameters: tuple[str, ...], said: str
) -> None:
    options = [option for entry in parameters for option in ("--param", entry)]
    assert cli(*world.plan(tmp_path / "plan.json", "--keep", 6, *options, method=method)).refusal.startswith(said)
    call = world.compress(world.original, tmp_path / "out", "--keep", 6, *options, "--dry-run", method=method)
    assert cli(*call).refusal.startswith(said)
    assert not list(tmp_path.iterdir())


def test_parameter_of_another_type_is_refused_from_python(world: World) -> None:
    calibration, budget = moetailor.Calibration.open(world.calibration), moetailor.Budget(keep=6)
    with pytest.raises(moetailor.PlanError, match=r"method 'random': seed=1.5 is not of type int \(default 0\)"):
        moetailor.make_plan(calibration, "random", budget, parameters={"seed": 1.5})
    with pytest.raises(
        moetailor.PlanError, match=r"method 'mone': shrinkage=None is not of type float \(default 0.0\)"
    ):
        moetailor.make_plan(calibration, "mone", budget, parameters={"shrinkage": None})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "0 budgets given; give exactly one of --remove, --keep, --size and --memory"),
        (
            ("--keep", 6, "--remove", "25%"),
            "2 budgets given; give exactly one of --remove, --keep, --size and --memory",
        ),
        (("--keep", 6, "--remove", "25%", "--size", "1GB"), "3 budgets given; give exactly one of"),
        (("--keep", 0), "--keep 0: the layers have 8 experts; keep 1 to 8"),
        (("--keep", 9), "--keep 9: the layers have 8 experts; keep 1 to 8"),
        (("--keep", 1), "model.layers.0: plan leaves 1 slots but the router picks 2 per token; keep at least 2"),
        (("--remove", "99%"), "model.layers.0: plan leaves 1 slots but the router picks 2 per token; keep at least 2"),
        (("--remove", "25"), "--remove 25: must be at least 0% and below 100%; did you mean 25%?"),
        (("--remove", "abc"), "--remove abc: not a share; write 25% or 0.25"),
        (("--size", "12XB"), "--size 12XB: not a size; write bytes, or a number with a unit, such as 12GB (10^9)"),
        (("--keep", 6, "--layers", "2"), "--layers: [2] are no MoE layers; those are 0, 1"),
        (("--keep", 6, "--protect", "0:8"), "--protect 0:8: no such expert; MoE layers are 0, 1"),
        (("--keep", 6, "--protect", "0:-1"), "--protect 0:-1: no such expert; MoE layers are 0, 1"),
        (("--keep", 6, "--protect", "2:0"), "--protect 2:0: no such expert; MoE layers are 0, 1"),
        (
            ("--keep", 2, "--protect", "1:0", "--protect", "1:5", "--protect", "1:7"),
            "layer 1: 3 experts are protected, the budget keeps 2; protect fewer",
        ),
    ],
)
def test_budget_that_cannot_be_met_is_refused_with_and_without_data(
    cli: Cli, world: World, tmp_path: Path, options: tuple, said: str
) -> None:
    assert cli(*world.plan(tmp_path / "plan.json", *options)).refusal.startswith(said)
    assert cli(*world.compress(world.original, tmp_path / "out", *options)).refusal.startswith(said)
    assert not list(tmp_path.iterdir())


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of a checkpoint."""
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("method", ["reap", "mone", "conmoe"])
def test_size_below_the_least_possible_names_the_least(cli: Cli, world: World, tmp_path: Path, method: str) -> None:
    least = {
        # Dropping leaves the router as many slots as it picks; the others leave all slots and one expert.
        "reap": tensor_bytes(world.original) - LAYERS * (EXPERTS - TOP_K) * (EXPERT_BYTES + SLOT_BYTES),
        "mone": tensor_bytes(world.original) - LAYERS * (EXPERTS - 1) * (EXPERT_BYTES - VECTOR_BYTES),
        "conmoe": tensor_bytes(world.original) - LAYERS * (EXPERTS - 1) * EXPERT_BYTES,
    }[method]
    refusal = cli(*world.plan(tmp_path / "plan.json", "--size", least - 1, method=method)).refusal
    assert f"a budget of {least - 1:,} bytes" in refusal
    assert f"{least:,} bytes; ask for at least that" in refusal
    assert cli(*world.plan(tmp_path / "plan.json", "--size", least, method=method)).code == 0
    assert moetailor.Plan.load(tmp_path / "plan.json").nbytes == least


def test_more_protected_than_kept_is_refused_without_data(cli: Cli, world: World, tmp_path: Path) -> None:
    protect = [option for expert in range(7) for option in ("--protect", f"0:{expert}")]
    for method in ("reap", "mone", "conmoe"):
        call = world.compress(world.original, tmp_path / "out", "--keep", 6, *protect, "--dry-run", method=method)
        assert cli(*call).refusal == "layer 0: 7 experts are protected, the budget keeps 6; protect fewer"


@pytest.mark.parametrize(
    "options",
    [
        ("--layers", "x"),
        ("--layers", "0-"),
        ("--layers", "1-0"),
        ("--protect", "0"),
        ("--param", "seed"),
        ("--keep", "x"),
    ],
)
def test_option_that_cannot_be_read_is_a_usage_error(
    cli: Cli, world: World, tmp_path: Path, options: tuple[str, str]
) -> None:
    ran = cli(*world.plan(tmp_path / "plan.json", "--keep", 6, *options, method="random"))
    assert ran.code == 2
    assert options[0] in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "float46"), "unknown dtype 'float46'; did you mean 'float16'? Known: bfloat16, float16, float32"),
        (("--device", "gpu"), "device 'gpu' cannot be used here ("),
    ],
)
def test_word_that_is_none_is_refused(
    cli: Cli, world: World, tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    assert cli(*world.calibrate(world.original, tmp_path / "new", *options)).refusal.startswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--states", "dsk"), ("--format", "naitve")])
def test_choice_that_is_none_is_a_usage_error(cli: Cli, world: World, tmp_path: Path, options: tuple[str, str]) -> None:
    ran = cli(*world.compress(world.original, tmp_path / "out", "--keep", 6, *options))
    assert ran.code == 2
    assert options[0] in ran.err
    assert options[1] in ran.err
    assert not list(tmp_path.iterdir())


def test_choice_that_is_none_is_refused_from_python(world: World, tmp_path: Path) -> None:
    text = moetailor.TextOptions(data=(str(world.text),))
    with pytest.raises(moetailor.CalibrationError, match="'dsk'; did you mean 'disk'"):
        moetailor.calibrate(world.original, tmp_path / "new", text=text, states="dsk")  # type: ignore[arg-type]
    with pytest.raises(moetailor.PlanError, match="unknown format 'naitve'"):
        moetailor.apply(moetailor.Plan.load(world.reap), world.original, tmp_path / "out", format="naitve")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    for how in ((), ("--stream",)):
        refusal = cli(*world.calibrate(world.original, tmp_path / "new", "--device", "cuda", *how)).refusal
        assert "'cuda'" in refusal
    assert not list(tmp_path.iterdir())


# Routers that choose among groups


def test_group_limited_router_needs_equal_groups(
    cli: Cli, world: World, grouped: tuple[Path, Path], tmp_path: Path
) -> None:
    original, calibration = grouped
    plan = ("plan", calibration, "-o", tmp_path / "plan.json", "--method", "reap", "--keep")
    for keep in (7, 8, 10):
        said = (
            f"--keep {keep}: the router chooses among 3 groups of equal size and reap drops slots; keep a multiple of 3"
        )
        assert cli(*plan, keep).refusal == said
        assert cli(*world.compress(original, tmp_path / "out", "--keep", keep)).refusal == said
    assert cli(*plan, 3).refusal.startswith("model.layers.1: plan leaves 1 slots in each group, the router scores gro")
    assert cli(*plan, 6).code == 0
    # The dense layer 0 has nothing to choose from.
    assert cli(*plan, 6, "--layers", "0").refusal == "--layers: [0] are no MoE layers; those are 1, 2"


def test_least_size_of_a_group_limited_router_works(cli: Cli, grouped: tuple[Path, Path], tmp_path: Path) -> None:
    plan = ("plan", grouped[1], "-o", tmp_path / "plan.json", "--method", "reap", "--size")
    refusal = cli(*plan, 1000).refusal
    # Two of four experts stay in each of three groups: 6 of 12 go, with their row and their correction bias.
    least = tensor_bytes(grouped[0]) - 2 * 6 * (EXPERT_BYTES + SLOT_BYTES + 4)
    assert f"{least:,} bytes; ask for at least that" in refusal
    assert cli(*plan, least).code == 0


def test_constants_need_no_equal_groups(cli: Cli, grouped: tuple[Path, Path], tmp_path: Path) -> None:
    ran = cli("plan", grouped[1], "-o", tmp_path / "plan.json", "--method", "mone", "--keep", 7)
    assert ran.code == 0


def test_too_many_protected_in_a_group_are_refused(cli: Cli, grouped: tuple[Path, Path], tmp_path: Path) -> None:
    protect = [option for expert in (4, 5, 6) for option in ("--protect", f"2:{expert}")]
    ran = cli("plan", grouped[1], "-o", tmp_path / "plan.json", "--method", "reap", "--keep", 6, *protect)
    assert ran.refusal.startswith("layer 2, group 1: 3 experts are protected, the budget keeps 2 of each group")


def test_hand_edited_plan_with_unequal_groups_is_refused(cli: Cli, grouped: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert cli("plan", grouped[1], "-o", file, "--method", "reap", "--keep", 6).code == 0
    layer = {"experts": 12, "keep": [0, 1, 2, 3, 4, 5], "drop": [6, 7, 8, 9, 10, 11]}
    edit_json(file, lambda plan: plan["layers"].update({"model.layers.2": layer}))
    assert cli("apply", grouped[0], file, "-o", tmp_path / "out").refusal == (
        "model.layers.2: the router chooses among 3 groups of equal size; the plan leaves [4, 2, 0]; "
        "drop as many in each"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.json.log"]


# Plans


@pytest.fixture
def plan(world: World, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a plan and edits its JSON."""

    def copy(edit: Edit, method: str = "reap") -> Path:
        return edit_json(Path(shutil.copy(getattr(world, method), tmp_path / "plan.json")), edit)

    return copy


def test_plan_for_another_model_is_refused(cli: Cli, world: World, grouped: tuple[Path, Path], tmp_path: Path) -> None:
    for more in ((), ("--allow-other-weights",)):
        refusal = cli("apply", grouped[0], world.reap, "-o", tmp_path / "out", *more).refusal
        said = "the plan is for another model: its model type is qwen2_moe, this model has deepseek_v3"
        assert refusal == said
    assert not list(tmp_path.iterdir())


def test_plan_for_other_weights_needs_a_word(cli: Cli, world: World, sibling: Path, tmp_path: Path) -> None:
    call = ("apply", sibling, world.reap, "-o", tmp_path / "out")
    assert cli(*call).refusal == (
        "the plan was made for other weights of the same shapes; "
        "calibrate this model, or pass --allow-other-weights on purpose"
    )
    assert not list(tmp_path.iterdir())
    assert cli(*call, "--allow-other-weights").code == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_plan_fits_the_same_model_in_another_dtype(cli: Cli, world: World, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(world.original, dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    call = ("apply", tmp_path / "half", world.mone, "-o", tmp_path / "out", "--calibration", world.calibration)
    found = cli(*call, "--allow-other-weights")
    assert found.code == 0
    # The plan's bytes are counted anew: it was made for numbers of four bytes.
    carried, planned = (moetailor.Plan.load(file) for file in (tmp_path / "out" / "moetailor_plan.json", world.mone))
    assert carried.nbytes < planned.nbytes
    assert f"{carried.nbytes / 1000:.2f} kB, the original has {carried.model.nbytes / 1000:.2f} kB" in found.err


def test_plan_for_a_layer_that_the_checkpoint_lacks_is_refused(
    cli: Cli, world: World, plan: Callable[..., Path], tmp_path: Path
) -> None:
    def predict_more(content: dict) -> None:
        """Add a layer for multi-token prediction, which models of equal shapes may have or not."""
        content["model"]["stacks"].append(content["model"]["stacks"][0] | {"prefix": "model.layers.9", "index": None})
        content["layers"]["model.layers.9"] = content["layers"]["model.layers.0"]

    out = tmp_path / "out"
    refusal = cli("apply", world.original, plan(predict_more), "-o", out, "--allow-other-weights").refusal
    assert refusal == f"{world.original}: has no model.layers.9, which the plan changes"
    assert not out.exists()


def test_balance_above_one_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    calibrated = tmp_path / "c"
    assert cli(*world.calibrate(world.original, calibrated), "--sensitivity").code == 0
    call = ("plan", calibrated, "-o", tmp_path / "p", "--method", "auto", "--remove", "25%", "-p", "balance=2")
    assert cli(*call).refusal == "balance=2.0: at 1 all domains count alike; give a number from 0 to 1"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda plan: plan.update(version=2), "{file}: a plan of version 2, this moetailor reads 1"),
        (lambda plan: plan.pop("layers"), "{file}: it lacks layers"),
        (lambda plan: plan.update(layers=[]), "{file}: layers is [], not an object"),
        (
            lambda plan: plan["layers"].update({"model.layers.0": {"experts": 8, "keep": [0, 1, 2, 2], "drop": []}}),
            "{file}, model.layers.0: slot 2 is named twice",
        ),
        (
            lambda plan: plan["layers"]["model.layers.0"].update(scores=[0.5] * 9),
            "{file}, model.layers.0, scores: 9 for 8 experts",
        ),
        (
            lambda plan: plan["layers"].update({"model.layers.0": {"experts": 8, "keep": [0, 1], "drop": [2, 3, 4]}}),
            "{file}, model.layers.0: slots [5, 6, 7] are not named; each of 8 needs one of "
            + ", ".join(kind for kind in ANSWERS if kind != "packed"),
        ),
        (
            lambda plan: plan["layers"].update({"model.layers.0": {"experts": 7, "keep": [0, 1, 2, 3, 4, 5, 6]}}),
            "model.layers.0: the plan has 7 slots, the layer 8",
        ),
        (
            lambda plan: plan["layers"].update({"model.layers.5": plan["layers"]["model.layers.0"]}),
            "the plan names layer 'model.layers.5', which is no MoE layer; those are model.layers.0, model.layers.1",
        ),
        (
            lambda plan: plan["layers"].update({"model.layers.0": {"experts": 8, "constant": list(range(8))}}),
            "model.layers.0: plan keeps no expert; keep at least 1",
        ),
        (
            lambda plan: plan["layers"].update(
                {"model.layers.0": {"experts": 8, "keep": [0, 1, 2, 3, 4, 5], "constant": [6, 7]}}
            ),
            "the plan has constant slots, which method 'reap' does not compute; "
            "set its method to one that does: auto, compressed_experts, linear, mone",
        ),
    ],
)
def test_edited_plan_that_does_not_work_is_refused(
    cli: Cli, world: World, plan: Callable[..., Path], old: Path, tmp_path: Path, edit: Edit, said: str
) -> None:
    file = plan(edit)
    before = state(tmp_path)
    refusal = cli("apply", world.original, file, "-o", old, "--overwrite").refusal
    assert refusal.startswith(said.format(file=file))
    assert state(tmp_path) == before


def test_file_that_is_no_plan_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = "not a moetailor plan; make one with `moetailor plan`"
    manifest = world.calibration / "calibration.json"
    assert cli("apply", world.original, manifest, "-o", out).refusal == f"{manifest}: {said}"
    text = cli("apply", world.original, world.text, "-o", out).refusal
    assert text.startswith(f"{world.text}: not JSON that can be read (")
    none = tmp_path / "none.json"
    said = f"{none}: cannot be read (No such file or directory); make one with `moetailor plan`"
    assert cli("apply", world.original, none, "-o", out).refusal == said


def test_advice_to_set_the_method_works_when_it_is_followed(
    cli: Cli, world: World, plan: Callable[..., Path], tmp_path: Path
) -> None:
    def edit(content: dict) -> None:
        content["method"] = "mone"
        content["layers"]["model.layers.0"] = {"experts": 8, "keep": [0, 1, 2, 3, 4, 5], "constant": [6, 7]}

    ran = cli("apply", world.original, plan(edit), "-o", tmp_path / "out", "--calibration", world.calibration)
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda plan: plan.update(method="mona"), "no method 'mona'; did you mean 'mone'? Known: "),
        (lambda plan: plan["parameters"].update(novice="meen"), "parameter novice=meen; did you mean 'mean'?"),
        (lambda plan: plan["parameters"].update(novise="mean"), "method 'mone' has no parameter 'novise'; did you"),
        (
            lambda plan: plan["parameters"].update(shrinkage="much"),
            "method 'mone': shrinkage=much is not of type float",
        ),
        (lambda plan: plan["parameters"].update(shrinkage=[1]), "parameters['shrinkage'] is [1], not a text or"),
    ],
)
def test_edited_method_or_parameter_is_refused_before_writing(
    cli: Cli,
    world: World,
    plan: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Edit,
    said: str,
) -> None:
    def write(*arguments: object) -> None:
        raise AssertionError("weights were written")

    monkeypatch.setattr("moetailor.transform.disk.write_shards", write)
    file = plan(edit, "mone")
    ran = cli("apply", world.original, file, "-o", tmp_path / "out", "--calibration", world.calibration)
    assert ran.refusal.removeprefix(f"{file}: ").startswith(said)
    assert list(tmp_path.iterdir()) == [file]


def test_constants_need_the_calibration_of_the_plan(cli: Cli, world: World, sibling: Path, tmp_path: Path) -> None:
    call = ("apply", world.original, world.mone, "-o", tmp_path / "out")
    assert cli(*call).refusal == (
        "the plan has constant slots, which are computed from the calibration; name it with --calibration"
    )
    assert cli(*world.calibrate(sibling, tmp_path / "other")).code == 0
    assert cli(*call, "--calibration", tmp_path / "other").refusal == (
        f"{tmp_path / 'other'}: not the calibration that the plan was made from; give that one, or plan again"
    )
    none = tmp_path / "none"
    assert cli(*call, "--calibration", none).refusal == f"{none}: no calibration folder"
    assert not (tmp_path / "out").exists()


def test_native_format_cannot_hold_constants(cli: Cli, world: World, tmp_path: Path) -> None:
    said = (
        "format native holds dropped slots only, the same number in every MoE layer; "
        "this plan keeps [6] experts in 2 of 2 layers and has stand-ins or remaps; format moetailor can hold it"
    )
    out = tmp_path / "out"
    call = ("apply", world.original, world.mone, "-o", out, "--calibration", world.calibration, "--format", "native")
    assert cli(*call).refusal == said
    assert cli(*world.compress(world.original, out, "--keep", 6, "--format", "native", method="mone")).refusal == said
    assert not list(tmp_path.iterdir())


def test_native_format_cannot_hold_counts_that_differ(cli: Cli, world: World, tmp_path: Path) -> None:
    call = world.compress(world.original, tmp_path / "out", "--keep", 6, "--layers", "1", "--format", "native")
    assert cli(*call).refusal == (
        "format native holds dropped slots only, the same number in every MoE layer; "
        "this plan keeps [6] experts in 1 of 2 layers; format moetailor can hold it"
    )


def test_weights_of_another_model_are_not_used_for_a_plan(
    cli: Cli, world: World, sibling: Path, grouped: tuple[Path, Path], tmp_path: Path
) -> None:
    for other in (sibling, grouped[0]):
        call = world.plan(tmp_path / "plan.json", "--keep", 6, "--model", other, method="conmoe")
        assert "not the model that was calibrated" in cli(*call).refusal
    assert not list(tmp_path.iterdir())


def test_weights_that_were_moved_are_asked_for(cli: Cli, world: World, original: Path, tmp_path: Path) -> None:
    assert cli(*world.calibrate(original, tmp_path / "moved calibration")).code == 0
    original.rename(tmp_path / "moved")
    call = ("plan", tmp_path / "moved calibration", "-o", tmp_path / "plan.json", "--method", "conmoe", "--keep", 6)
    refusal = cli(*call).refusal
    assert refusal.startswith(f"{original}: no such folder")
    assert "--model" in refusal
    assert cli(*call, "--model", tmp_path / "moved").code == 0


# Calibration folders


def test_unfinished_calibration_is_refused_with_the_cure(cli: Cli, world: World, calibration: Path) -> None:
    (calibration / "calibration.json").unlink()
    said = f"{calibration}: not finished; run the same calibrate command again to resume it"
    call = ("plan", calibration, "-o", calibration.with_name("plan.json"), "--method", "reap", "--keep", 6)
    assert cli(*call).refusal == said
    (calibration / "layer-0001.safetensors").unlink()
    assert cli(*call).refusal == said
    # Killed in its first layer
    (calibration / "layer-0000.safetensors").unlink()
    assert cli(*call).refusal == said
    assert cli(*world.calibrate(world.original, calibration)).code == 0
    assert cli(*call).code == 0
    for layer in range(LAYERS):
        name = f"layer-{layer:04d}.safetensors"
        assert (calibration / name).read_bytes() == (world.calibration / name).read_bytes()


def test_folder_that_is_no_calibration_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    more = ("-o", tmp_path / "plan.json", "--method", "reap", "--keep", 6)
    for folder in (tmp_path / "none", world.original, world.text):
        assert cli("plan", folder, *more).refusal == f"{folder}: no calibration folder"


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        "[1]",
        "3",
        "{}",
        '{"format": "moetailor-calibration", "version": 2}',
        '{"format": "moetailor-calibration", "version": 1}',
        '{"format": "moetailor-calibration", "version": 1, "model": {}, "fingerprint": {}}',
    ],
)
def test_damaged_manifest_is_refused(cli: Cli, world: World, calibration: Path, manifest: str) -> None:
    file = calibration / "calibration.json"
    file.write_text(manifest)
    call = ("plan", calibration, "-o", calibration.with_name("plan.json"), "--method", "reap", "--keep", 6)
    for arguments in (call, world.calibrate(world.original, calibration)):
        refusal = cli(*arguments).refusal
        assert refusal.startswith(f"{file}: ")
        assert "calibrate again" in refusal
    assert file.read_text() == manifest


def test_calibration_of_another_run_is_kept_apart(cli: Cli, world: World, sibling: Path, calibration: Path) -> None:
    before = state(calibration)
    refusal = cli(*world.calibrate(world.original, calibration), "--sequences", 3).refusal
    cure = "choose another folder or delete it"
    assert refusal == f"{calibration}: holds another calibration (text, options differ); {cure}"
    refusal = cli(*world.calibrate(sibling, calibration)).refusal
    assert refusal == f"{calibration}: holds another calibration (model differ); {cure}"
    assert state(calibration) == before


def test_folder_with_other_things_is_not_calibrated_into(cli: Cli, world: World, old: Path) -> None:
    refusal = cli(*world.calibrate(world.original, old)).refusal
    assert refusal == f"{old}: holds config.json, moetailor_provenance.json, and no calibration; choose another folder"
    file = world.calibrate(world.original, old / "config.json")
    assert cli(*file).refusal == f"{old / 'config.json'}: is a file; choose another folder"
    assert {f"out/{name}": content for name, content in state(old).items()} == OLD


def test_damaged_layer_file_is_named_and_the_cure_works(cli: Cli, world: World, calibration: Path) -> None:
    file = calibration / "layer-0001.safetensors"
    call = ("plan", calibration, "-o", calibration.with_name("plan.json"), "--method", "reap", "--keep", 6)
    os.truncate(file, 100)
    refusal = cli(*call).refusal
    cure = "delete it and run the same calibrate command again: it measures what is missing"
    assert refusal.startswith(f"{file}: cannot be read (")
    assert refusal.endswith(cure)
    file.unlink()
    assert cli(*call).refusal == f"{file}: missing; {cure}"
    assert cli(*world.calibrate(world.original, calibration)).code == 0
    assert file.read_bytes() == (world.calibration / file.name).read_bytes()
    assert cli(*call).code == 0


def test_layer_file_of_another_model_is_refused(
    cli: Cli, world: World, grouped: tuple[Path, Path], calibration: Path
) -> None:
    file = calibration / "layer-0001.safetensors"
    shutil.copy(grouped[1] / "layer-0001.safetensors", file)
    call = ("plan", calibration, "-o", calibration.with_name("plan.json"), "--method", "frequency", "--keep", 6)
    refusal = cli(*call).refusal
    assert refusal.startswith(f"{file}: holds other values than were written, it is damaged or of another run; ")


# The folder of the result


@pytest.mark.parametrize("verb", ["apply", "compress"])
def test_existing_folder_is_refused_untouched(cli: Cli, world: World, old: Path, tmp_path: Path, verb: str) -> None:
    calls = {
        "apply": ("apply", world.original, world.reap, "-o", old),
        "compress": world.compress(world.original, old, "--keep", 6),
    }
    assert cli(*calls[verb]).refusal == f"{old}: exists; choose another folder or pass --overwrite"
    assert state(tmp_path) == OLD
    assert cli(*calls[verb], "--overwrite").code == 0
    assert (old / "moetailor_plan.json").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "target", ["moetailor.checkpoint.writer._write_shard", "moetailor.transform.disk.provenance", "os.fsync"]
)
def test_full_disk_in_the_middle_keeps_the_old_result(
    cli: Cli, world: World, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, fail)
    refusal = cli("apply", world.original, world.reap, "-o", old, "--overwrite").refusal
    assert refusal == f"{old}: the disk is full; nothing was kept of this run"
    assert state(tmp_path) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_result_that_fails_its_check_does_not_replace_the_old_one(
    cli: Cli, world: World, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*arguments: object, **options: object) -> None:
        raise CheckpointError("decoder layer 1 gives values that are not finite")

    monkeypatch.setattr("moetailor.transform.formats.format.verify_result", verify)
    call = world.compress(world.original, old, "--keep", 6, "--overwrite", "--calibration", world.calibration)
    assert cli(*call).refusal == "decoder layer 1 gives values that are not finite; nothing was kept"
    assert state(tmp_path) == OLD


def test_too_small_a_disk_is_refused_before_writing(
    cli: Cli, world: World, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    planned = moetailor.Plan.load(world.reap).nbytes
    refusal = cli("apply", world.original, world.reap, "-o", old, "--overwrite").refusal
    assert refusal == f"{old}: writing it takes {planned:,} bytes, the disk has 1,000 free"
    assert state(tmp_path) == OLD
    refusal = cli(*world.evaluate(world.original, world.original)).refusal
    assert "evaluate on less text" in refusal
    # 96 tokens of a width of 32 in 4 bytes
    assert f"{96 * 32 * 4:,} bytes" in refusal
    assert "1,000 are free" in refusal


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every safetensors file fail as on a full disk."""

    def fail(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.serialize_file", fail)


@pytest.mark.parametrize("states", ["memory", "disk"])
def test_full_disk_while_calibrating_is_said_and_the_run_resumes(
    cli: Cli, world: World, tmp_path: Path, states: str
) -> None:
    new = tmp_path / "new"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        refusal = cli(*world.calibrate(world.original, new, "--states", states)).refusal
    assert refusal.startswith(str(new))
    assert "No space left on device" in refusal
    assert cli(*world.calibrate(world.original, new, "--states", states)).code == 0
    assert (new / "calibration.json").exists()


def test_full_disk_while_evaluating_is_said(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch)
    assert "No space left on device" in cli(*world.evaluate(world.original, world.original)).refusal


def test_original_is_never_replaced(cli: Cli, world: World, original: Path, tmp_path: Path) -> None:
    before = state(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(original)
    for out in (original, original / ".." / original.name, link):
        for more in ((), ("--overwrite",)):
            refusal = cli("apply", original, world.reap, "-o", out, *more).refusal
            assert "is the original itself; choose another folder" in refusal
        refusal = cli(*world.compress(original, out, "--keep", 6, "--overwrite")).refusal
        assert "is the original itself; choose another folder" in refusal
        assert cli(*world.compress(original, out, "--keep", 6)).refusal
    link.unlink()
    assert state(tmp_path) == before


@pytest.mark.parametrize("verb", ["apply", "compress"])
def test_folder_that_holds_the_original_is_never_replaced(cli: Cli, world: World, original: Path, verb: str) -> None:
    box = original.parent
    before = state(box)
    calls = {
        "apply": ("apply", original, world.reap, "-o", box, "--overwrite"),
        "compress": world.compress(original, box, "--keep", 6, "--overwrite"),
    }
    refusal = cli(*calls[verb]).refusal
    assert refusal.startswith(f"{box}: ")
    assert "the original" in refusal
    assert state(box) == before


def test_folder_that_holds_the_calibration_is_never_replaced(
    cli: Cli, world: World, calibration: Path, tmp_path: Path
) -> None:
    before = state(tmp_path)
    call = ("apply", world.original, world.mone, "-o", tmp_path, "--calibration", calibration, "--overwrite")
    assert "the calibration" in cli(*call).refusal
    inside = tmp_path / "out" / "calibration"
    call = world.compress(world.original, tmp_path / "out", "--keep", 6, "--calibration", inside)
    assert "the calibration" in cli(*call).refusal
    assert state(tmp_path) == before


def test_result_inside_the_original_leaves_the_original_as_it_is(cli: Cli, world: World, original: Path) -> None:
    before = state(original)
    assert cli("apply", original, world.reap, "-o", original / "out").code == 0
    after = state(original)
    assert {name: content for name, content in after.items() if not name.startswith("out/")} == before


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_file_in_the_place_of_the_result_is_kept(cli: Cli, world: World, tmp_path: Path, more: tuple) -> None:
    out = tmp_path / "out"
    out.write_text("notes")
    refusal = cli("apply", world.original, world.reap, "-o", out, *more).refusal
    assert refusal.startswith(f"{out}: ")
    refusal = cli(*world.compress(world.original, out, "--keep", 6, *more)).refusal
    assert refusal.startswith(f"{out}: ")
    assert state(tmp_path) == {"out": b"notes"}


def test_place_that_cannot_hold_the_result_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("notes")
    for call in (
        ("apply", world.original, world.reap, "-o", file / "out"),
        world.calibrate(world.original, file),
        world.calibrate(world.original, file / "calibration"),
        world.plan(tmp_path / "none" / "plan.json", "--keep", 6),
        world.plan(tmp_path, "--keep", 6),
    ):
        assert str(tmp_path) in cli(*call).refusal
    assert state(tmp_path) == {"file": b"notes"}


def test_scores_that_could_not_be_written_are_not_measured(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*arguments: object, **options: object) -> None:
        raise AssertionError("the models were run")

    monkeypatch.setattr(moetailor, "evaluate", evaluate)
    file = tmp_path / "none" / "scores.json"
    assert str(file.parent) in cli(*world.evaluate(world.original, world.original, "--json", file)).refusal


def test_present_folder_as_result_is_refused(
    cli: Cli, world: World, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old)
    for more in ((), ("--overwrite",)):
        assert cli("apply", world.original, world.reap, "-o", ".", *more).refusal.startswith(".: ")
    assert state(tmp_path) == OLD


# The command line itself


def test_stopped_run_says_so_and_leaves_nothing(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moetailor.checkpoint.writer._write_shard", stop)
    ran = cli("apply", world.original, world.reap, "-o", tmp_path / "out")
    assert ran.code == 130
    assert ran.err.strip() == "error: stopped; nothing half-written stays, and the same command can be given again"
    assert not list(tmp_path.iterdir())


def test_mistake_of_our_own_is_no_refusal(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("moetailor.checkpoint.writer._write_shard", fail)
    with pytest.raises(RuntimeError, match="ours"):
        cli("apply", world.original, world.reap, "-o", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_verb_and_option_are_usage_errors(cli: Cli, world: World) -> None:
    assert cli("comprss").code == 2
    ran = cli("inspect", world.original, "--jsn")
    assert ran.code == 2
    assert "--json" in ran.err


def test_refusal_in_a_process_of_its_own(world: World, tmp_path: Path) -> None:
    call = ("apply", world.original, world.mone, "-o", tmp_path / "out")
    code = "from moetailor_cli.app import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, call)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        "error: the plan has constant slots, which are computed from the calibration; name it with --calibration\n"
    )
    assert not list(tmp_path.iterdir())
