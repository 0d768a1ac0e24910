"""The compressed-tensors format with MXFP4, NVFP4 and FP8 in blocks: what its library, transformers and we read."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import Width, packed
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.loader import quiet_transformers
from moetailor.checkpoint.original import Original
from moetailor.errors import CheckpointError
from moetailor.transform.formats import FORMATS
from support.families import tiny_model
from support.tiny import IDS, Get, GetCalibration, anatomy_of, eager, logits, token_batches

FORMAT = "compressed-tensors"
# By kind of codes: the form's name, the preset that engines know it by, and the parts of a matrix of [128, 256].
KINDS: dict[str, tuple[str, str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]] = {
    "mxfp4": (
        "mxfp4-pack-quantized",
        "MXFP4A16",
        {"weight_packed": (torch.uint8, (128, 128)), "weight_scale": (torch.uint8, (128, 8))},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        "NVFP4A16",
        {
            "weight_packed": (torch.uint8, (128, 128)),
            "weight_scale": (torch.float8_e4m3fn, (128, 16)),
            "weight_global_scale": (torch.float32, (1,)),
        },
    ),
    "fp8b128": (
        "float-quantized",
        "FP8_BLOCK",
        {"weight": (torch.float8_e4m3fn, (128, 256)), "weight_scale": (torch.bfloat16, (1, 2))},
    ),
}
every_kind = pytest.mark.parametrize("codes", list(KINDS))


@dataclass(frozen=True)
class Made:
    """A checkpoint in bfloat16 whose experts have 256 and 128 inputs, and its calibration."""

    source: Path
    measured: moetailor.Calibration

    def plan(self, codes: str, remove: str | None = None) -> moetailor.Plan:
        width, budget = Width.parse(codes), moetailor.Budget.parse(remove=remove or 0)
        if remove:
            return moetailor.make_plan(self.measured, "reap", budget, width=width)
        given = {"bits": width.bits, "codes": codes}
        return moetailor.make_plan(self.measured, "quantize", budget, parameters=given)

    def written(self, plan: moetailor.Plan, out: Path) -> tuple[Path, list[str]]:
        """Return the result, and what was said on the way."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", moetailor.MoetailorWarning)
            folder = moetailor.apply(plan, self.source, out, calibration=self.measured, format=FORMAT)
        return folder, [str(one.message) for one in said if isinstance(one.message, moetailor.MoetailorWarning)]

    def ours(self, plan: moetailor.Plan) -> Any:
        """Return the running model of the same codes."""
        return eager(moetailor.apply(plan, in_bf16(self.source), calibration=self.measured))


def in_bf16(folder: Path) -> Any:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eager(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())


def greedy(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=16, min_new_tokens=16, do_sample=False)[:, IDS.shape[1] :]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("floats")
    with quiet_transformers():
        tiny_model("olmoe", hidden_size=256, intermediate_size=128).bfloat16().save_pretrained(folder / "source")
    return Made(folder / "source", moetailor.calibrate(folder / "source", folder / "c", text=token_batches()))


@every_kind
def test_every_code_arrives(codes: str, made: Made, tmp_path: Path) -> None:
    """Numbers of the running model are those that the library and our own reader of quantized originals find there."""
    form, preset, parts = KINDS[codes]
    plan = made.plan(codes, remove="25%")
    out, _ = made.written(plan, tmp_path / "out")
    assert open_checkpoint(out).nbytes == plan.nbytes
    told = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    scheme, known = list(told.config_groups.values())[-1], preset_name_to_scheme(preset, ["Linear"])
    assert told.format == scheme.format == form
    for given, expected in ((scheme.weights, known.weights), (scheme.input_activations, known.input_activations)):
        assert (given is None) == (expected is None)
        for field in ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic"):
            assert given is None or getattr(given, field) == getattr(expected, field), field
    tensors, model, read = load_file(out / "model.safetensors"), made.ours(plan), Original(out).checkpoint.numbers
    library: Any = BaseCompressor.get_value_from_registry(form)
    seen = 0
    for index, layer in anatomy_of(in_bf16(made.source)).layers.items():
        module, (width,) = model.get_submodule(layer.experts), plan.by_layer[index].packed
        for name in ("gate", "up", "down"):
            for row, weight in enumerate(module.tensor(f"{width.stem}_{name}")):
                stem = f"{layer.experts}.{row}.{name}_proj."
                lying = {key.removeprefix(stem): tensor for key, tensor in tensors.items() if key.startswith(stem)}
                if name != "down":
                    assert {part: (t.dtype, tuple(t.shape)) for part, t in lying.items()} == parts
                assert torch.equal(library.decompress(dict(lying), scheme)["weight"].float(), weight.float())
                assert torch.equal(read[f"{stem}weight"].read().float(), weight.float())
                seen += 1
        if codes == "nvfp4":  # engines run gate and up as one matrix with one scale
            for row in range(len(plan.by_layer[index].pool)):
                both = [tensors[f"{layer.experts}.{row}.{name}_proj.weight_global_scale"] for name in ("gate", "up")]
                assert torch.equal(*both)
    assert seen == 2 * 6 * 3
    torch.testing.assert_close(
        logits(eager(Original(out).load(dtype=torch.bfloat16, device="cpu"))), logits(model), rtol=0, atol=0
    )


