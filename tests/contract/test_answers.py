"""Low-rank experts and auxiliary slots on every family: each is what its formula says, by the family's own code."""

import warnings
from pathlib import Path

import torch
from torch import nn

import moetailor
from moetailor.answers import low_rank
from moetailor.checkpoint.anatomy import MoELayer
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from support import naive
from support.tiny import IDS, Get, GetCalibration, anatomy_of, eager, every_family_with, families_in_turn, load, logits

LOW = {"rank": 2, "bases": 2, "start": "svd", "select": "count"}


def output_of(model: nn.Module, layer: MoELayer, matrices: dict[str, torch.Tensor], x_D: torch.Tensor) -> torch.Tensor:
    """Return what the family's own code gives for an expert with these matrices: they are put in place of expert 0."""
    module = model.get_submodule(layer.experts)
    packed = Experts(module).packed({name: matrix[None] for name, matrix in matrices.items()})
    kept = {name: getattr(module, name).data[0].clone() for name in packed}
    for name, tensor in packed.items():
        getattr(module, name).data[0] = tensor[0]
    y = naive.expert_output(model, layer, 0, x_D)
    for name, tensor in kept.items():
        getattr(module, name).data[0] = tensor
    return y


def low_plan(calibration: moetailor.Calibration) -> moetailor.Plan:
    keep = calibration.model.stacks[0].num_experts - 2
    return moetailor.make_plan(calibration, "lightmoe", moetailor.Budget.parse(keep=keep), parameters=LOW)


def vector_plan(calibration: moetailor.Calibration, keep: int, **parameters: object) -> moetailor.Plan:
    return moetailor.make_plan(
        calibration, "compressed_experts", moetailor.Budget.parse(keep=keep), parameters={"main": 1} | parameters
    )


@families_in_turn(1)
def test_low_rank_experts_are_their_base_and_their_own_part(
    name: str, checkpoint: Get, calibration: GetCalibration
) -> None:
    plan = low_plan(calibration(name))
    original = load(checkpoint(name))
    compressed = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    layer = next(iter(anatomy_of(original).layers.values()))
    seen = naive.run_recorded(compressed, layer, IDS)
    layer_plan, module = plan.by_layer[layer.index], compressed.get_submodule(layer.experts)
    own, low = Experts(original.get_submodule(layer.experts)), low_rank.members(layer_plan.slot_map())
    numbers, named = list(low), sorted({answer.base for answer in low.values()})
    assert len(named) == 2
    assert len(numbers) == 4

    def matrices(slot: int) -> dict[str, torch.Tensor]:
        if slot not in numbers:
            return own.expert(slot)
        at, base = numbers.index(slot), named.index(low[slot].base)
        found = {part: getattr(module, f"low_rank_base_{part}")[base].detach() for part in own.expert(0)}
        for part in (*own.inputs, "down"):
            rows = slice(2 * at, 2 * at + 2)
            low_in, low_out = (getattr(module, f"low_rank_{part}_{side}")[rows] for side in ("in", "out"))
            found[part] = found[part] + (low_out.T @ low_in).detach()
        return found

    expected = torch.zeros(len(seen["hidden"]), layer.width)
    for token, (chosen, gates) in enumerate(zip(seen["index"].tolist(), seen["gate"].tolist(), strict=True)):
        for slot, gate in zip(chosen, gates, strict=True):
            expected[token] += gate * output_of(original, layer, matrices(slot), seen["hidden"][token])
    with torch.no_grad():
        got = module(seen["hidden"], seen["index"], seen["gate"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@every_family_with("answer", "low_rank", "vectors", "maps")
def test_they_round_trip(name: str, answer: str, checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    experts = calibration(name).model.stacks[0].num_experts
    plan = low_plan(calibration(name))
    if answer == "vectors":
        plan = vector_plan(calibration(name), experts - 1, constants=True, renormalise=True)
    if answer == "maps":
        plan = vector_plan(calibration(name), experts - 1, vectors="none", rank=3)
    moetailor.apply(plan, checkpoint(name), tmp_path / "out", calibration=calibration(name))
    assert open_checkpoint(tmp_path / "out").nbytes == plan.nbytes
    expected = logits(eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name))))
    from_disk = load(tmp_path / "out")
    torch.testing.assert_close(logits(from_disk), expected, rtol=1e-5, atol=1e-5)
    from_disk.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(logits(from_disk), expected, rtol=1e-4, atol=1e-4)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager(from_disk).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(expected).all()


@every_family_with("rank", 0, 2)
def test_auxiliary_slots_modulate_what_runs(rank: int, name: str, checkpoint: Get, calibration: GetCalibration) -> None:
    """Vectors on the inputs of an expert's matrices are factors on the columns of these matrices; maps add."""
    experts = calibration(name).model.stacks[0].num_experts
    plan = vector_plan(calibration(name), experts - 1, constants=True, rank=rank)
    original = load(checkpoint(name))
    compressed = eager(moetailor.apply(plan, load(checkpoint(name)), calibration=calibration(name)))
    layer = next(iter(anatomy_of(original).layers.values()))
    module, whole = compressed.get_submodule(layer.experts), Experts(original.get_submodule(layer.experts))
    parts = (*whole.inputs, "down")
    for part in parts:
        assert torch.count_nonzero(getattr(module, f"auxiliary_{part}")) == 0
        nn.init.normal_(getattr(module, f"auxiliary_{part}"), std=0.3)
    seen = naive.run_recorded(compressed, layer, IDS)
    (novice,) = set(range(experts)) - set(plan.by_layer[layer.index].pool)
    pool = plan.by_layer[layer.index].pool
    expected = torch.zeros(len(seen["hidden"]), layer.width)
    for token, (chosen, gates) in enumerate(zip(seen["index"].tolist(), seen["gate"].tolist(), strict=True)):
        ranked = sorted(zip(gates, chosen, strict=True), key=lambda pair: -pair[0])
        main = next(((gate, slot) for gate, slot in ranked if slot != novice), None)
        aside = [(gate, slot) for gate, slot in ranked if (gate, slot) != main]
        total = sum(gate for gate, _ in aside)
        for gate, slot in aside:
            own = slot != novice
            at = slice(rank * pool.index(slot), rank * pool.index(slot) + rank) if own else slice(0, rank)
            constant = (
                module.auxiliary_constant[slot]
                if own
                else getattr(module, "linear_constant" if rank else "constant")[0]
            )
            given = constant.detach().clone()
            if rank:
                low_in, low_out = (
                    getattr(module, f"{'auxiliary' if own else 'linear'}_{side}")[at].detach() for side in ("in", "out")
                )
                given += (low_in @ seen["hidden"][token]) @ low_out
            expected[token] += gate * given
        if main is None:
            continue
        matrices = whole.expert(main[1])
        for part in parts:
            delta = sum(gate / total * getattr(module, f"auxiliary_{part}")[slot].detach() for gate, slot in aside)
            matrices[part] = matrices[part] * (1 + delta)
        expected[token] += main[0] * output_of(original, layer, matrices, seen["hidden"][token])
    with torch.no_grad():
        got = module(seen["hidden"], seen["index"], seen["gate"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
