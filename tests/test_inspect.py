"""Redundancy: every number against a slow loop over tokens, and redundancy that was planted."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.checkpoint.anatomy import discover
from moetailor.inspection.buddies import MOST
from moetailor.inspection.redundancy import FEW, RANKS, REMOVE, RIDGE, STAND_INS, layer_redundancy
from moetailor.inspection.verdict import spread, verdict, weighed, widths_told
from moetailor.methods.run import view_of
from moetailor_cli import output, redundancy
from support.families import tiny_model
from support.hand import layer_of
from support.layers import layer_of_tokens, random_experts
from support.naive import expert_output
from support.planted import PLANTED, Planted, planted_batches, planted_model
from support.reference import REFERENCE, TEXT
from support.tiny import token_batches

GetFolder = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def layer(calibration: GetCalibration) -> int:
    return calibration(FAMILY).layers[-1]


@pytest.fixture(scope="module")
def found(calibration: GetCalibration, layer: int):
    weights = moetailor.ExpertWeights(calibration(FAMILY).model.source)
    return layer_redundancy(view_of(calibration(FAMILY), layer, weights))


@pytest.fixture(scope="module")
def pairs(checkpoint: GetFolder, calibration: GetCalibration, layer: int) -> list[tuple[list[int], list[float], list]]:
    """For each token its experts, their gates, and the outputs of all experts of the layer as float64 arrays."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(FAMILY), dtype="float32").eval()
    moe = discover(model.config, model).layers[layer]
    sample = calibration(FAMILY).sample(layer)
    return [
        (
            index.tolist(),
            gate.double().tolist(),
            [expert_output(model, moe, expert, x).double().numpy() for expert in range(moe.num_experts)],
        )
        for x, index, gate in zip(sample.hidden, sample.index, sample.gate, strict=True)
    ]


def routed(pairs: list, expert: int) -> list[tuple[int, float]]:
    """Return the tokens that chose an expert, and their gates."""
    return [(t, gate[index.index(expert)]) for t, (index, gate, _) in enumerate(pairs) if expert in index]


def test_usage_and_its_entropy(found, pairs: list) -> None:
    counts = [len(routed(pairs, expert)) for expert in range(12)]
    shares = [count / (3 * len(pairs)) for count in counts]
    assert [one.usage for one in found.experts] == pytest.approx(shares)
    assert found.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares if share))
    assert found.used == pytest.approx(2**found.entropy)


def test_companions(found, pairs: list) -> None:
    most = []
    for one in found.experts:
        mine = [index for index, _, _ in pairs if one.expert in index]
        shared = [sum(other in index for index in mine) if other != one.expert else -1 for other in range(12)]
        if mine:
            most.append(max(shared) / len(mine))
            assert shared[one.companion] == max(shared)
            assert one.together == pytest.approx(most[-1])
    assert found.together == pytest.approx(sum(most) / len(most))
    assert found.most_together == pytest.approx(max(most))


def test_nearest_experts(found, pairs: list) -> None:
    nearest = []
    for one in found.experts:
        apart: dict[int, tuple[float, float]] = {}
        for other in set(range(12)) - {one.expert}:
            energy = product = square = 0.0
            for token, gate in routed(pairs, one.expert):
                y, z = pairs[token][2][one.expert], pairs[token][2][other]
                energy, product, square = energy + gate**2 * y @ y, product + gate**2 * y @ z, square + gate**2 * z @ z
            if energy:
                factor = product / square
                apart[other] = (energy - 2 * factor * product + factor**2 * square) / energy, factor
        if apart:
            nearest.append(min(apart.values())[0])
            assert [buddy.expert for buddy in one.buddies] == sorted(apart, key=lambda other: apart[other])[:MOST]
            mine = [index for index, _, _ in pairs if one.expert in index]
            for buddy in one.buddies:
                assert (buddy.distance, buddy.factor) == pytest.approx(apart[buddy.expert], rel=1e-4)
                assert buddy.together == pytest.approx(sum(buddy.expert in index for index in mine) / len(mine))
    assert found.least_distance == pytest.approx(min(nearest), rel=1e-4)
    assert found.mean_distance == pytest.approx(sum(nearest) / len(nearest), rel=1e-4)