@pytest.mark.parametrize("remove", [None, "25%"])
def test_stock_transformers_gives_what_our_runtime_gives(
    remove: str | None, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few tokens would be multiplied with codes in float32, whose sums are nearer to the numbers meant than bfloat16's.
    monkeypatch.setattr(packed, "runs_compiled", lambda _: False)
    plan = made.plan("mxfp4", remove)
    out, said = made.written(plan, tmp_path / "out")
    model, own = in_bf16(out), made.ours(plan)
    assert not said
    assert torch.equal(logits(model), logits(own))
    assert torch.equal(greedy(model), greedy(own))
    assert model.config.num_experts == (6 if remove else 8)


@pytest.mark.parametrize(
    ("codes", "why"),
    [("nvfp4", "it leaves out the scale of each matrix"), ("fp8b128", "it has a scale for each row, and knows no")],
)
def test_what_transformers_cannot_read_stops_it(codes: str, why: str, made: Made, tmp_path: Path) -> None:
    out, said = made.written(made.plan(codes), tmp_path / "out")
    assert len(said) == 1
    assert f"transformers does not load {codes}: {why}" in said[0]
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        in_bf16(out)


def test_without_its_guard_nvfp4_would_be_loaded_as_other_numbers(made: Made, tmp_path: Path) -> None:
    """Should this fail, transformers has learned to read it: take the guard out."""
    plan = made.plan("nvfp4")
    out, _ = made.written(plan, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_0"]
    (out / "config.json").write_text(json.dumps(config))
    own = logits(made.ours(plan))
    assert float((logits(in_bf16(out)) - own).norm() / own.norm()) > 0.5


def test_results_are_measured_a_part_at_a_time(made: Made, tmp_path: Path) -> None:
    """In our own format none of their parts is of the experts' dtype, which the model keeps all the same."""
    plan = made.plan("nvfp4")
    out = moetailor.apply(plan, made.source, tmp_path / "out", calibration=made.measured)
    assert open_checkpoint(out).nbytes == plan.nbytes
    model = in_bf16(out)
    assert torch.equal(logits(model), logits(made.ours(plan)))
    layer = next(iter(anatomy_of(in_bf16(made.source)).layers.values()))
    assert model.get_submodule(layer.experts).down_proj.dtype == torch.bfloat16


def test_float32_originals_are_told_of_the_dtype(checkpoint: Get, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    with quiet_transformers():
        tiny_model("olmoe", intermediate_size=32).save_pretrained(folder)
    measured = moetailor.calibrate(folder, tmp_path / "c", text=token_batches())
    made = Made(folder, measured)
    out, said = made.written(made.plan("mxfp4"), tmp_path / "out")
    assert any("transformers makes bfloat16 of MXFP4: load the result with dtype=torch.bfloat16" in one for one in said)
    assert torch.isfinite(logits(in_bf16(out))).all()


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ("mxfp4", "holds mxfp4 of matrices whose outputs and inputs are multiples of 1 and 32; here there are 32 x 16: "
            "use int4g16"),
        ("fp8b128", "holds fp8b128 of matrices whose outputs and inputs are multiples of 128 and 128; here there are "
            "16 x 32: use fp8"),
    ],
)  # fmt: skip
def test_widths_that_do_not_come_out_even_are_refused(
    codes: str, said: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    made = Made(checkpoint("olmoe"), calibration("olmoe"))
    with pytest.raises(moetailor.PlanError) as refused:
        made.written(made.plan(codes), tmp_path / "out")
    assert said in str(refused.value)
    assert str(refused.value).endswith("format moetailor can hold it")
    assert not (tmp_path / "out").exists()


def test_kinds_of_codes_are_not_mixed(made: Made, tmp_path: Path) -> None:
    plan, other = made.plan("nvfp4"), made.plan("fp8")
    (first, _), *_ = plan.layers.items()
    mixed = replace(plan, layers=plan.layers | {first: other.layers[first]})
    with pytest.raises(
        moetailor.PlanError, match="holds integers in all layers or one kind of floats; the plan has fp8"
    ):
        made.written(mixed, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("weight_global_scale", "weight_global_scale' is missing"),
        ("weight_scale", "weight_scale' is missing"),
    ],
)
def test_a_damaged_result_is_found(part: str, said: str, made: Made, tmp_path: Path) -> None:
    plan = made.plan("nvfp4")
    out, _ = made.written(plan, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    del tensors[f"model.layers.1.mlp.experts.3.down_proj.{part}"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        FORMATS[FORMAT].verify(out, plan)
