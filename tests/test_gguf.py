"""The GGUF format: squared inputs as a loop over the sample sums them, types by layer, and llama.cpp's own tools."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moetailor
from moetailor.answers import Width
from moetailor.checkpoint.experts import ExpertShape
from moetailor.transform.gguf_recipe import tensor_types
from support.tiny import Get, GetCalibration, load


def planned(calibration: moetailor.Calibration, method: str = "reap", bits: str | None = "4/6") -> moetailor.Plan:
    width = None if bits is None else Width.parse(bits)
    return moetailor.make_plan(calibration, method, moetailor.Budget.parse(keep=6), width=width)


def read(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    gguf = pytest.importorskip("gguf")
    found = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in found.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data) for tensor in found.tensors}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("method", "bits"), [("reap", "4/6"), ("ream", None)])
def test_sums_are_those_of_a_loop_over_the_sample(
    method: str, bits: str | None, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """Of each token and each expert that it chose and that stays, through the weights of the result."""
    pytest.importorskip("gguf")
    measured = calibration("olmoe")
    plan = planned(measured, method, bits)
    out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=measured, format="gguf")
    weights = {name: tensor.double().numpy() for name, tensor in load_file(out / "model.safetensors").items()}
    fields, got = read(out / "imatrix.gguf")
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["moetailor calibration"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 12,
    }
    assert len(got) == 2 * 3 * len(plan.model.stacks)
    for index, layer in plan.by_layer.items() if bits else enumerate(plan.layers.values()):
        sample, rows = measured.sample(index), {expert: row for row, expert in enumerate(layer.pool)}
        sums, counts = {"gate": np.zeros((6, 32)), "down": np.zeros((6, 16))}, np.zeros(6)
        for hidden, experts in zip(sample.hidden, sample.index.tolist(), strict=True):
            x = hidden.double().numpy()
            for row in (rows[expert] for expert in experts if expert in rows):
                gate, up = (weights[f"model.layers.{index}.mlp.experts.{row}.{p}_proj.weight"] for p in ("gate", "up"))
                counts[row] += 1
                sums["gate"][row] += x**2
                sums["down"][row] += (silu(gate @ x) * (up @ x)) ** 2
        for part in ("gate", "up", "down"):
            name = f"blk.{index}.ffn_{part}_exps.weight"
            np.testing.assert_allclose(got[f"{name}.in_sum2"], sums[part if part == "down" else "gate"], rtol=1e-4)
            np.testing.assert_array_equal(got[f"{name}.counts"], counts[:, None])
    assert (counts > 0).any()


@pytest.mark.filterwarnings("always::moetailor.MoetailorWarning")
def test_the_result_is_native_and_the_types_are_the_plans(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path, run: Callable
) -> None:
    pytest.importorskip("gguf")
    measured = calibration("olmoe")
    planned(measured).save(tmp_path / "plan.json")
    words = ["apply", checkpoint("olmoe"), tmp_path / "plan.json", "-o", tmp_path / "out", "--calibration"]
    code, _, said = run(*words, measured.folder, "--format", "gguf")
    assert code == 0
    assert f"python convert_hf_to_gguf.py {tmp_path / 'out'} --outfile whole.gguf --outtype auto" in said
    assert "llama-quantize --imatrix" in said
    assert "rows of 32 numbers are no whole blocks of q4_k; iq4_nl stands in its place" in " ".join(said.split())
    native = moetailor.apply(planned(measured, bits=None), checkpoint("olmoe"), tmp_path / "native")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", native))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "out" / "tensor-types.txt").read_text() == "".join(
        rf"blk\.{index}\.ffn_gate_exps\.weight=iq4_nl"
        "\n"
        rf"blk\.{index}\.ffn_up_exps\.weight=iq4_nl"
        "\n"
        rf"blk\.{index}\.ffn_down_exps\.weight=f16"
        "\n"
        for index in (0, 1)
    )


def test_a_recipe_lies_in_a_folder_of_its_own(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    measured, out, recipe = calibration("olmoe"), tmp_path / "out", tmp_path / "recipe"
    given: dict[str, Any] = {"calibration": measured, "gguf_recipe": recipe}
    moetailor.apply(planned(measured), checkpoint("olmoe"), out, **given)
    assert sorted(file.name for file in recipe.iterdir() if "moetailor" not in file.name) == [
        "imatrix.gguf",
        "tensor-types.txt",
    ]
    for name in ("imatrix.gguf", "tensor-types.txt"):
        assert (recipe / name).read_bytes() == (out / name).read_bytes()
    assert load(out)  # an ordinary checkpoint
    for options, told in (
        ({"format": "moetailor"}, "--gguf-recipe: llama.cpp loads native results; leave --format moetailor out"),
        ({"calibration": None}, "measured on the calibration's sample; --calibration"),
        ({"gguf_recipe": tmp_path / "new"}, "is the result itself; choose another folder"),
        ({}, "recipe: exists; choose another folder or pass --overwrite"),
    ):
        with pytest.raises(moetailor.MoetailorError, match=told):
            moetailor.apply(planned(measured), checkpoint("olmoe"), tmp_path / "new", **(given | options))
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("bits", "wide", "inner", "types"),
    [
        ("4/6", 2048, 768, ("q4_k", "q4_k", "q6_k")),
        ("8", 2048, 768, ("q8_0", "q8_0", "q8_0")),
        ("7", 2048, 768, ("q8_0", "q8_0", "q8_0")),
        ("5", 2048, 768, ("q5_k", "q5_k", "q5_k")),
        ("2/3", 2048, 768, ("iq2_xs", "iq2_xs", "q3_k")),
        ("4/6", 2880, 1408, ("iq4_nl", "iq4_nl", "q5_1")),
        ("5", 2880, 1408, ("q5_0", "q5_0", "q5_0")),
        ("2", 2048, 1000, ("iq2_xs", "iq2_xs", "f16")),
        (None, 2048, 768, ("f32", "f32", "f32")),
    ],
)
@pytest.mark.filterwarnings("ignore::moetailor.MoetailorWarning")
def test_types_by_bits_and_by_rows(
    bits: str | None, wide: int, inner: int, types: tuple, calibration: GetCalibration
) -> None:
    plan = planned(calibration("olmoe"), bits=bits)
    shape = ExpertShape(width=wide, intermediate=inner)
    stacks = tuple(replace(stack, shape=shape) for stack in plan.model.stacks)
    found = tensor_types(replace(plan, model=replace(plan.model, stacks=stacks)))
    assert list(found.values()) == list(types) * 2
    assert list(found)[:3] == [rf"blk\.0\.ffn_{part}_exps\.weight" for part in ("gate", "up", "down")]


CONVERTER = """
import pathlib, sys
folder, out = sys.argv[1], sys.argv[3]
assert (pathlib.Path(folder) / "model.safetensors").stat().st_size
assert "license: mit" in (pathlib.Path(folder) / "README.md").read_text()
pathlib.Path(out).write_text(" ".join(["whole", *sys.argv[4:]]))
"""
QUANTIZER = f"""#!{sys.executable}
import pathlib, sys
*given, source, target, rest = sys.argv[1:]
names = [pathlib.Path(name).name for name in given]
pathlib.Path(target).write_text(" ".join([pathlib.Path(source).read_text(), *names, rest]))
"""


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, Path]:
    """Stand-ins for llama.cpp's tools, which write what they were called with."""
    found = {"converter": tmp_path / "convert.py", "quantizer": tmp_path / "quantize"}
    found["converter"].write_text(CONVERTER)
    found["quantizer"].write_text(QUANTIZER)
    found["quantizer"].chmod(0o755)
    return found


