"""Each kind of result in each engine that needs nothing installed; the others' tests run over the same pairs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.serving import find_engine
from support.families import tiny_model
from support.quantized import LAYOUTS, write_source
from support.serving import ALONE, BY, KINDS, LLAMA, SGLANG, TRANSFORMERS, pairs
from support.source import ROOT
from support.tiny import load, logits, stops_transformers_alone, token_batches


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose matrices are whole groups of 32 and blocks of 128."""
    folder = tmp_path_factory.mktemp("engines") / "original"
    with quiet_transformers():
        tiny_model("qwen3_moe", hidden_size=256, moe_intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibration(original: Path) -> moetailor.Calibration:
    folder = original.with_name("calibration")
    return moetailor.calibrate(original, folder, text=token_batches(8, 48), residual=True, sensitivity=True)


def made(name: str, original: Path, calibration: moetailor.Calibration) -> Path:
    """Return the folder of a result, made once."""
    out, kind = original.with_name(name), KINDS[name]
    if not out.exists():
        given = {"calibration": calibration, "format": kind.format, "verify": False}
        moetailor.apply(kind.plan(calibration), original, out, **given)
    return out


@pytest.mark.parametrize("name", pairs(TRANSFORMERS, "run"))
def test_transformers_gives_what_the_plan_gives(name: str, original: Path, calibration: moetailor.Calibration) -> None:
    out = made(name, original, calibration)
    find_engine("transformers").check(out)
    in_memory = moetailor.apply(
        moetailor.Plan.load(out / "moetailor_plan.json"), load(original), calibration=calibration
    )
    expected = logits(in_memory)
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=1e-4)
    ours = open_checkpoint(out).config.get("quantization_config", {}).get("quant_method") == "moetailor"
    assert stops_transformers_alone(out) == ours
    if name != "compressed_experts":
        assert not torch.allclose(logits(load(original)), expected, rtol=1e-4, atol=1e-4)


REFUSED = [(engine, name) for engine in (TRANSFORMERS, ALONE, LLAMA) for name in pairs(engine, "refused")]


@pytest.mark.parametrize(("engine", "name"), REFUSED)
def test_what_an_engine_does_not_load_is_refused(
    engine: str,
    name: str,
    original: Path,
    calibration: moetailor.Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the engine here, before it is started; by transformers while it loads."""
    monkeypatch.setattr("moetailor.serving.engines.vllm.find_spec", lambda name: None)
    out = made(name, original, calibration)
    if engine == TRANSFORMERS:
        with pytest.raises(Exception, match=r"issues during automatic conversion of the weights"):
            load(out)
        return
    said = {ALONE: "needs a plug-in for the moetailor format", LLAMA: r"loads GGUF files, and there is none"}
    with pytest.raises(moetailor.MoetailorError, match=said[engine]):
        find_engine({ALONE: "vllm", LLAMA: "llama.cpp"}[engine]).check(out)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_gguf_file_is_for_llama_cpp(engine: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(moetailor.MoetailorError, match=r"model.gguf is for --engine llama.cpp"):
        find_engine(engine).check(tmp_path)


INT4 = {"type": "int", "num_bits": 4, "symmetric": True, "group_size": 64, "strategy": "group"}
FP8 = {"type": "float", "num_bits": 8, "symmetric": True, "group_size": None, "strategy": "block"}


KERNELS = [
    ([INT4], True),
    ([INT4 | {"group_size": 128}, FP8], True),
    ([INT4 | {"group_size": 32}], False),
    ([INT4, INT4 | {"num_bits": 8}], False),
    ([INT4 | {"symmetric": False}], False),
    ([FP8 | {"strategy": "channel"}], False),
]


@pytest.mark.parametrize(("schemes", "runs"), KERNELS)
def test_few_bits_without_a_kernel_here_are_told(schemes: list, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which these are, a test with vLLM says."""
    groups = {f"group_{number}": {"weights": weights} for number, weights in enumerate(schemes)}
    entry = {"quant_method": "compressed-tensors", "config_groups": groups}
    for gpu, tiles, expected in ((False, True, runs), (False, False, False), (True, False, True)):
        monkeypatch.setattr("moetailor.serving.engines.vllm.has_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr("moetailor.serving.engines.vllm.HAS_TILES", tiles)
        assert (find_engine("vllm").stops(entry) is None) == expected
        assert find_engine("transformers").stops(entry) is None
        assert find_engine("vllm").stops({}) is None


@pytest.mark.parametrize("entry", ["fp8", ["fp8"], 3])
def test_what_is_no_object_is_said(entry: object, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    for engine in ("transformers", "vllm"):
        with pytest.raises(moetailor.MoetailorError, match=r"quantization_config is .*, and no object"):
            find_engine(engine).check(folder)


@pytest.mark.parametrize("groups", [None, {}, {"g": "W4A16"}, {"g": None}, {"g": {"weights": None}}, ["g"]])
def test_of_schemes_that_are_not_written_out_nothing_is_told(groups: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetailor.serving.engines.vllm.has_gpu", lambda: False)
    monkeypatch.setattr("moetailor.serving.engines.vllm.HAS_TILES", True)
    assert find_engine("vllm").stops({"quant_method": "compressed-tensors", "config_groups": groups}) is None


def test_a_folder_is_not_served_as_a_revision_of_another(
    run: Callable, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "out@half")
    code, _, err = run("serve", folder, "--dry-run")
    assert code == 1
    assert "takes what follows @ for a revision" in " ".join(err.split())
    code, shown, err = run("serve", folder, "--engine", "vllm", "--dry-run")
    assert code == 0, err
    assert f"vllm serve {folder}" in shown


def test_of_a_quantized_original_the_plug_in_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetailor.serving.engines.vllm.find_spec", lambda name: name)
    source, twin = write_source(LAYOUTS["fp8-blocks-qwen3"], tmp_path)
    formats = [
        {choice.format for choice in find_engine("vllm").choices(Original(folder).facts)} for folder in (source, twin)
    ]
    assert "moetailor" not in formats[0]
    assert "moetailor" in formats[1]


def test_the_table_names_tests_that_are_there() -> None:
    named = {by for engine in BY.values() for by in engine.values()} | {
        by for k in KINDS.values() for by in k.by.values()
    }
    for by in (by for by in named if "::" in by):
        file, _, name = by.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), by
    for name, kind in KINDS.items():
        assert set(kind.outcomes) == {*BY}, name
        for engine, outcome in kind.outcomes.items():
            assert outcome in ("-", "as alone") or outcome in BY[engine], (name, engine)
            mine = engine in kind.by or kind.method or kind.memory or engine == SGLANG or outcome in ("-", "as alone")
            assert mine or outcome == "refused", (name, engine)
