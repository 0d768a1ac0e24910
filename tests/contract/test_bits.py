"""Experts in few bits, on every family and beside every other answer."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moetailor
from moetailor.answers import Borrowed, Keep, Remap, Width
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.evaluation.fidelity import Reference
from moetailor.methods.registry import with_bits
from moetailor.planning.layer_plan import LayerPlan
from moetailor.summary import summarise
from support import naive
from support.methods import REMOVING, TINY_PARAMETERS
from support.tiny import IDS, anatomy_of, eager, every_family_with, families_in_turn, load, logits

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
# Experts in two widths, one as it lies, and one that answers two slots: everything that the runtime tells apart.
VQ = Width(bits=2, down=6, codes="vq")  # codebooks, and integers with zero points
WIDTHS = {0: VQ, 1: Width(bits=3, codes="int"), 2: VQ}


def mixed(calibration: moetailor.Calibration) -> moetailor.Plan:
    """Return a plan with two widths, plain experts, and slots that ask for one in few bits and for a plain one."""
    made = moetailor.make_plan(calibration, "quantize", moetailor.Budget.parse(remove=0))
    layers = {}
    for prefix, layer in made.layers.items():
        slots = [Keep() for _ in layer.slots]
        slots[-1], slots[-2] = Remap(0, 0.5), Remap(3)
        layers[prefix] = LayerPlan(slots=tuple(slots), widths=WIDTHS)
    return replace(made, layers=layers)


def dequantized(model: torch.nn.Module, compressed: torch.nn.Module, plan: moetailor.Plan) -> torch.nn.Module:
    """Put what the codes of the compressed model stand for in the place of the original's weights, remaps too."""
    for index, layer in anatomy_of(model).layers.items():
        module, packed = model.get_submodule(layer.experts), compressed.get_submodule(layer.experts)
        matrices = {name: stack.clone() for name, stack in Experts(module).matrices().items()}
        for width, experts in plan.by_layer[index].packed.items():
            for name, stack in matrices.items():
                stack[experts] = packed.tensor(f"{width.stem}_{name}")
        for slot, answer in plan.by_layer[index].of(Remap).items():
            for name, stack in matrices.items():
                scale = answer.scale if name.startswith("down") else 1.0
                stack[slot] = stack[answer.to] * scale
        with torch.no_grad():
            for name, tensor in Experts(module).packed(matrices).items():
                getattr(module, name).copy_(tensor)
    return model


@families_in_turn(2)
def test_they_give_what_their_numbers_give(name: str, checkpoint: Get, calibration: GetCalibration) -> None:
    plan = mixed(calibration(name))
    compressed = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    expected = dequantized(load(checkpoint(name)), compressed, plan)
    torch.testing.assert_close(logits(compressed), logits(expected), rtol=1e-4, atol=1e-4)
    for index, layer in anatomy_of(expected).layers.items():
        assert plan.by_layer[index].plain[0] == 3
        seen = naive.run_recorded(compressed, layer, IDS)
        y = expected.get_submodule(layer.experts)(seen["hidden"], seen["index"], seen["gate"])
        got = compressed.get_submodule(layer.experts)(seen["hidden"], seen["index"], seen["gate"])
        torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)


@every_family_with("every", None, "4", "vq1/2", "fp8", "nvfp4")
def test_they_round_trip(
    name: str, every: str | None, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    plan = mixed(calibration(name))
    if every:  # no expert lies as the family has it
        width = vars(Width.parse(every))
        plan = moetailor.make_plan(calibration(name), "quantize", moetailor.Budget.parse(remove=0), parameters=width)
    plan.save(tmp_path / "plan.json")
    assert moetailor.Plan.load(tmp_path / "plan.json") == plan
    out = moetailor.apply(plan, checkpoint(name), tmp_path / "out", calibration=calibration(name))
    assert open_checkpoint(out).nbytes == plan.nbytes
    expected = logits(eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name))))
    assert torch.isfinite(expected).all()
    from_disk = load(out)
    torch.testing.assert_close(logits(from_disk), expected, rtol=1e-5, atol=1e-5)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager(from_disk).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(REMOVING) - {"camera", "compressed_experts"}))
