"""vLLM serves what moetailor writes: tokens and probabilities are transformers', and what does not fit is refused."""

import json
import os
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moetailor
from moetailor.checkpoint.devices import HAS_TILES
from moetailor.checkpoint.original import Original
from moetailor.serving import find_engine
from results import MODELS, PROMPTS, TOKENS, calibrated, copied, expected, log_probabilities, make, packed
from support.quantized import LAYOUTS, write_source
from support.serving import ALONE, KINDS, SERVED, pairs
from support.tiny import token_batches
from vllm_python import PYTHON, ROOT, SKIP, site

pytestmark = SKIP
Serve = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def serve(folder: Path) -> Serve:
    """Return a function that runs serve.py with the plug-in installed, as far as its entry point goes."""
    path = site(folder)
    np.save(folder / "prompts.npy", PROMPTS)

    def call(*words: str | Path, plugin: bool = True) -> None:
        command = [PYTHON, ROOT / "tests" / "serve.py", folder / "prompts.npy", str(TOKENS), *words]
        # Without it also where it is installed: vLLM takes the plug-ins that are named, and none is.
        paths = {"PYTHONPATH": path} if plugin else {"PYTHONPATH": "", "VLLM_PLUGINS": ""}
        done = subprocess.run(command, env=os.environ | paths, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return call


def check(result: Path, same: Path | None = None) -> None:
    """Compare what vLLM left with what transformers gives: of the same in another format where it does not load it."""
    assert not (refused := Path(f"{result}.refused.txt")).exists(), refused.read_text()
    found, (greedy, logp) = np.load(f"{result}.vllm.npz"), expected(same or result)
    assert (found["greedy"] == greedy).all()
    assert abs(kl(logp, found["logp"])) <= 1e-6, kl(logp, found["logp"])


def kl(logp: np.ndarray, found: np.ndarray) -> float:
    return (np.exp(logp) * (logp - found)).sum(-1).mean()


def check_all(results: list[Path], serve: Serve) -> None:
    serve(*results)
    for result in results:
        check(result)


def test_answers_of_every_kind_are_served_in_every_family(folder: Path, serve: Serve) -> None:
    pairs = [(family, "mixed") for family in MODELS]
    pairs += [(family, kind) for family in ("glm4_moe", "gpt_oss") for kind in ("lightmoe", "quantize")]
    pairs += [("qwen2_moe", "one layer"), ("gpt_oss", "one layer"), ("exaone_moe", "reap")]
    check_all([make(family, kind, folder) for family, kind in pairs], serve)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_every_kind_is_served(family: str, folder: Path, serve: Serve) -> None:
    done = {"lightmoe", "quantize"} if family in ("glm4_moe", "gpt_oss") else set()
    check_all([make(family, kind, folder) for kind in pairs(SERVED, "run") if kind not in done], serve)


def test_vllm_alone_loads_native_results_and_refuses_ours(folder: Path, serve: Serve) -> None:
    native = [make("qwen3_moe", kind, folder) for kind in pairs(ALONE, "run")]
    # Served before, perhaps, by another test.
    ours = [copied(make("qwen3_moe", kind, folder), "alone") for kind in pairs(ALONE, "refused")]
    serve(*native, *ours, plugin=False)
    for result in native:
        check(result)
    for result in ours:
        assert "moetailor" in Path(f"{result}.refused.txt").read_text(), result.name


def test_vllm_alone_serves_constants_in_its_own_layout(folder: Path, serve: Serve) -> None:
    """What vLLM calls expert substitution; gpt_oss's experts lie fused, which it does not take."""
    where = "from importlib.util import find_spec; print(find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([str(PYTHON), "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found, "model_executor", "layers", "fused_moe", "expert_substitution.py").is_file():
        pytest.skip("this vLLM has no expert substitution, which came with 0.33")

    def written(family: str) -> Path:
        calibration, out = calibrated(family, folder), folder / f"{family}-vllm-mone"
        plan = KINDS["mone"].plan(calibration)
        return moetailor.apply(plan, folder / family, out, calibration=calibration, format="vllm-mone")

    results = {family: written(family) for family in MODELS if family != "gpt_oss"}
    serve(*results.values(), plugin=False)
    for family, result in results.items():
        check(result, make(family, "mone", folder))


DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = ("int4g128", "int4g64", "fp8b128", "int4g32", "uint4g64", "int8g128", "fp8", "nvfp4")


