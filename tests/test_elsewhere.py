"""Models in other hands: a result pickled, copied or shared out by transformers; originals whose weights are tied, put
elsewhere or of several dtypes.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.runtime.quantizer import MoetailorConfig, MoetailorQuantizer
from support.families import tiny_model
from support.tiny import load, logits, mixed_plan, stops_transformers_alone, token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


@pytest.fixture(scope="module")
def result(checkpoint: Get, calibration: GetCalibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A remap, constants, linear maps and drops in each layer."""
    measured, out = calibration("olmoe"), tmp_path_factory.mktemp("elsewhere") / "out"
    return moetailor.apply(mixed_plan(measured, drop=True), checkpoint("olmoe"), out, calibration=measured)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("other", [copy.deepcopy, pickled])
def test_a_copy_gives_the_same(result: Path, other: Callable[[nn.Module], nn.Module]) -> None:
    model = load(result)
    again = other(model)
    assert again.model.layers[1].mlp.experts.slots == model.model.layers[1].mlp.experts.slots
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_saved_again_it_is_not_run_without_moetailor(implementation: str, result: Path, tmp_path: Path) -> None:
    """Transformers alone would warn, and go on with experts of random numbers."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(result, experts_implementation=implementation)
        model.save_pretrained(tmp_path / "again")
    assert model.config._experts_implementation == implementation
    assert stops_transformers_alone(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(result)))


def test_no_process_has_a_part_of_experts(result: Path) -> None:
    """The output of parts would be summed, and with it once for each process what stands beside the pool."""
    plan = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.experts": "moe_tp_experts",
        "model.layers.*.mlp.experts_of_another": "colwise",
    }
    MoetailorQuantizer(MoetailorConfig(layers={})).update_parallel_plan(load(result), plan)
    assert list(plan) == ["model.layers.*.self_attn.q_proj", "model.layers.*.mlp.experts_of_another"]


def test_tied_weights_of_a_model_in_memory_count_once(tmp_path: Path) -> None:
    model = tiny_model("olmoe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "saved")
    measured = moetailor.calibrate(model, tmp_path / "c", text=token_batches())
    assert measured.model.nbytes == open_checkpoint(tmp_path / "saved").nbytes


def test_a_model_with_a_layer_on_disk_is_measured_as_the_whole(checkpoint: Get, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(2)}
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint("olmoe"), dtype=torch.float32, device_map=places, offload_folder=tmp_path / "off"
        )
    found, whole = (
        moetailor.calibrate(each, tmp_path / name, text=token_batches())
        for name, each in (("a", model), ("b", load(checkpoint("olmoe"))))
    )
    assert found.model.nbytes == whole.model.nbytes
    for layer in whole.layers:
        torch.testing.assert_close(found.sums(layer).gate_sq_output, whole.sums(layer).gate_sq_output)


@pytest.mark.parametrize("short", ["gate_proj", "up_proj"])
def test_halves_of_a_matrix_may_lie_in_different_dtypes(short: str, checkpoint: Get, tmp_path: Path) -> None:
    """Streamed as in memory: what is joined is as wide as its widest part."""
    (tmp_path / "m").mkdir()
    tensors = load_file(checkpoint("olmoe") / "model.safetensors")
    for name in tensors:
        if short in name:
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    (tmp_path / "m" / "config.json").write_text((checkpoint("olmoe") / "config.json").read_text())
    given = {"text": token_batches(), "dtype": "float32"}
    whole, streamed = (
        moetailor.calibrate(tmp_path / "m", tmp_path / f"c{stream}", stream=stream, **given) for stream in (False, True)
    )
    assert whole.hashes == streamed.hashes