def test_every_method_takes_bits_on_top(
    method: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """What the method decides stays; its pool, merged and fitted experts too, lies in few bits."""
    given = {"parameters": TINY_PARAMETERS.get(method)}
    budget, measured = moetailor.Budget.parse(remove="25%"), calibration("qwen2_moe")
    plain = moetailor.make_plan(measured, method, budget, **given)
    plan = moetailor.make_plan(measured, method, budget, width=Width(bits=4, down=8), **given)
    assert [layer.slots for layer in plan.by_layer.values()] == [layer.slots for layer in plain.by_layer.values()]
    assert all(not layer.plain and layer.widths for layer in plan.by_layer.values())
    assert plan.budget.endswith(", 4/8 bits")
    written = {"calibration": measured, "verify": False}
    out = moetailor.apply(plan, checkpoint("qwen2_moe"), tmp_path / "out", **written)
    whole = moetailor.apply(plain, checkpoint("qwen2_moe"), tmp_path / "plain", **written)
    assert open_checkpoint(out).nbytes == plan.nbytes < plain.nbytes
    expected = logits(load(whole))
    assert float((logits(load(out)) - expected).norm() / expected.norm()) < 0.3
    assert summarise(out).parameters == summarise(whole).parameters
    stored = (info for name, info in open_checkpoint(out).tensors.items() if "packed_uint" in name)
    packed = sum(layer.experts * layer.expert_bytes for layer in summarise(out).moe)
    if method not in ("auto", "lightmoe"):  # whose bases are experts of another size
        assert packed == sum(info.nbytes for info in stored)


def test_experts_of_other_layers_lie_in_few_bits_too(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    """Whose layer has no parameter left among its experts."""
    measured, given = calibration("olmoe"), {"parameters": {"scope": 2}}
    budget = moetailor.Budget.parse(remove="50%")
    plans = [moetailor.make_plan(measured, "conmoe", budget, width=width, **given) for width in (Width(bits=8), None)]
    assert any(isinstance(answer, Borrowed) for layer in plans[0].layers.values() for answer in layer.slots)
    packed, plain = (
        load(moetailor.apply(plan, checkpoint("olmoe"), tmp_path / str(number), calibration=measured))
        for number, plan in enumerate(plans)
    )
    torch.testing.assert_close(logits(packed), logits(plain), rtol=0.1, atol=0.1)
    found = Reference(tmp_path / "r", [moetailor.Batch.of(IDS)]).record(plain).compare(packed, plain)[""]
    assert found.tokens == IDS.numel() - len(IDS)
    assert 0 < found.kl.mean < 0.01


def test_auxiliary_slots_need_their_experts_as_they_are(calibration: GetCalibration) -> None:
    with pytest.raises(moetailor.PlanError, match="need their experts as they are; leave widths out"):
        moetailor.make_plan(
            calibration("olmoe"), "compressed_experts", moetailor.Budget.parse(keep=6),
            parameters={"main": 1}, width=Width(bits=4),
        )  # fmt: skip


@pytest.mark.parametrize("method", ["reap", "mone", "conmoe"])
def test_a_size_counts_bits(method: str, calibration: GetCalibration) -> None:
    """In the bytes in which half of the experts fit as they lie, all of them fit in 4 bits."""
    measured, width = calibration("olmoe"), Width(bits=4)
    half = moetailor.make_plan(measured, method, moetailor.Budget.parse(keep=4))
    plan = moetailor.make_plan(measured, method, moetailor.Budget.parse(size=half.nbytes), width=width)
    assert plan.nbytes <= half.nbytes
    assert all(len(layer.pool) == 8 for layer in plan.layers.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"method": "quantize", "budget": {"remove": "25%"}},
            "remove 25%: quantize removes no expert; leave it out",
        ),
        ({"method": "quantize", "width": Width(bits=4)}, "--bits: quantize says itself how experts lie"),
        ({"method": "auto", "width": Width(bits=4)}, "--bits: auto says itself how experts lie"),
        ({"method": "quantize", "parameters": {"bits": 9}}, "9 bits: there are 2 to 8"),
        ({"method": "quantize", "budget": {"size": 1000}}, "still .* bytes; ask for at least that"),
        (
            {"method": "quantize", "budget": {"memory": 10**6, "load_dtype": "bfloat16"}},
            "--load-dtype bfloat16: experts in few bits stay integers in memory",
        ),
        (
            {"method": "auto", "budget": {"memory": 90_000, "load_dtype": "float32"}},
            "--load-dtype float32: experts in few bits stay integers in memory",
        ),
    ],
)
def test_what_cannot_be(given: dict, said: str, calibration: GetCalibration) -> None:
    budget = moetailor.Budget.parse(**given.pop("budget", {"remove": 0}))
    with pytest.raises(moetailor.PlanError, match=said):
        moetailor.make_plan(calibration("olmoe"), budget=budget, **given)


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ([{"experts": [1], "bits": 4}], "expert 1 lies in few bits, which does not stay"),
        ([{"experts": [0], "bits": 9}], "9 bits: there are 2 to 8"),
        ([{"experts": [0], "bits": 4, "down": 1}], "1 bit: there are 2 to 8; codebooks have 1, as vq1"),
        ([{"experts": [0, 0], "bits": 4}], "expert 0 is named twice"),
        ([{"experts": [8], "bits": 4}], "it must be 0 to 7"),
        ([{"bits": 4}], "is None, not a list"),
        ([{"experts": [0]}], "lacks bits"),
        ([{"experts": [0], "bits": 4, "groups": 3}], "unknown keys"),
        ({"0": 4}, "not a list"),
    ],
)
def test_widths_that_do_not_add_up_are_refused(
    widths: object, said: str, calibration: GetCalibration, tmp_path: Path, run: Callable
) -> None:
    plan = moetailor.make_plan(calibration("olmoe"), "mone", moetailor.Budget.parse(keep=7), protect=[(0, 0), (1, 0)])
    content = plan.to_json()
    layer = next(iter(content["layers"].values()))
    layer["constant"], layer["keep"] = [1], [0, *range(2, 8)]
    layer["widths"] = widths
    (tmp_path / "plan.json").write_text(json.dumps(content))
    code, _, err = run("show", tmp_path / "plan.json")
    assert code == 1
    assert said.split(".*")[0] in " ".join(err.split())


