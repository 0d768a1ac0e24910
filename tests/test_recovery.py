"""recovery/: losses against plain formulas, what trains and what must not, resuming, accumulating, processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import moetailor
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.files import SINGLE, Checkpoint, open_checkpoint
from moetailor.checkpoint.lock import claimed
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import MoetailorError
from moetailor.recovery.examples import IGNORED
from moetailor.recovery.folder import begin_training, check_training
from moetailor.recovery.fsdp import check_shardable
from moetailor.recovery.loss import Objective, Student, divergence, layer_distance
from moetailor.recovery.recover import check_teacher
from moetailor.recovery.trainable import Adapters, select
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.quantizer import original_config
from support.families import FAMILIES, tiny_model
from support.kills import in_child, kills
from support.methods import TINY_PARAMETERS
from support.tiny import load, logits
from support.training import blocks

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
Compress = Callable[..., Path]
FEW = moetailor.RecoveryOptions(steps=4, batch_size=2, lr=1e-2, save_every=2, lora_rank=2)


@pytest.fixture
def compress(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> Compress:
    """Return a function that writes a tiny model, compressed."""

    def run(method: str, name: str = "olmoe", keep: int = 4, **parameters: Any) -> Path:
        plan = moetailor.make_plan(calibration(name), method, moetailor.Budget.parse(keep=keep), parameters=parameters)
        out = tmp_path / f"{method}-{name}"
        return moetailor.apply(plan, checkpoint(name), out, calibration=calibration(name))  # type: ignore[return-value]

    return run


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: info.read() for name, info in checkpoint.tensors.items()}


def changed(before: Path, after: Path) -> set[str]:
    """Return the tensors on disk that differ in a bit; shapes, dtypes and names must be equal."""
    first, second = open_checkpoint(before), open_checkpoint(after)
    described = [{n: (i.dtype, i.shape) for n, i in opened.tensors.items()} for opened in (first, second)]
    assert described[0] == described[1]
    one, two = tensors(first), tensors(second)
    return {name for name in one if not torch.equal(one[name], two[name])}


# Losses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_plain_formula(temperature: float) -> None:
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)
    expected = 0.0
    for row in range(5):
        p, q = (torch.softmax(logits[row].double() / temperature, 0) for logits in (teacher, student))
        expected += temperature**2 * float(sum(p[v] * torch.log(p[v] / q[v]) for v in range(7)))
    torch.testing.assert_close(float(divergence(teacher, student, temperature)), expected, rtol=1e-5, atol=1e-6)


def test_layer_distance_is_the_plain_formula() -> None:
    teacher, student = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    expected = 0.0
    for block, place in ((0, 0), (0, 2), (1, 2)):
        for layer in (1, 2):  # 0 is the embeddings
            goal, given = teacher[layer, block, place], student[layer, block, place]
            expected += float((given - goal).norm() ** 2 / goal.norm() ** 2) / 2
    torch.testing.assert_close(
        float(layer_distance(list(teacher), list(student), counted)), expected, rtol=1e-5, atol=1e-6
    )


def test_the_loss_is_a_mean_over_tokens_that_count(checkpoint: Get) -> None:
    model, data = load(checkpoint("olmoe")), blocks(3)
    student = Student(model, Objective(loss="task"))
    found = student(data.input_ids, data.labels)["loss"]
    values = []
    with torch.no_grad():
        logp = torch.log_softmax(model(data.input_ids).logits, -1)
    for block in range(3):
        for place in range(1, 10):
            if data.labels[block, place] != IGNORED:
                values.append(-logp[block, place - 1, data.input_ids[block, place]])
    assert len(values) == data.counted
    torch.testing.assert_close(found, torch.stack(values).mean())
    torch.testing.assert_close(student(data.input_ids, data.labels, torch.tensor(1000))["loss"] * 1000, sum(values))


def test_a_model_is_no_distance_from_itself(checkpoint: Get) -> None:
    student = Student(load(checkpoint("olmoe")), Objective(loss="kd", layer_weight=1.0), load(checkpoint("olmoe")))
    data = blocks(2)
    with torch.no_grad():
        found = student.sums(data.input_ids, data.labels, ("kd", "layer"))
    assert all(abs(float(value)) < 1e-6 for value in found.values()), found


def test_the_teacher_is_no_part_of_the_student(checkpoint: Get) -> None:
    model, teacher = load(checkpoint("olmoe")), load(checkpoint("olmoe"))
    model.requires_grad_(False).lm_head.requires_grad_(True)
    student = Student(model, Objective(), teacher)
    assert set(student.state_dict()) == {"model.lm_head.weight"}
    assert len(list(student.parameters())) == len(list(model.parameters()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.teacher is teacher


# What trains


@pytest.mark.parametrize(
    ("method", "words", "parts"),
    [
        ("reap", ("router",), (".gate.weight",)),
        ("linear", ("router", "standins"), (".gate.weight", ".linear_constant", ".linear_in", ".linear_out")),
        ("mone", ("standins",), (".constant",)),
        ("mone", ("experts",), (".experts.",)),
        ("reap", ("rest",), ("_proj.weight",)),
    ],
)
def test_only_what_was_selected_changes(
    compress: Compress, checkpoint: Get, tmp_path: Path, method: str, words: Sequence[str], parts: tuple[str, ...]
) -> None:
    before, out = compress(method), tmp_path / "out"
    given = {"examples": blocks(), "teacher": checkpoint("olmoe"), "options": FEW}
    moetailor.recover(before, out, train=words, **given)
    wanted = {name for name in open_checkpoint(before).tensors if any(part in name for part in parts)}
    if words == ("experts",):
        wanted -= {name for name in wanted if name.endswith(".constant")}
    if words == ("rest",):
        wanted = {name for name in wanted if ".self_attn." in name}
    assert changed(before, out) == wanted
    assert (out / "config.json").read_bytes() == (before / "config.json").read_bytes()
    assert not out.with_name("out.training").exists()


def test_an_original_takes_adapters_too(checkpoint: Get, tmp_path: Path) -> None:
    """Its shared experts and dense layers among the rest; peft alone would take their names for the routed ones."""
    for name, part in (("qwen3_next", "shared_expert."), ("qwen3_moe", "model.layers.0.mlp.")):
        moetailor.recover(
            checkpoint(name), tmp_path / name, examples=blocks(), train=["rest"], loss="task", options=FEW
        )
        found = changed(checkpoint(name), tmp_path / name)
        assert not any(".experts." in key or key.endswith((".gate.weight", "lm_head.weight")) for key in found)
        assert {f"{which}_proj" for which in ("gate", "up", "down")} <= {
            key.split(".")[-2] for key in found if part in key
        }


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("conmoe", {"scope": 2}), ("linear", {}), ("reap", {}), ("lightmoe", {"rank": 2, "bases": 2})],
)
def test_merged_adapters_give_the_same_logits(compress: Compress, method: str, parameters: dict) -> None:
    model = load(compress(method, **parameters))
    before = logits(model)
    anatomy = discover(original_config(model.config))
    words = ["all"]
    adapters = Adapters(model, anatomy, select(model, anatomy, words), rank=2, alpha=4)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)  # adapters begin as nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    visits = [(m, host) for m in model.modules() if isinstance(m, CompressedExperts) for host in m.lenders]
    assert bool(visits) == (method == "conmoe")
    for module, host in visits:
        assert module.lenders[host] is model.model.layers[host].mlp.experts
        assert not isinstance(module.lenders[host], CompressedExperts)  # but what wraps it
    adapters.merge()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
    for module, host in visits:
        assert module.lenders[host] is model.model.layers[host].mlp.experts
        assert isinstance(module.lenders[host], CompressedExperts)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_parameters())


# Round trips


@pytest.mark.parametrize(
    ("method", "words", "parameters"),
    [
        ("reap", ["router", "rest"], {}),
        ("mone", ["all"], {}),
        ("linear", ["standins"], {}),
        ("conmoe", ["all"], {"scope": 2}),
        ("lightmoe", ["standins", "experts"], {"rank": 2, "bases": 2, "start": "svd"}),
        ("compressed_experts", ["all"], {"main": 1, "constants": True}),
    ],
)
def test_the_result_is_what_was_trained(
    compress: Compress, checkpoint: Get, tmp_path: Path, method: str, words: list[str], parameters: dict
) -> None:
    before, held = compress(method, **parameters), blocks(4, seed=9)
    given = {"examples": blocks(), "held_out": held, "teacher": checkpoint("olmoe"), "options": FEW}
    result = moetailor.recover(before, tmp_path / "out", train=words, loss="both", **given)
    assert (result.steps, result.tokens, len(result.losses)) == (4, 4 * 2 * 10, 4)
    assert {file.name for file in before.iterdir()} <= {file.name for file in result.out.iterdir()}
    told = json.loads((result.out / "moetailor_provenance.json").read_text())
    assert told["method"] == method
    assert told["recovery"]["train"] == (["router", "standins", "experts", "rest"] if words == ["all"] else words)
    assert "Trained further by moetailor" in (result.out / "README.md").read_text()
    # The means before and after are those of the checkpoints, loaded anew.
    for folder, means in ((before, result.before), (result.out, result.after)):
        student = Student(load(folder), Objective(loss="both"), load(checkpoint("olmoe")))
        with torch.no_grad():
            for name, total in student.sums(held.input_ids, held.labels, ("task", "kd")).items():
                assert means[name] == pytest.approx(float(total) / held.counted, rel=1e-4), name
    text = load(result.out).generate(held.input_ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert text.shape == (1, 13)


@pytest.mark.parametrize("train", ["router", "experts"])
def test_names_on_disk_stay_those_of_a_bare_decoder(compress: Compress, tmp_path: Path, train: str) -> None:
    """Some checkpoints leave the `model.` of every name away; transformers puts it back."""
    before = compress("reap")
    named = before / SINGLE
    save_file({k.removeprefix("model."): t for k, t in load_file(named).items()}, named, {"format": "pt"})
    moetailor.recover(before, tmp_path / "out", examples=blocks(), loss="task", train=train, options=FEW)
    assert changed(before, tmp_path / "out")


def test_what_could_not_be_written_is_refused_before_the_training(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(model: object, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{name}.{part}": tensor for name, tensor in made.items() for part in ("one", "two")}

    monkeypatch.setattr("moetailor.recovery.result.disk_tensors", elsewhere)
    monkeypatch.setattr("moetailor.recovery.recover.train_student", lambda *args, **given: pytest.fail("it trained"))
    with pytest.raises(moetailor.CheckpointError, match="does not lie there as transformers would write it"):
        moetailor.recover(
            compress("reap"), tmp_path / "out", examples=blocks(), loss="task", train="router", options=FEW
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_whole(checkpoint: Get, tmp_path: Path, name: str) -> None:
    held = blocks(4, seed=9)
    options = moetailor.RecoveryOptions(steps=2, lr=1e-2, layer_weight=0.1, gradient_checkpointing=True)
    given = {"examples": blocks(), "held_out": held, "teacher": checkpoint(name), "options": options}
    result = moetailor.recover(checkpoint(name), tmp_path / "out", train=["all"], loss="both", **given)
    assert abs(result.before["kd"]) < 1e-6
    assert result.after["task"] != result.before["task"]
    student = Student(load(result.out), Objective(loss="task"))
    with torch.no_grad():
        mean = float(student.sums(held.input_ids, held.labels, ("task",))["task"]) / held.counted
    assert result.after["task"] == pytest.approx(mean, rel=1e-4)


def test_training_lowers_what_is_minimised(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    data = blocks()
    options = moetailor.RecoveryOptions(epochs=30, batch_size=8, lr=1e-2, gradient_checkpointing=True)
    given = {"examples": data, "held_out": data, "teacher": checkpoint("olmoe"), "options": options}
    result = moetailor.recover(compress("mone"), tmp_path / "out", train=["router", "standins"], **given)
    assert result.steps == 30
    assert result.after["kd"] < 0.7 * result.before["kd"]
    assert result.losses[0] == pytest.approx(result.before["kd"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "parameters"), [("linear", {}), ("conmoe", {"scope": 2}), ("lightmoe", {"rank": 2, "bases": 2})]
)
def test_bfloat16_trains_in_float32_and_is_stored_as_it_was(
    compress: Compress, checkpoint: Get, tmp_path: Path, method: str, parameters: dict
) -> None:
    narrow, held = tmp_path / "narrow", blocks(4, seed=9)
    with quiet_transformers():
        load(compress(method, **parameters)).to(torch.bfloat16).save_pretrained(narrow)
    given = {"examples": blocks(), "held_out": held, "teacher": checkpoint("olmoe"), "options": FEW}
    result = moetailor.recover(narrow, tmp_path / "out", train=["all"], loss="both", dtype="bfloat16", **given)
    assert changed(narrow, result.out)
    assert {info.dtype for info in open_checkpoint(result.out).tensors.values()} == {"BF16"}
    student = Student(load(result.out), Objective(loss="task"))
    with torch.no_grad():
        mean = float(student.sums(held.input_ids, held.labels, ("task",))["task"]) / held.counted
    assert result.after["task"] == pytest.approx(mean, rel=0.02)


# The same gradients and the same weights


class Stop(TrainerCallback):
    """Stops a training as a crash would."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("crash")


