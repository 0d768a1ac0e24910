"""The compressed experts module: what it runs, what it does not, and what people do with it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moetailor
from moetailor.answers import Answer, Borrowed, Constant, Keep, Linear, LowRank, Remap
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.checkpoint.storage import plain_products
from moetailor.planning.checks import check_plan
from moetailor.planning.layer_plan import LayerPlan
from moetailor.runtime.reshape import LayerChange, reshape_model
from support.families import tiny_model
from support.tiny import IDS, eager, load, logits, mixed_plan

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def compressed_experts(slots: list[Answer], name: str = "olmoe") -> tuple[nn.Module, nn.Module]:
    """Return the first experts module of a tiny model, original and with these slots."""
    model, original = eager(tiny_model(name)), eager(tiny_model(name))
    anatomy = discover(model.config, model)
    plan, layer = LayerPlan(slots=tuple(slots)), next(iter(anatomy.layers.values()))
    change = LayerChange(experts=plan.pool, slots=plan.kept_slots, slot_map=plan.slot_map())
    reshape_model(model, anatomy, {layer.index: change})
    module = model.get_submodule(layer.experts)
    for tensor, spec in module.added.items():
        for part, stored in spec.encode(tensor, torch.randn(spec.shape), "F32").items():
            getattr(module, part).data.copy_(stored)
    return original.get_submodule(layer.experts), module


def count_rows(module: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Run a module and count the rows that reach its down projection."""
    rows, ways = 0, [(nn.functional, "linear"), (plain_products, "product")]

    def counting(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(x: torch.Tensor, weight: torch.Tensor, *more: torch.Tensor | None) -> torch.Tensor:
            nonlocal rows
            rows += len(x) * (weight.shape[-1] == 16)  # the expert width
            return original(x, weight, *more)

        return counted

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for place, name in ways:
            patch.setattr(place, name, counting(getattr(place, name)))
        return module(*inputs), rows


OWN = [Keep()] * 8


def test_slots_that_share_an_expert_run_it_once_for_a_token() -> None:
    original, module = compressed_experts([*OWN[:6], Remap(0), Remap(0)])
    x = torch.randn(5, 32)
    shared = torch.tensor([[0, 6], [6, 7], [0, 7], [1, 2], [7, 3]])
    gates = torch.rand(5, 2)
    out, rows = count_rows(module, x, shared, gates)
    assert rows == 7  # three tokens with one row, two with two
    answers = torch.where(shared >= 6, 0, shared)
    torch.testing.assert_close(out, original(x, answers, gates), rtol=1e-5, atol=1e-6)


def test_constants_cost_no_matrix_product() -> None:
    _, module = compressed_experts([*OWN[:6], Constant(), Constant()])
    x, gates = torch.randn(3, 32), torch.rand(3, 2)
    out, rows = count_rows(module, x, torch.tensor([[6, 7], [7, 6], [6, 6]]), gates)
    assert rows == 0
    expected = gates[:, :1] * module.constant[[0, 1, 0]] + gates[:, 1:] * module.constant[[1, 0, 0]]
    torch.testing.assert_close(out, expected)


def test_scales_multiply_gates() -> None:
    original, module = compressed_experts([*OWN[:7], Remap(2, 0.25)])
    x, gates = torch.randn(2, 32), torch.rand(2, 2)
    out, _ = count_rows(module, x, torch.tensor([[7, 1], [2, 7]]), gates)
    scaled = gates * torch.tensor([[0.25, 1], [1, 0.25]])
    torch.testing.assert_close(out, original(x, torch.tensor([[2, 1], [2, 2]]), scaled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_reach_experts_constants_and_gates(implementation: str) -> None:
    _, module = compressed_experts([*OWN[:6], Constant(), Remap(0)])
    module.config._experts_implementation = implementation
    gates = torch.rand(4, 2, requires_grad=True)
    index = torch.tensor([[0, 6], [6, 7], [1, 0], [7, 0]])
    module(torch.randn(4, 32), index, gates).square().sum().backward()
    assert (gates.grad != 0).all()
    assert (module.constant.grad != 0).any()
    touched = module.down_proj.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_low_precision_is_no_worse_than_the_original_family(implementation: str) -> None:
    """Error budget: ours in bfloat16 against float32 truth is at most that of the family's own code plus a little."""
    slots = [*OWN[:6], Remap(1), Remap(2)]
    original, module = compressed_experts(slots)
    original.config._experts_implementation = module.config._experts_implementation = implementation
    x, index, gates = torch.randn(512, 32), torch.randint(0, 8, (512, 2)), torch.rand(512, 2)
    answers = torch.tensor([slot.expert(number) for number, slot in enumerate(slots)])[index]
    truth = original(x, answers, gates)
    naive = (original.bfloat16()(x.bfloat16(), answers, gates.bfloat16()).float() - truth).norm()
    ours = (module.bfloat16()(x.bfloat16(), index, gates.bfloat16()).float() - truth).norm()
    assert ours <= 1.1 * naive


def test_generate_and_save_in_bfloat16(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    plan = mixed_plan(calibration("qwen2_moe"), drop=False)
    out = moetailor.apply(plan, checkpoint("qwen2_moe"), tmp_path / "out", calibration=calibration("qwen2_moe"))
    model = load(out)
    text = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    # with a cache or without, the same words
    again = IDS
    for _ in range(4):
        words = logits(model, again)[:, -1:]
        words[..., model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
        again = torch.cat([again, words.argmax(-1)], 1)
    assert torch.equal(text, again)
    half = type(model).from_pretrained(out, dtype=torch.bfloat16)
    maps = [module.slot_map.dtype for module in half.modules() if hasattr(module, "slot_map")]
    assert maps
    assert set(maps) == {torch.int32}


def test_weights_may_be_offloaded(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    """accelerate leaves nothing of an offloaded layer in memory but its hooks."""
    plan = mixed_plan(calibration("olmoe"), drop=True)
    out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe"))
    whole = load(out)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1"]
    places = dict.fromkeys(parts, "cpu") | {"model.layers.0": "disk"}
    model = type(whole).from_pretrained(
        out, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "aside", experts_implementation="eager"
    )
    assert next(model.model.layers[0].mlp.experts.parameters()).is_meta
    torch.testing.assert_close(logits(model), logits(whole))


def test_adapters_attach_and_train(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plan = mixed_plan(calibration("olmoe"), drop=True)
    model = load(moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe")))
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    torch.testing.assert_close(logits(adapted), before)
    adapted(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_a_newer_format_is_refused(checkpoint: Get, calibration: GetCalibration, tmp_path: Path) -> None:
    import json

    plan = mixed_plan(calibration("olmoe"), drop=False)
    out = moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=calibration("olmoe"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = 3
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(moetailor.CheckpointError, match="moetailor format 3, this moetailor reads up to 2"):
        load(out)


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-inputs", "shared-input"])
def test_linear_maps_of_any_rank_cost_thin_products_alone(shared: bool, int8: bool) -> None:
    ranks = [3, 0, 2]
    slots = [*OWN[:5], Linear(3, shared, int8), Constant(), Linear(2, shared, int8)]
    original, module = compressed_experts(slots)
    if int8:  # codes in words of 32 bits, with 128 added to each, and a scale a row
        assert module.linear_in_packed.shape == (3 if shared else 5, 1, 8)
        linear_in, linear_out = (
            ((getattr(module, f"{name}_packed")[:, 0, :, None] >> torch.arange(0, 32, 8) & 255) - 128).flatten(1)
            * getattr(module, f"{name}_scale")[:, 0]
            for name in ("linear_in", "linear_out")
        )
    else:
        linear_in, linear_out = module.linear_in, module.linear_out
    assert linear_in.shape == (3 if shared else 5, 32)
    assert linear_out.shape == (5, 32)
    starts = {0: 0, 2: 0 if shared else 3}
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 40):  # few tokens gather rows, many take two products over all maps
        x, gates = torch.randn(tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
        chosen = torch.rand(tokens, 8, generator=generator).topk(2, 1).indices
        chosen[0] = torch.tensor([7, 5])
        out, rows = count_rows(module, x, chosen, gates)
        assert rows == int((chosen < 5).sum())
        expected = torch.zeros_like(x)
        for token in range(tokens):
            for slot, gate in zip(chosen[token].tolist(), gates[token].tolist(), strict=True):
                if slot < 5:
                    expected[token] += original(x[token : token + 1], torch.tensor([[slot]]), torch.tensor([[gate]]))[0]
                    continue
                number, rank = slot - 5, ranks[slot - 5]
                given, first = module.linear_constant[number // 2] if rank else module.constant[0], sum(ranks[:number])
                if rank:
                    inner = linear_in[starts[number] : starts[number] + rank] @ x[token]
                    given = given + inner @ linear_out[first : first + rank]
                expected[token] += gate * given
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [(3, 0, 2), (2, 2, 2)], ids=["uneven", "even"])
def test_low_rank_experts_are_their_base_and_own_part(ranks: tuple[int, ...]) -> None:
    slots = [*OWN[:5], *(LowRank(base, rank) for base, rank in zip((5, 5, 7), ranks, strict=True))]
    original, module = compressed_experts(slots)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if name.startswith("low_rank_"):
                tensor.normal_(generator=generator)
    whole, bases = Experts(original).matrices(), (0, 0, 1)
    for number, rank in enumerate(ranks):
        rows = slice(sum(ranks[:number]), sum(ranks[:number]) + rank)
        for part in ("gate", "up", "down"):
            inner, outer = getattr(module, f"low_rank_{part}_in")[rows], getattr(module, f"low_rank_{part}_out")[rows]
            whole[part][5 + number] = (
                getattr(module, f"low_rank_base_{part}")[bases[number]].detach() + (outer.T @ inner).detach()
            )
    with torch.no_grad():
        for name, tensor in Experts(original).packed(whole).items():
            getattr(original, name).copy_(tensor)
        for tokens in (1, 40):  # few tokens gather own parts, many take products over all of them
            x, gates = torch.randn(tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
            chosen = torch.rand(tokens, 8, generator=generator).topk(2, 1).indices
            chosen[0] = torch.tensor([7, 5])
            expected = original(x, chosen, gates)
            torch.testing.assert_close(module(x, chosen, gates), expected, rtol=1e-4, atol=1e-3)


def remapped_over_layers(calibration: moetailor.Calibration) -> moetailor.Plan:
    """Return a plan in which both layers keep half their experts and answer for each other."""
    plan = moetailor.make_plan(calibration, "conmoe", moetailor.Budget.parse(keep=4), parameters={"scope": 2})
    return plan


def test_borrowed_experts_answer_from_their_own_layer(calibration: GetCalibration, checkpoint: Get) -> None:
    plan = remapped_over_layers(calibration("olmoe"))
    assert any(slot_map.lenders for slot_map in plan.slot_maps.values())
    original, compressed = load(checkpoint("olmoe")), moetailor.apply(plan, load(checkpoint("olmoe")))
    anatomy, layers = discover(original.config, original), calibration("olmoe").layers
    x, gates = torch.randn(6, 32), torch.rand(6, 2)
    for index in layers:
        chosen = torch.rand(6, 8).topk(2, 1).indices
        expected = torch.zeros_like(x)
        for token in range(6):
            for slot, gate in zip(chosen[token].tolist(), gates[token].tolist(), strict=True):
                answer = plan.by_layer[index].slots[slot]
                borrowed = isinstance(answer, Borrowed)
                expert = answer.source if borrowed else answer.expert(slot)
                module = original.get_submodule(anatomy.layers[answer.layer if borrowed else index].experts)
                expected[token] += module(x[token : token + 1], torch.tensor([[expert]]), torch.tensor([[gate]]))[0]
        with torch.no_grad():
            given = compressed.get_submodule(anatomy.layers[index].experts)(x, chosen, gates)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_a_shared_pool_is_stored_once_and_survives_saving(
    calibration: GetCalibration, checkpoint: Get, tmp_path: Path
) -> None:
    plan = remapped_over_layers(calibration("olmoe"))
    counts = {layer: len(layer_plan.pool) for layer, layer_plan in plan.by_layer.items()}
    assert sum(counts.values()) == 8
    moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").nbytes == plan.nbytes
    model = load(tmp_path / "out")
    expected = logits(moetailor.apply(plan, load(checkpoint("olmoe"))))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert sum(tensors.values()) == plan.nbytes
    with quiet_transformers():
        model.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").nbytes == plan.nbytes
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), expected, rtol=1e-5, atol=1e-5)
    module = next(module for module in copied.modules() if getattr(module, "lenders", None))
    assert all(lender in list(copied.modules()) for lender in module.lenders.values())


def test_a_borrowed_expert_that_its_layer_does_not_keep_is_refused(calibration: GetCalibration) -> None:
    plan = remapped_over_layers(calibration("olmoe"))
    content = json.loads(json.dumps(plan.to_json()))
    entry = next(entry for entry in content["layers"].values() if "borrowed" in entry)
    answer = entry["borrowed"][0]
    gone = next(number for number in range(8) if number not in plan.by_layer[answer["layer"]].pool)
    for wrong, message in ((gone, "which does not keep it"), (99, "no such expert"), (-1, "no such expert")):
        entry["borrowed"][0] = answer | {"source": wrong}
        file = calibration("olmoe").folder.with_name("edited.json")
        file.write_text(json.dumps(content))
        with pytest.raises(moetailor.PlanError, match=message):
            check_plan(moetailor.Plan.load(file), plan.model)
    entry["borrowed"][0] = answer | {"layer": 99}
    file.write_text(json.dumps(content))
    with pytest.raises(moetailor.PlanError, match="of layer 99: no such expert"):
        check_plan(moetailor.Plan.load(file), plan.model)