@pytest.mark.filterwarnings("ignore:format compressed-tensors")
def test_vllm_alone_runs_few_bits_by_its_own_kernels(folder: Path, serve: Serve) -> None:
    """Where it stops on this machine we say so before. Its kernel for 4 bits rounds inputs of products to 8 bits, so it
    is held to four times what bfloat16 alone costs (2.9 seen; the gates of two experts of one layer
    swapped: 19).
    """
    results = [packed(width, "compressed-tensors", folder) for width in WIDTHS]
    serve("--bfloat16", *results, plugin=False)
    for width, result in zip(WIDTHS, results, strict=True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            find_engine("vllm").check(result)
        assert [message for message in told if "vLLM 0.32 stops" in str(message)] == told
        assert Path(f"{result}.refused.txt").exists() == bool(told), width
        if not told:
            same = packed(width, "moetailor", folder)
            logp, halved = (expected(same, dtype)[1] for dtype in DTYPES)
            assert kl(logp, np.load(f"{result}.vllm.npz")["logp"]) <= 4 * kl(logp, halved), width


@pytest.mark.skipif(not HAS_TILES, reason="vLLM 0.32 has kernels for MXFP4 on CPUs with AMX")
def test_vllm_alone_serves_drops_of_an_original_in_mxfp4(folder: Path, serve: Serve) -> None:
    source, _ = write_source(replace(LAYOUTS["mxfp4"], changes=MODELS["gpt_oss"]), folder)
    calibration = moetailor.calibrate(source, folder / "mxfp4-cal", text=token_batches(8, 48))
    plan = moetailor.make_plan(calibration, "reap", moetailor.Budget.parse(remove="25%"))
    out = moetailor.apply(plan, source, folder / "mxfp4", calibration=calibration, format="native")
    serve("--bfloat16", out, plugin=False)
    logp, halved = (log_probabilities(Original(out).load(dtype=dtype, device="cpu")) for dtype in DTYPES)
    assert kl(logp, np.load(f"{out}.vllm.npz")["logp"]) <= 4 * kl(logp, halved)


def test_two_models_in_one_process(folder: Path, serve: Serve) -> None:
    both = [make("qwen3_moe", "mone", folder), make("glm4_moe", "auto", folder)]
    serve("--together", *both)
    for result in both:
        check(result)


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(folder: Path, serve: Serve) -> None:
    """Storages whose groups and codes are cut between ranks, each expert in a width of its own, and stand-ins."""
    kinds = ("int4g32", "quantize, fp8b128", "quantize, mxfp4", "quantize, vq", "widths", "mixed", "lightmoe")
    results = [make("qwen3_moe", kind, folder) for kind in kinds]
    cut = [copied(result, "ranks") for result in results]
    serve("--ranks", *cut)
    for result in cut:
        check(result)


def edited(result: Path, name: str, edit: Callable[[dict[str, torch.Tensor], dict], None]) -> Path:
    """Return a copy of a result with other tensors or another `quantization_config`."""
    out = copied(result, name)
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_what_does_not_fit_is_refused_by_name(folder: Path, serve: Serve) -> None:
    made, oss = make("qwen2_moe", "linear", folder), make("gpt_oss", "linear", folder)
    part, oss_part = make("qwen2_moe", "one layer", folder), make("gpt_oss", "one layer", folder)
    biased, whole = make("exaone_moe", "reap", folder), "model.layers.0"
    correction = "model.layers.1.mlp.e_score_correction_bias"
    layer = "model.layers.1.mlp.experts"
    name = f"{layer}.linear_out"
    cases = {
        edited(made, "missing", lambda t, c: t.pop(name)): "no file has linear_out",
        edited(made, "row", lambda t, c: t.pop(f"{layer}.0.up_proj.weight")): "no file has w3 of expert 0",
        edited(made, "gate", lambda t, c: t.pop("model.layers.1.mlp.gate.weight")): "layers.1.mlp.gate.weight (1",
        edited(part, "whole-gate", lambda t, c: t.pop(f"{whole}.mlp.gate.weight")): "layers.0.mlp.gate.weight (1",
        edited(part, "whole-row", lambda t, c: t.pop(f"{whole}.mlp.experts.0.up_proj.weight")): "w3 of expert 0 (1",
        edited(part, "bias", lambda t, c: t.pop(f"{whole}.self_attn.q_proj.bias")): "attn.qkv_proj.bias (1 missing)",
        edited(part, "norm", lambda t, c: t.pop(f"{whole}.input_layernorm.weight")): "RMSNorm.weight (1 missing)",
        edited(oss_part, "whole-pool", lambda t, c: t.pop(f"{whole}.mlp.experts.down_proj")): "w2_weight",
        edited(oss_part, "sinks", lambda t, c: t.pop(f"{whole}.self_attn.sinks")): "Attention.sinks (1 missing)",
        edited(made, "extra", lambda t, c: t.update({f"{layer}.constant": torch.ones(2, 64)})): "constant is none of",
        edited(made, "shape", lambda t, c: t.update({name: t[name][1:].clone()})): "the slot map says",
        edited(made, "version", lambda t, c: c.update(version=9)): "moetailor format 9",
        edited(made, "key", lambda t, c: c["layers"]["1"].update(other=[0])): "unknown keys ['other']",
        edited(made, "guest", lambda t, c: c["layers"]["1"].update(borrowed=[])): "experts of other layers",
        edited(made, "source", lambda t, c: c.update(source={"quant_method": "fp8"})): "quantized original",
        edited(oss, "oss", lambda t, c: t.pop(name)): "no file has linear_out",
        edited(oss, "pool", lambda t, c: t.pop(f"{layer}.down_proj")): "w2_weight",
        make("qwen2_moe", "compressed_experts", folder): "auxiliary slots",
        edited(biased, "correction", lambda t, c: t.pop(correction)): "e_score_correction_bias (1 missing)",
        tied(made): "does not tie",
    }
    serve(*cases)
    for case, said in cases.items():
        assert said in Path(f"{case}.refused.txt").read_text(), case.name


def tied(result: Path) -> Path:
    """Return a result without a head of its own, and whose config does not say that it is tied."""
    return edited(result, "tied", lambda tensors, config: tensors.pop("lm_head.weight"))