@pytest.mark.parametrize(("method", "anneal"), [("mone", 0.0), ("compressed_experts", 0.0), ("lightmoe", 0.9)])
def test_an_interrupted_training_resumes_to_the_same_weights(
    compress: Compress, checkpoint: Get, tmp_path: Path, method: str, anneal: float
) -> None:
    before = compress(method, **TINY_PARAMETERS.get(method, {}))
    options = moetailor.RecoveryOptions(steps=6, batch_size=2, lr=1e-2, save_every=2, lora_rank=2, anneal=anneal)
    given = {"examples": blocks(), "teacher": checkpoint("olmoe"), "train": ["all"], "options": options}
    whole = moetailor.recover(before, tmp_path / "whole", **given)
    with pytest.raises(RuntimeError, match="crash"):
        moetailor.recover(before, tmp_path / "parts", callbacks=[Stop()], **given)
    assert not (tmp_path / "parts").exists()
    # A checkpoint that was cut off while it was written counts for nothing.
    torn = tmp_path / "parts.training" / "checkpoint-3"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 3, "ma')
    parts = moetailor.recover(before, tmp_path / "parts", **given)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (parts.steps, parts.tokens) == (whole.steps, whole.tokens)
    one, two = (tensors(open_checkpoint(result.out)) for result in (whole, parts))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_finished_training_is_not_trained_again(
    compress: Compress, checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full, say: training is done, the result is not written."""
    given = {"examples": blocks(), "teacher": checkpoint("olmoe"), "options": FEW}
    before = compress("reap")
    whole = moetailor.recover(before, tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        patch.setattr("moetailor.recovery.recover.write_recovered", full)
        with pytest.raises(MoetailorError, match="full"):
            moetailor.recover(before, tmp_path / "out", **given)
    again = moetailor.recover(before, tmp_path / "out", **given)
    assert again.steps == 4
    one, two = (tensors(open_checkpoint(result.out)) for result in (whole, again))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def full(*args: Any, **kwargs: Any) -> None:
    raise MoetailorError("the disk is full")


def test_accumulated_batches_are_one_batch(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    before, found = compress("linear"), []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        options = moetailor.RecoveryOptions(steps=2, batch_size=batch_size, accumulate=accumulate, lr=1e-3)
        given = {"examples": blocks(), "teacher": checkpoint("olmoe"), "loss": "both", "options": options}
        result = moetailor.recover(before, tmp_path / f"b{batch_size}", train=["router", "standins"], **given)
        found.append((result, tensors(open_checkpoint(result.out))))
    (one, weights), (many, others) = found
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "parameters"), [("linear", {}), ("conmoe", {"scope": 2})])
def test_layers_that_are_computed_again_change_no_number(
    compress: Compress, checkpoint: Get, tmp_path: Path, method: str, parameters: dict
) -> None:
    before, found = compress(method, **parameters), []
    for again in (False, True):
        options = moetailor.RecoveryOptions(**{**vars(FEW), "gradient_checkpointing": again})
        given = {"examples": blocks(), "teacher": checkpoint("olmoe"), "options": options}
        found.append(moetailor.recover(before, tmp_path / f"out{again}", train=["all"], **given).losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


RUN = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import moetailor
from support.training import Gradients, Slow, blocks, share_on_cpus
{first}
callbacks = {callbacks}
options = moetailor.RecoveryOptions(steps={steps}, batch_size={batch_size}, lr=1e-2, save_every=2, lora_rank=2,
                                 gradient_checkpointing={again}, fsdp={fsdp})
moetailor.recover({before!r}, {out!r}, examples=blocks(), teacher={teacher!r}, train=["all"], options=options,
               callbacks=callbacks, device="cpu")
"""

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def script(file: Path, **values: Any) -> Path:
    told = {"tests": str(Path(__file__).parent), "first": "", "callbacks": "[]", "steps": 6, "batch_size": 2}
    told |= {"again": False, "fsdp": False} | values
    file.write_text(RUN.format(**{name: str(v) if isinstance(v, Path) else v for name, v in told.items()}))
    return file


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    given = {"before": compress("mone"), "teacher": checkpoint("olmoe")}
    subprocess.run([sys.executable, script(tmp_path / "a.py", out=tmp_path / "whole", **given)], check=True)
    slow = script(tmp_path / "b.py", out=tmp_path / "parts", callbacks="[Slow()]", **given)
    process = subprocess.Popen([sys.executable, slow])
    state = tmp_path / "parts.training" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts").exists()
    subprocess.run([sys.executable, script(tmp_path / "c.py", out=tmp_path / "parts", **given)], check=True)
    one, two = (tensors(open_checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    """The blocks hold different numbers of tokens that count, so a mean of means would be another gradient."""
    given = {"before": compress("linear"), "teacher": checkpoint("olmoe"), "steps": 2}
    one = {"out": tmp_path / "one", "callbacks": f"[Gradients({str(tmp_path / 'one.pt')!r})]", "batch_size": 4}
    two = {
        "out": tmp_path / "two",
        "callbacks": f"[Gradients({str(tmp_path / 'two.pt')!r})]",
        "batch_size": 2,
        "again": True,
    }
    subprocess.run([sys.executable, script(tmp_path / "a.py", **given, **one)], check=True)
    subprocess.run([*TORCHRUN, script(tmp_path / "b.py", **given, **two)], check=True)
    single, double = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert single.keys() == double.keys()
    assert any(gradient.any() for gradient in single.values())
    for name, gradient in single.items():
        torch.testing.assert_close(double[name], gradient, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "two.training").exists()
    assert (tmp_path / "two" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parameters"), [("linear", {}), ("lightmoe", {"rank": 1, "bases": 1})])
def test_a_model_shared_out_to_processes_trains_as_one_does(
    compress: Compress, checkpoint: Get, tmp_path: Path, method: str, parameters: dict
) -> None:
    """Also when all processes are killed between two steps."""
    given = {"before": compress(method, **parameters), "teacher": checkpoint("olmoe")}
    shared = {**given, "out": tmp_path / "two", "first": "share_on_cpus()", "fsdp": True}
    subprocess.run([sys.executable, script(tmp_path / "a.py", out=tmp_path / "one", batch_size=4, **given)], check=True)
    slow = [*TORCHRUN, script(tmp_path / "b.py", callbacks="[Slow()]", **shared)]
    process = subprocess.Popen(slow)
    state = tmp_path / "two.training" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # The children of torchrun lead sessions of their own.
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()
    process.wait()
    assert not (tmp_path / "two").exists()
    subprocess.run([*TORCHRUN, script(tmp_path / "c.py", **shared)], check=True)
    one, two = (tensors(open_checkpoint(tmp_path / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_processes_without_gpus_cannot_share_a_model(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    values = {"before": compress("linear"), "teacher": checkpoint("olmoe"), "out": tmp_path / "out", "fsdp": True}
    ran = subprocess.run([*TORCHRUN, script(tmp_path / "a.py", **values)], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "--fsdp: accelerate shares models out to GPUs, and this runs on cpu" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_an_environment_of_processes_that_nobody_started(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    values = {"before": compress("linear"), "teacher": checkpoint("olmoe"), "out": tmp_path / "out"}
    given = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    command = [sys.executable, str(script(tmp_path / "a.py", **values))]
    environment = given | {"RANK": "0", "WORLD_SIZE": "2"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "the environment speaks of several processes" in ran.stderr
    assert not (tmp_path / "out").exists()


# Bad input


def refused(message: str, *args: Any, **given: Any) -> None:
    with pytest.raises(MoetailorError, match=message):
        moetailor.recover(*args, **({"examples": blocks(), "loss": "task", "options": FEW} | given))


def test_what_cannot_train_is_refused(compress: Compress, tmp_path: Path) -> None:
    before, out = compress("reap"), tmp_path / "out"
    refused(
        r"--train standins: the model has none; it has router \(2 tensors\), experts", before, out, train=["standins"]
    )
    refused("nothing trains; name some of router, standins", before, out, train=[])
    refused("--train 'routers'; did you mean 'router'", before, out, train=["routers"])
    refused(r"--loss 'kl'\. Known: both, kd, task", before, out, loss="kl")
    refused("name the original with --teacher", before, out, loss="kd")
    refused("is the model itself", before, before)
    too_wide = moetailor.RecoveryOptions(lora_rank=33, steps=1)
    refused("--lora-rank 33: the model is 32 wide; use 1 to 32", before, out, train=["rest"], options=too_wide)
    refused("not torch.float16", before, tmp_path / "half", dtype="float16")
    refused("device 'meta' holds no numbers", before, out, device="meta")
    assert not out.exists()
    assert not out.with_name("out.training").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("lr", 0.0), ("lr", float("nan")), ("epochs", -1.0), ("batch_size", 0), ("temperature", 0.0),
     ("layer_weight", -0.1), ("warmup", 1.0), ("save_every", 0), ("accumulate", 0), ("weight_decay", -1.0)],
)  # fmt: skip
def test_numbers_that_mean_nothing(checkpoint: Get, tmp_path: Path, option: str, value: float) -> None:
    options = moetailor.RecoveryOptions(**{option: value})
    refused(f"--{option.replace('_', '-')} {value}: is not", checkpoint("olmoe"), tmp_path / "out", options=options)


def test_annealing_that_cannot_be_leaves_nothing_behind(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    given = {"examples": blocks(), "train": ["standins"], "options": moetailor.RecoveryOptions(steps=2, anneal=0.5)}
    before = compress("mone")
    refused("--anneal fades the original's experts out", before, tmp_path / "out", loss="task", **given)
    refused("no low-rank experts", before, tmp_path / "out", teacher=checkpoint("olmoe"), **given)
    assert not (tmp_path / "out.training").exists()


def test_models_that_cannot_be_shared_out(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    before, out, shared = checkpoint("olmoe"), tmp_path / "out", moetailor.RecoveryOptions(steps=2, fsdp=True)
    refused("this is the only one; start them with torchrun", before, out, options=shared)
    refused("no process with the whole model to measure", before, out, options=shared, held_out=blocks())
    with pytest.raises(MoetailorError, match="--fsdp shares out the tensors that --anneal fades"):
        moetailor.RecoveryOptions(steps=2, fsdp=True, anneal=0.5).check()
    budget = moetailor.Budget.parse(keep=4)
    plan = moetailor.make_plan(calibration("olmoe"), "conmoe", budget, parameters={"scope": 2})
    remapped = moetailor.apply(plan, before, tmp_path / "remapped", calibration=calibration("olmoe"))
    with pytest.raises(MoetailorError, match="layers of this model use experts of other layers"):
        check_shardable(load(remapped))
    check_shardable(load(before))
    assert not out.exists()
    assert not out.with_name("out.training").exists()


def test_teachers_of_another_kind_are_refused(compress: Compress, checkpoint: Get, tmp_path: Path) -> None:
    given = {"loss": "kd", "teacher": checkpoint("mixtral")}
    refused("the teacher's model type: mixtral, the model's: olmoe", compress("reap"), tmp_path / "out", **given)
    config = tiny_model("olmoe").config
    for name, what in (("vocab_size", "words"), ("hidden_size", "width"), ("num_hidden_layers", "decoder layers")):
        other = type(config)(**{**config.to_dict(), name: 2 * getattr(config, name)})
        with pytest.raises(MoetailorError, match=f"the teacher's {what}: {getattr(other, name)}"):
            check_teacher(config, other)


def test_another_training_is_left_alone(compress: Compress, tmp_path: Path) -> None:
    before, out = compress("reap"), tmp_path / "out"
    given = {"examples": blocks(), "loss": "task", "options": FEW}
    with pytest.raises(RuntimeError, match="crash"):
        moetailor.recover(before, out, callbacks=[Stop()], **given)
    other = moetailor.RecoveryOptions(**{**vars(FEW), "lr": 0.5})
    refused(r"out\.training: holds a training with another lr; give the same command", before, out, options=other)
    refused("holds a training with another examples", before, out, examples=blocks(seed=4))
    assert (tmp_path / "out.training" / "checkpoint-2").is_dir()
    (tmp_path / "mine.training").mkdir()
    refused("mine.training: exists and was not made by moetailor", before, tmp_path / "mine")


def stopped(before: Path, out: Path) -> Path:
    """Train until a crash in the fourth step and return the last checkpoint."""
    with pytest.raises(RuntimeError, match="crash"):
        moetailor.recover(before, out, examples=blocks(), loss="task", options=FEW, callbacks=[Stop()])
    return out.with_name(out.name + ".training") / "checkpoint-2"


@pytest.mark.parametrize(
    ("part", "what"),
    [("optimizer.pt", "optimizer"), ("scheduler.pt", "schedule"), ("rng_state.pth", "random numbers")],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_checkpoint_that_lost_a_part_is_not_gone_on_from(
    compress: Compress, tmp_path: Path, part: str, what: str, empty: bool
) -> None:
    """Trainer would take a new optimizer and say nothing."""
    before, out = compress("reap"), tmp_path / "out"
    last = stopped(before, out)
    (last / part).write_bytes(b"") if empty else (last / part).unlink()
    refused(f"{last}: the state of the {what}, .*, is not there, without which training", before, out)
    shutil.rmtree(last)
    assert moetailor.recover(before, out, examples=blocks(), loss="task", options=FEW).steps == 4


@pytest.mark.parametrize("settings", ["", "{", "[]", "\x00"])
def test_settings_that_cannot_be_read_are_named_with_the_cure(
    compress: Compress, tmp_path: Path, settings: str
) -> None:
    folder = tmp_path / "out.training"
    folder.mkdir()
    (folder / "settings.json").write_text(settings)
    cure = f"delete {folder} to train anew"
    refused(f"{folder / 'settings.json'}: not (a )?JSON .*; {cure}", compress("reap"), tmp_path / "out")


def test_folder_of_the_user_with_settings_of_its_own_is_left_alone(compress: Compress, tmp_path: Path) -> None:
    mine = tmp_path / "out.training" / "settings.json"
    mine.parent.mkdir()
    mine.write_text('{"lr": 1}')
    refused("out.training: exists and was not made by moetailor", compress("reap"), tmp_path / "out")
    assert mine.read_text() == '{"lr": 1}'


def test_what_the_user_put_beside_the_checkpoints_stays(compress: Compress, tmp_path: Path) -> None:
    before, out = compress("reap"), tmp_path / "out"
    notes = stopped(before, out).parent / "notes.txt"
    notes.write_text("lr is too high")
    moetailor.recover(before, out, examples=blocks(), loss="task", options=FEW)
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_killed_at_any_step_of_its_begin_a_training_can_begin_again(tmp_path: Path) -> None:
    folder, settings = tmp_path / "out.training", {"lr": 1}

    def begin() -> None:
        with claimed(tmp_path / "out") as work:
            begin_training(folder, settings, work)

    for step in kills(begin):
        check_training(folder, settings)
        begin()
        assert json.loads((folder / "settings.json").read_text()) == {"format": "moetailor-training", "lr": 1}, step
        assert [path.name for path in tmp_path.rglob("*")] == ["out.training", "settings.json"]
        shutil.rmtree(folder)


def test_killed_when_the_result_was_in_place_the_training_goes_with_the_next_run(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out = compress("reap"), tmp_path / "out"

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moetailor.recovery.recover.end_training", stop)
        with pytest.raises(KeyboardInterrupt):
            moetailor.recover(before, out, examples=blocks(), loss="task", options=FEW)
    assert (tmp_path / "out.training").is_dir()
    refused("out: exists; choose another folder or pass --overwrite", before, out)
    assert not (tmp_path / "out.training").exists()
    assert (out / "config.json").is_file()


def test_a_second_training_into_one_place_is_refused(compress: Compress, tmp_path: Path) -> None:
    before, out, told = compress("reap"), tmp_path / "out", tmp_path / "told"

    def second() -> None:
        try:
            moetailor.recover(before, out, examples=blocks(), loss="task", options=FEW)
        except MoetailorError as error:
            told.write_text(str(error))

    class Second(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.waitpid(in_child(second), 0)

    moetailor.recover(before, out, examples=blocks(), loss="task", options=FEW, callbacks=[Second()])
    assert told.read_text().startswith(f"{out}: `")
    assert f"(process {os.getpid()} on " in told.read_text()


class Poison(TrainerCallback):
    """Makes the weights infinite before the fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                model.model.lm_head.weight.fill_(float("inf"))


def test_a_loss_that_is_not_finite_stops_and_names_the_last_checkpoint(compress: Compress, tmp_path: Path) -> None:
    place = tmp_path / "out.training" / "checkpoint-2"
    refused(
        f"step 4: the loss is nan. The last good checkpoint: it is {place} of step 2. Try a lower --lr",
        compress("reap"),
        tmp_path / "out",
        callbacks=[Poison()],
    )
    assert [folder.name for folder in place.parent.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "out").exists()


def test_peft_that_is_missing(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(r"pip install 'moetailor\[recover\]'", checkpoint("olmoe"), tmp_path / "out", train=["experts"])