def test_what_constants_leave(found, pairs: list) -> None:
    left = []
    for one in found.experts:
        mine = [(gate, pairs[token][2][one.expert]) for token, gate in routed(pairs, one.expert)]
        constant = sum(g * g * y for g, y in mine) / max(sum(g * g for g, _ in mine), 1e-300)
        assert one.energy == pytest.approx(sum(g * g * y @ y for g, y in mine) / len(pairs), rel=1e-4)
        left.append(sum(g * g * (y - constant) @ (y - constant) for g, y in mine) / len(pairs))
        assert one.left["constant"] == pytest.approx(left[-1], rel=1e-4, abs=1e-12)
    energy = sum(one.energy for one in found.experts)
    assert found.explained["constant"] == pytest.approx(1 - sum(left) / energy, rel=1e-4)
    for share, removed in zip(REMOVE, (1, 3, 6), strict=True):
        assert found.lost[share]["constant"] == pytest.approx(sum(sorted(left)[:removed]) / energy, rel=1e-3)


@pytest.mark.parametrize("tokens", [60, 300])
def test_what_maps_leave_of_tokens_that_were_held_out(tokens: int) -> None:
    """Against reduced-rank regression by numpy: of few tokens four folds are held out in turn, of many an eighth."""
    layer = layer_of_tokens(random_experts(4), tokens)
    one = layer_redundancy(layer).experts[2]
    token, gate = (part.numpy() for part in layer.routed(2))
    x = layer.sample.hidden[token].double().numpy()
    y = layer.experts.outputs(2, layer.sample.hidden[token]).double().numpy()
    folds = [np.arange(len(token)) % 4 == fold for fold in range(4)] if tokens == 60 else [token % 8 == 7]
    left = np.zeros(len(RANKS))
    for held in folds:
        q = gate[~held].astype(float) ** 2 / (gate[~held].astype(float) ** 2).sum()
        mean_x, mean_y = q @ x[~held], q @ y[~held]
        u, v = x[~held] - mean_x, y[~held] - mean_y
        c, m = u.T @ (q[:, None] * u), u.T @ (q[:, None] * v)
        c += RIDGE * np.trace(c) / len(c) * np.eye(len(c))
        directions = np.linalg.eigh(m.T @ np.linalg.solve(c, m))[1][:, ::-1]
        for at, rank in enumerate(RANKS):
            kept = directions[:, :rank]
            given = mean_y + (x[held] - mean_x) @ np.linalg.solve(c, m) @ kept @ kept.T
            left[at] += gate[held].astype(float) ** 2 @ ((y[held] - given) ** 2).sum(1)
    # The constant's error over all tokens, times what a map leaves of it on those held out.
    shares = [one.left[name] / one.left["constant"] for name in STAND_INS]
    assert shares == pytest.approx(left / left[0], rel=1e-3)


@pytest.fixture(scope="module", params=PLANTED)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> moetailor.Redundancy:
    folder = tmp_path_factory.mktemp(request.param)
    planted_model(request.param).save_pretrained(folder / "model")
    return moetailor.find_redundancy(
        moetailor.calibrate(folder / "model", folder / "calibration", text=planted_batches())
    )


def test_what_was_planted_is_found_and_nothing_else(planted: moetailor.Redundancy) -> None:
    what = Planted()
    assert (len(planted.layers), planted.kl) == (2, None)
    for layer in planted.layers:
        told = {f.expert: (f.kind, f.of, round(f.factor, 4), f.rank) for f in layer.findings}
        assert told == {
            what.duplicate: ("duplicate", what.original, 1, 0),
            what.permuted: ("duplicate", what.original, 1, 0),
            what.scaled: ("scaled", what.original, what.factor, 0),
            what.constant: ("constant", None, 1, 0),
            what.linear: ("linear", None, 1, what.rank),
            what.dead: ("dead", None, 1, 0),
        }
        assert set(told) == what.redundant
        assert layer.lost["10%"]["constant"] == 0  # one of twelve, the dead one
        for one in layer.experts:
            copies = {what.original, what.duplicate, what.permuted, what.scaled}
            assert (one.buddies[:1] != () and one.buddies[0].distance < 1e-4) == (one.expert in copies)