@pytest.fixture
def licensed(checkpoint: Get, tmp_path: Path) -> Path:
    """An original whose card names its licence."""
    copied = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "some-model"))
    (copied / "README.md").write_text("---\nlicense: mit\n---\n")
    return copied


@pytest.mark.filterwarnings("ignore::moetailor.MoetailorWarning")
def test_the_tools_get_what_they_need_and_the_file_takes_the_checkpoints_place(
    licensed: Path, tools: dict[str, Path], calibration: GetCalibration, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    measured, given = calibration("olmoe"), {"format": "gguf", "overwrite": True}
    plan, out = planned(measured), tmp_path / "out"
    for used in (["converter"], ["converter", "quantizer"]):
        named = {name: tools[name] for name in used}
        moetailor.apply(plan, licensed, out, calibration=measured, **given, **named)
        told = json.loads((out / "moetailor_provenance.json").read_text())
        assert not {"model.safetensors", "config.json", "whole.gguf"} & {file.name for file in out.iterdir()}
        assert told["bytes"]["compressed"] == (out / "model.gguf").stat().st_size
        assert moetailor.Plan.load(out / "moetailor_plan.json").layers == plan.layers
        rounded = " --imatrix imatrix.gguf --tensor-type-file tensor-types.txt Q8_0" if "quantizer" in used else ""
        assert (out / "model.gguf").read_text() == f"whole --outtype auto --model-name some-model{rounded}"


@pytest.mark.parametrize("failing", ["converter", "quantizer"])
@pytest.mark.filterwarnings("ignore::moetailor.MoetailorWarning")
def test_a_tool_that_fails_leaves_nothing(
    failing: str, licensed: Path, tools: dict[str, Path], calibration: GetCalibration, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    measured = calibration("olmoe")
    begin = f"#!{sys.executable}\n"
    tools[failing].write_text(begin + "print('line\\n' * 50 + 'no such type')\nraise SystemExit(3)")
    with pytest.raises(moetailor.MoetailorError) as refused:
        moetailor.apply(planned(measured), licensed, tmp_path / "out", calibration=measured, format="gguf", **tools)
    first, *last = str(refused.value).splitlines()
    assert first == f"--{failing}: ended with status 3, nothing was kept; its last lines:"
    assert last == ["line"] * 11 + ["no such type"]
    assert {file.name for file in tmp_path.iterdir()} == {"some-model", "convert.py", "quantize"}


def test_a_tied_head_is_said(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "tied"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    plan = planned(calibration("olmoe"), bits=None)
    with pytest.warns(moetailor.MoetailorWarning, match=r"the head is tied to the embedding; .* wants lm_head.weight"):
        moetailor.apply(plan, source, tmp_path / "out", allow_other_weights=True, format="gguf")


def test_what_is_refused(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, source = calibration("olmoe"), checkpoint("olmoe")
    plan, lost = planned(measured), tmp_path / "lost"

    def said(plan: moetailor.Plan, **options: object) -> str:
        with pytest.raises(moetailor.MoetailorError) as refused:
            moetailor.apply(plan, source, tmp_path / "out", **({"calibration": measured, "format": "gguf"} | options))
        return str(refused.value)

    assert said(planned(measured, "mone")).startswith("format gguf holds dropped slots only")
    (name, layer), *_ = plan.layers.items()
    two = replace(layer, widths=layer.widths | {layer.pool[0]: Width(bits=8)})
    assert said(replace(plan, layers=plan.layers | {name: two})) == (
        "format gguf has one type for all experts of a layer, model.layers.0 has them in 4/6 bits, 8 bits; plan one "
        "width for each layer; format moetailor can hold it"
    )
    assert said(plan, converter=lost) == f"--converter {lost}: there is no such file"
    assert said(plan, quantizer=lost) == "--quantizer: rounds what --converter has converted; give that too"
    assert said(planned(measured, bits=None), format="native", converter=lost) == (
        "--converter and --quantizer are for --format gguf; this result is native"
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert said(plan) == (
        "format gguf: writing an importance matrix needs the gguf library: pip install 'moetailor[gguf]'"
    )
    assert not (tmp_path / "out").exists()
