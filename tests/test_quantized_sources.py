"""How codes become numbers, held against loops and other libraries; and what is refused of quantized checkpoints."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from moetailor.checkpoint.original import Original
from moetailor.checkpoint.storage import ways_of
from moetailor.errors import CheckpointError
from support.quantized import BY_ROW, GPTQ, LAYOUTS, NVFP4, compressed, write_source

Copy = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(len(request.node.name))


def decode(entry: dict[str, Any], parts: Tensors, shape: tuple[int, ...], dtype: str = "BF16") -> torch.Tensor:
    (way,) = (way for way in ways_of(entry) if way.scale in parts)
    return way.decode(parts, shape, dtype)


# Numbers


@pytest.mark.parametrize("shape", [(128, 256), (5, 7), (130, 33)])
def test_blocks_end_where_the_matrix_does(shape: tuple[int, int], draw: torch.Generator) -> None:
    codes = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 32), -(-shape[1] // 4), generator=draw)
    found = decode(
        {"quant_method": "fp8", "weight_block_size": [32, 4]},
        {"weight": codes, "weight_scale_inv": scales},
        shape,
        "F32",
    )
    for row in range(shape[0]):
        for column in range(shape[1]):
            assert found[row, column] == codes[row, column].float() * scales[row // 32, column // 4]


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5])])
def test_one_scale_may_be_for_all(scale: torch.Tensor, name: str) -> None:
    codes = torch.tensor([[1.0, -2.0], [0.25, 448.0]]).to(torch.float8_e4m3fn)
    found = decode({"quant_method": "fp8"}, {"weight": codes, name: scale}, (2, 2))
    assert found.tolist() == [[0.5, -1.0], [0.125, 224.0]]


def test_powers_of_two_may_be_scales() -> None:
    codes, power = torch.ones(1, 4).to(torch.float8_e4m3fn), torch.tensor([[0.25, 8.0]]).to(torch.float8_e8m0fnu)
    entry = {"quant_method": "fp8", "weight_block_size": [1, 2]}
    assert decode(entry, {"weight": codes, "weight_scale_inv": power}, (1, 4)).tolist() == [[0.25, 0.25, 8.0, 8.0]]


def test_gptq_by_hand() -> None:
    """Eight codes 0 to 7 in a word; zero point 3, stored as 2 in the first version of the format."""
    word = sum(code << 4 * code for code in range(8))
    parts = {
        "qweight": torch.tensor([[word]], dtype=torch.int32),
        "qzeros": torch.tensor([[2]], dtype=torch.int32),
        "scales": torch.tensor([[0.5]], dtype=torch.float16),
    }
    first = decode(GPTQ, parts, (1, 8), "F16")
    assert first.tolist() == [[-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]]
    second = decode(GPTQ | {"checkpoint_format": "gptq_v2"}, parts, (1, 8), "F16")
    assert torch.equal(second, first + 0.5)


def test_awq_is_what_compressed_tensors_makes_of_it(draw: torch.Generator) -> None:
    shape = (16, 24)
    parts = {
        "qweight": torch.randint(-(2**31), 2**31, (shape[1], 2), generator=draw, dtype=torch.int64).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (3, 2), generator=draw, dtype=torch.int64).int(),
        "scales": torch.rand(3, 16, generator=draw).half(),
    }
    converted = AutoAWQConverter(group_size=8).process({f"m.{name}": tensor for name, tensor in parts.items()})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=8)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    given = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    expected = library.decompress(given, QuantizationScheme(targets=["Linear"], weights=weights))["weight"]
    entry = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True}
    torch.testing.assert_close(decode(entry, parts, shape, "F16"), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, None])
def test_packed_integers_are_what_compressed_tensors_makes_of_them(
    bits: int, symmetric: bool, group: int | None, draw: torch.Generator
) -> None:
    shape, strategy = (12, 24), "group" if group else "channel"
    described = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**described))
    groups = 24 // group if group else 1
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (12, groups), generator=draw, dtype=torch.int8)
    given = {"weight": torch.randn(shape, generator=draw), "weight_scale": torch.rand(12, groups, generator=draw) + 0.1}
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    parts = library.compress(given | ({} if symmetric else {"weight_zero_point": zero}), scheme)
    expected = library.decompress(parts, scheme)["weight"]
    found = decode(compressed("pack-quantized", **described), parts, shape, "F32")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_mxfp4_of_compressed_tensors_by_hand() -> None:
    """Codes 1 to 7 are .5, 1, 1.5, 2, 3, 4, 6; with 8 added they are negative. 128 stands for 2."""
    codes = torch.arange(32) % 16
    packed = (codes[::2] + 16 * codes[1::2]).to(torch.uint8)[None]
    entry = compressed("mxfp4-pack-quantized", **(NVFP4 | {"strategy": "group", "group_size": 32}))
    found = decode(entry, {"weight_packed": packed, "weight_scale": torch.tensor([[128]], dtype=torch.uint8)}, (1, 32))
    half = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert found[0, :16].tolist() == [*half, *(-value for value in half)]


def test_a_module_lies_as_its_group_says() -> None:
    entry = compressed("pack-quantized", num_bits=8)
    experts = {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    entry["config_groups"]["group_1"] = experts
    # Those that name modules are asked first.
    assert [(way.label, way.targets) for way in ways_of(entry)] == [
        ("int4, groups of 32", ("re:.*experts.*",)),
        ("int8, groups of 8", ("Linear",)),
    ]


# What is refused


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_source(LAYOUTS[name], tmp_path_factory.mktemp(name))[0]
        return made[name]

    return get


@pytest.fixture
def copy(sources: Callable[[str], Path], tmp_path: Path) -> Copy:
    """Return a function that copies a source and changes its tensors and its quantization_config."""

    def make(name: str, change: Callable[[Tensors], object] = lambda tensors: None, **entry: object) -> Path:
        folder = shutil.copytree(sources(name), tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= entry
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _ = Original(folder).facts
    return str(caught.value)


CURE = "the checkpoint is damaged or incomplete: download it again"
EXPERT = "model.layers.1.mlp.experts.7.down_proj."


@pytest.mark.parametrize(
    ("name", "code", "label", "lost"),
    [
        ("fp8-blocks-qwen3", f"{EXPERT}weight", "FP8 in blocks of 8 x 8", f"{EXPERT}weight_scale_inv"),
        ("fp8-rows", f"{EXPERT}weight", "FP8 by row", f"{EXPERT}weight_scale"),
        ("w4a16-zeros", f"{EXPERT}weight_packed", "int4, groups of 8", f"{EXPERT}weight_zero_point"),
        ("gptq", f"{EXPERT}qweight", "GPTQ int4, groups of 8", f"{EXPERT}scales"),
        ("awq", f"{EXPERT}qweight", "AWQ int4, groups of 8", f"{EXPERT}qzeros"),
        ("nvfp4", f"{EXPERT}weight_packed", "NVFP4", f"{EXPERT}weight_global_scale"),
        (
            "mxfp4",
            "model.layers.1.mlp.experts.down_proj_blocks",
            "MXFP4",
            "model.layers.1.mlp.experts.down_proj_scales",
        ),
    ],
)
def test_codes_without_scales_are_named(name: str, code: str, label: str, lost: str, copy: Copy) -> None:
    folder = copy(name, lambda tensors: tensors.pop(lost))
    assert refusal(folder) == f"{folder}: {code!r} is {label}, and {lost!r} is missing; {CURE}"


FP8_HAS = "a weight of [32, 24] that is FP8 in blocks of 8 x 8 has F32 or BF16 or F16 or F8_E8M0 [4, 3]"
PACKED_HAS, SHORT = "a weight of [32, 64] that is int4, groups of 8 has I32 [32, 8]", "weight_packed"


@pytest.mark.parametrize(
    ("name", "part", "value", "odd", "told"),
    [
        ("fp8-blocks-qwen3", "weight_scale_inv", torch.ones(3, 4), "", f"F32 [3, 4]; {FP8_HAS}"),
        ("fp8-blocks-qwen3", "weight_scale_inv", torch.ones(4, 3).int(), "", f"I32 [4, 3]; {FP8_HAS}"),
        # The shape is believed, so it is the codes that do not fit it.
        ("w4a16-zeros", "weight_shape", torch.tensor([32, 64]), SHORT, f"I32 [32, 3]; {PACKED_HAS}"),
        (
            "gptq",
            "scales",
            torch.ones(2, 32).half(),
            "",
            "F16 [2, 32]; a weight of [32, 24] that is GPTQ int4, groups of 8 has F32 or BF16 or F16 [3, 32]",
        ),
        (
            "awq",
            "qzeros",
            torch.ones(3, 4).int(),
            "",
            "I32 [3, 4]; a weight of [32, 16] that is AWQ int4, groups of 8 has I32 [2, 4]",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(
    name: str, part: str, value: torch.Tensor, odd: str, told: str, copy: Copy
) -> None:
    folder = copy(name, lambda tensors: tensors.update({EXPERT + part: value}))
    assert refusal(folder) == f"{folder}: {EXPERT + (odd or part)!r} is {told} there; {CURE}"


def test_scales_without_codes_are_named(copy: Copy) -> None:
    folder = copy("fp8-rows", lambda tensors: tensors.update({f"{EXPERT}weight": torch.ones(32, 24)}))
    assert refusal(folder) == f"{folder}: '{EXPERT}weight_scale' goes with quantized weights that are not there; {CURE}"


def test_a_weight_that_lies_twice_is_refused(copy: Copy) -> None:
    folder = copy("gptq", lambda tensors: tensors.update({f"{EXPERT}weight": torch.ones(32, 24)}))
    assert refusal(folder) == f"{folder}: '{EXPERT}weight' lies there and as codes too; delete what is not meant"


def test_a_word_of_codes_without_any_is_refused(copy: Copy) -> None:
    def plain(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors.pop(name)
            tensors[name.removesuffix("_scale_inv")] = tensors[name.removesuffix("_scale_inv")].bfloat16()

    folder = copy("fp8-blocks-qwen3", plain)
    assert "config.json says that weights are quantized (fp8), and none lies so; take that entry out" in refusal(folder)


def test_experts_of_one_layer_that_lie_in_two_ways_are_refused(copy: Copy) -> None:
    def plain(tensors: Tensors) -> None:
        tensors.pop(f"{EXPERT}weight_scale")
        tensors[f"{EXPERT}weight"] = tensors[f"{EXPERT}weight"].bfloat16()

    assert re.search(r"expert 0 of model\.layers\.1 has [\d,]+ bytes, others", refusal(copy("fp8-rows", plain)))


@pytest.mark.parametrize(
    ("name", "entry", "said"),
    [
        ("fp8-blocks", {"weight_block_size": [128, 0]}, "(fp8): weight_block_size = [128, 0]: not two sizes"),
        ("fp8-blocks", {"fmt": "e5m2"}, "(fp8): fmt = 'e5m2' is not handled, e4m3 and float8_e4m3fn are"),
        ("gptq", {"bits": 5}, "(gptq): bits = 5 is not handled; give the bf16 or fp32 original"),
        ("gptq", {"group_size": 0}, "(gptq): group_size = 0 is not handled"),
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "(gptq): checkpoint_format = 'marlin' is not handled, gptq and gptq_v2",
        ),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "(gptq): dynamic has bits of their own for '+:.*down.*'"),
        ("awq", {"version": "gemv"}, "(awq): version = 'gemv' is not handled, gemm are"),
        ("awq", {"zero_point": False}, "(awq): zero_point = False is not handled"),
        ("awq", {"bits": "4"}, "(awq): bits = '4' is not handled"),
        ("w4a16", {"sparsity_config": {"format": "sparse"}}, "(compressed-tensors): sparse weights are not handled"),
        ("w4a16", {"config_groups": {"g": {"targets": 5}}}, "(compressed-tensors): compressed-tensors cannot read its"),
        ("w4a16", {"config_groups": {"g": {"targets": ["re:("], "weights": {}}}}, "cannot read its groups: "),
        ("w4a16", compressed("marlin-24"), "format 'marlin-24' is not handled"),
        (
            "w4a16",
            compressed("int-quantized"),
            "format 'int-quantized' is not handled, pack-quantized, float-quantized",
        ),
        (
            "fp8-rows",
            compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}),
            "(compressed-tensors): activations in 8-bit integers are not run here; give the bf16 or fp32 original",
        ),
        (
            "fp8-rows",
            compressed("float-quantized", **(BY_ROW | {"strategy": "group", "group_size": 8})),
            "(compressed-tensors): format 'float-quantized' with scales by group is not handled",
        ),
        ("gptq", {"quant_method": "auto-round"}, "(auto-round): not supported yet; give the bf16 or fp32 original"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(name: str, entry: dict[str, object], said: str, copy: Copy) -> None:
    folder = copy(name, **entry)
    (folder / "model.safetensors").unlink()  # the config tells, before any weight
    told = refusal(folder)
    assert told.startswith(f"{folder / 'config.json'}: weights are quantized")
    assert said in told


def test_files_beside_are_no_matter_where_the_config_says_it(copy: Copy) -> None:
    folder = copy("gptq")
    (folder / "quantize_config.json").write_text("{}")
    assert Original(folder).facts.stacks[0].lies == "GPTQ int4, groups of 8"