@pytest.mark.parametrize("width", [80, 100])
def test_what_is_printed_fits(
    planted: moetailor.Redundancy, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output._out, "_width", width)
    redundancy.show(planted)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    first, last = (layer.layer for layer in planted.layers)
    for number in (first, last):
        told = "dead: 10; constant: 4; linear of rank 4: 9; 3 = 1; 6 = 0.5 x 1; 8 = 1"
        assert f"layer {number}  {told}" in lines
    assert planted.verdict in " ".join(lines)
    names = lines[1].split()
    assert dict(zip(names, lines[2].split(), strict=True)) == {
        "layer": str(first),
        "bits": f"{planted.layers[0].entropy:.2f}",
        "used": f"{planted.layers[0].used:.1f}",
        "of": "12",
        "together": f"{planted.layers[0].together:.0%}",
        "most": f"{planted.layers[0].most_together:.0%}",
        "apart": f"{planted.layers[0].mean_distance:.0%}",
        "least": "0%",
    } | {name: f"{share:.0%}" for name, share in zip(names[8:], planted.layers[0].explained.values(), strict=True)}


def test_copies_of_any_factor_are_found_by_their_first() -> None:
    module = random_experts(5)
    for copy, factor in ((0, -2.0), (4, 3.0)):
        module.gate_up_proj.data[copy] = module.gate_up_proj[2]
        module.down_proj.data[copy] = factor * module.down_proj[2]
    layer = layer_of_tokens(module)
    findings = {finding.expert: finding for finding in layer_redundancy(layer).findings}
    assert set(findings) == {2, 4}
    assert (findings[2].kind, findings[2].of, findings[4].of) == ("scaled", 0, 0)
    assert findings[2].factor == pytest.approx(-1 / 2)
    assert findings[4].factor == pytest.approx(-3 / 2)


def test_an_expert_that_gives_nothing_is_a_constant() -> None:
    module = random_experts(4)
    module.down_proj.data[3] = 0
    made = layer_redundancy(layer_of_tokens(module))
    assert [(finding.expert, finding.kind) for finding in made.findings] == [(3, "constant")]
    assert made.experts[3].buddies == ()
    assert [len(one.buddies) for one in made.experts[:3]] == [2, 2, 2]


@pytest.mark.parametrize(("tokens", "constants"), [(FEW - 1, 0), (FEW, 4)])
def test_few_tokens_are_no_evidence(tokens: int, constants: int) -> None:
    """Of one input repeated every expert gives a constant, but only of enough of them is that said."""
    made = layer_of_tokens(random_experts(4), 4 * FEW)
    made.sample.hidden[:] = made.sample.hidden[0]
    layer = layer_of(made.sums, sample=made.sample, module=made.experts.module)
    layer.sums.count[:] = tokens
    for name in ("gate_sq", "gate_sq_output", "gate_sq_norm_sq"):
        getattr(layer.sums, name).zero_()
    y = layer.experts.outputs
    for expert in range(4):
        output = y(expert, made.sample.hidden[:1])[0].double()
        layer.sums.gate_sq[expert] = tokens
        layer.sums.gate_sq_output[expert] = tokens * output
        layer.sums.gate_sq_norm_sq[expert] = tokens * output.square().sum()
    kinds = [finding.kind for finding in layer_redundancy(layer).findings]
    assert kinds.count("constant") == constants


LOST = {
    "10%": {"constant": 0.001, "rank 8": 0.0},
    "25%": {"constant": 0.02, "rank 8": 0.004},
    "50%": {"constant": 0.3, "rank 8": 0.1},
}


def test_sums_over_layers_by_hand() -> None:
    other = {share: {name: 3 * number for name, number in lost.items()} for share, lost in LOST.items()}
    # 0.5 x 0.02 + 2 x 0.06 and 0.5 x 0.004 + 2 x 0.012
    assert weighed([(0.5, LOST), (2.0, other)])["25%"] == pytest.approx({"constant": 0.13, "rank 8": 0.026})