def test_bits_are_read_as_they_are_written(run: Callable, tmp_path: Path) -> None:
    assert [Width.parse(text) for text in ("4", "4/6", 3)] == [Width(bits=4), Width(bits=4, down=6), Width(bits=3)]
    assert Width.parse("int4g32") == Width(bits=4, group=32, codes="int")
    assert Width.parse("uint8g128") == Width(bits=8)
    assert Width.parse("vq2") == Width(bits=2, codes="vq")
    assert Width.parse("vq1/6g64") == Width(bits=1, down=6, group=64, codes="vq")
    assert Width.parse("fp8") == Width(bits=8, codes="fp8")
    assert Width.parse("fp8b128") == Width(bits=8, codes="fp8b128")
    assert [Width.parse(f"{name}fp4") for name in ("mx", "nv")] == [
        Width(bits=4, codes="mxfp4"),
        Width(bits=4, codes="nvfp4"),
    ]
    for text in (
        "9",
        "4/1",
        "4/6/8",
        "four",
        "1",
        "",
        "int9g32",
        "int4g0",
        "fp8g32",
        "fp6",
        "nvfp4g32",
        "fp4",
        "mxfp4/8",
    ):
        with pytest.raises(moetailor.PlanError, match="write 2 to 8, or as 4/6"):
            Width.parse(text)
    for text in ("vq5", "vq6/8"):
        with pytest.raises(moetailor.PlanError, match=r"--bits vq\S+: vq.: codebooks have 1 to 4 bits"):
            Width.parse(text)
    code, _, err = run("plan", tmp_path, "-o", tmp_path / "p.json", "-m", "reap", "--remove", "25%", "--bits", "16")
    assert code == 1
    assert "--bits 16: write 2 to 8" in err


def test_bits_beside_quantize_are_its_parameters() -> None:
    assert with_bits("quantize", {"rounding": "nearest"}, "4") == ({"rounding": "nearest", "bits": 4}, None)
    assert with_bits("Quantize", {}, "vq2/4g64") == ({"bits": 2, "down": 4, "codes": "vq", "group": 64}, None)
    assert with_bits("quantize", {"bits": "4"}, "4") == ({"bits": 4}, None)
    assert with_bits("reap", {"layer": "1"}, "4/6") == ({"layer": "1"}, Width(bits=4, down=6))
    with pytest.raises(moetailor.PlanError, match=r"--bits 4/6: parameters say bits, down in another way"):
        with_bits("quantize", {"bits": "3", "down": "5"}, "4/6")