def test_the_verdict_says_how_far_it_is_safe() -> None:
    assert verdict(LOST, None) == (
        "Remove 10%: safe with constants in their place, which lose 0.10%. "
        "Remove 25%: safe only with fitted stand-ins: linear maps of rank 8 lose 0.40%, constants 2.00%. "
        "Remove 50%: not without damage: linear maps of rank 8 lose 10.00%, constants 30.00%. "
        "These are shares of what the experts give; calibrate --sensitivity tells what they cost in nats."
    )
    known = verdict(LOST, {"25%": {"constant": 0.004, "rank 8": 0.001}})
    assert known == "Remove 25%: safe with constants in their place, which lose 0.0040 nats a token."


def test_a_model_that_was_in_memory_is_to_be_given_again(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    calibration = moetailor.calibrate(model, tmp_path / "calibration", text=token_batches())
    with pytest.raises(moetailor.PlanError, match="calibrated in memory; pass weights="):
        moetailor.find_redundancy(calibration)
    assert len(moetailor.find_redundancy(calibration, weights=moetailor.ExpertWeights(model)).layers) == 2


def test_sensitivities_say_what_losses_cost(calibration: GetCalibration) -> None:
    made = calibration(FAMILY)
    found = moetailor.find_redundancy(made)
    sensitivities = made.sensitivities()
    cost = sum(sensitivities[layer.layer] * layer.energy * layer.lost["50%"]["rank 4"] for layer in found.layers)
    assert found.kl["50%"]["rank 4"] == pytest.approx(cost)
    assert "nats a token" in found.verdict


def test_inspect_with_a_calibration(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calib = tmp_path / "calib"
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT)[0] == 0
    _, before, _ = run("inspect", REFERENCE, "--json")
    code, shown, _ = run("inspect", REFERENCE, "--calibration", calib, "--json")
    told = json.loads(shown)
    assert code == 0
    assert told.pop("redundancy") == json.loads(
        json.dumps(moetailor.find_redundancy(moetailor.Calibration.open(calib)).to_json())
    )
    assert told == json.loads(before)
    code, shown, _ = run("inspect", REFERENCE, "--calibration", calib)
    assert code == 0
    for fact in ("9.27 M", "together", "lost in layer", "Remove 50%:"):
        assert fact in shown


def test_inspect_refuses_what_does_not_belong_together(run, checkpoint, calibration, tmp_path: Path) -> None:
    code, shown, err = run("inspect", checkpoint("olmoe"), "--calibration", calibration(FAMILY).folder)
    assert (code, shown) == (1, "")
    assert f"not the model that was calibrated ({checkpoint(FAMILY)})" in err
    (tmp_path / "layer-0000.safetensors").touch()
    code, shown, err = run("inspect", checkpoint("olmoe"), "--calibration", tmp_path)
    assert (code, shown) == (1, "")
    assert "not finished; run the same calibrate command again" in err
    assert "no calibration folder" in run("inspect", checkpoint("olmoe"), "--calibration", tmp_path / "none")[2]


def test_the_spread_of_prices_is_what_mixed_widths_can_bring() -> None:
    """Prices 1 and 16 at b bits each lose 17 x 4^-b; with one bit less and one more 1 x 4 + 16 / 4 = 8 of these."""
    assert spread([1.0, 16.0]) == pytest.approx(17 / 8)
    assert spread([3.0, 3.0, 0.0]) == pytest.approx(1)
    assert spread([0.0]) == 1
    assert "up to 2.1 times less than equal ones in the same bytes, widths by layer 1.0 times" in widths_told(
        {"experts": 2.1, "layers": 1.0}
    )
    assert widths_told({"experts": 2.1, "layers": 1.0}).endswith("to mix widths is worth it.")
    assert widths_told({"experts": 1.2, "layers": 1.1}).endswith("to mix widths is hardly worth it.")


def test_the_spread_is_of_what_noise_in_each_expert_costs(calibration: Callable) -> None:
    made = calibration("olmoe")
    found = moetailor.find_redundancy(made)
    costs = []
    for layer in found.layers:
        sums = made.sums(layer.layer)
        costs += [made.prices.noise[layer.layer] * float(e) for e in sums.gate_sq_norm_sq / sums.tokens if e > 0]
    mean = sum(costs) / len(costs)
    assert found.spread is not None
    assert found.spread["experts"] == pytest.approx(
        mean / math.prod(cost ** (1 / len(costs)) for cost in costs), rel=1e-5
    )
