"""planning/slots.py and the plan as a file: answers read off by hand, round trips, and what a hand edit can break."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moetailor.answers import (
    Answer,
    Auxiliary,
    Borrowed,
    Constant,
    Drop,
    Fitted,
    Keep,
    Linear,
    LowRank,
    Merged,
    Narrow,
    Remap,
    SlotMap,
)
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.layout import Stack
from moetailor.errors import CheckpointError, PlanError
from moetailor.planning.checks import check_plan
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.plan import Plan

# 0 and 3 keep their experts, 1 is dropped, 2 is a constant, 4 is answered by 3, 5 by 0 at half its gate.
MIXED = LayerPlan(
    slots=(
        Keep(),
        Drop(),
        Constant(),
        Keep(),
        Remap(3),
        Remap(0, 0.5),
    ),
    scores=(1, 0.25, 0.125, 3, 1e-9, 123456.78),
)
MIXED_JSON = {
    "experts": 6,
    "keep": [0, 3],
    "drop": [1],
    "constant": [2],
    "remap": [{"to": 3, "slots": [4]}, {"to": 0, "scale": 0.5, "slots": [5]}],
    "scores": [1.0, 0.25, 0.125, 3.0, 1e-09, 123457.0],
}
KINDS = "keep, fitted, narrow, drop, constant, linear, low_rank, merged, remap, borrowed, auxiliary"
SHAPE = ExpertShape(width=8, intermediate=2)
# 10,000 bytes, in them two layers of 6 experts of 96 bytes, whose routers have 16 bytes a slot.
FACTS = ModelFacts(
    source="original",
    fingerprint={"config": "c", "shards": {"one": {"bytes": 1}}},
    model_type="tiny",
    width=8,
    top_k=2,
    groups=Groups(),
    nbytes=10_000,
    stacks=tuple(
        Stack(
            prefix=f"model.layers.{n}",
            index=n,
            num_experts=6,
            expert_bytes=96,
            slot_bytes=16,
            dtype="BF16",
            shape=SHAPE,
        )
        for n in (0, 1)
    ),
)


def plan_of(*layers: LayerPlan, facts: ModelFacts = FACTS, **fields: object) -> Plan:
    settings = {"method": "reap", "parameters": {}, "budget": "keep 4", "calibration": "0123456789abcdef"} | fields
    names = [stack.prefix for stack in facts.stacks]
    return Plan(model=facts, layers=dict(zip(names, layers, strict=False)), **settings)  # type: ignore[arg-type]


def drop(*slots: int, of: int = 6) -> LayerPlan:
    return keep_only(of, set(range(of)) - set(slots), Drop())


# One layer


def test_pool_kept_slots_and_stand_ins() -> None:
    assert MIXED.pool == [0, 3]
    assert MIXED.kept_slots == [0, 2, 3, 4, 5]
    assert list(MIXED.of(Constant)) == [2]
    assert not MIXED.native
    assert not MIXED.untouched


def test_slot_map_of_every_kind_of_answer() -> None:
    # Slots 0, 2, 3, 4, 5 are left; expert 0 is row 0, expert 3 is row 1, the constant has no row.
    found = MIXED.slot_map()
    answers = (None, Constant(), None, None, None)
    assert found == SlotMap(rows=(0, -1, 1, 1, 0), experts=2, answers=answers, scales=(1.0, 1.0, 1.0, 1.0, 0.5))
    assert found.shared
    assert not found.plain


def test_slot_map_of_dropped_slots_is_the_plain_one() -> None:
    found = drop(1, 4).slot_map()
    assert found == SlotMap.of_rows((0, 1, 2, 3), 4)
    assert found.plain
    assert not found.shared
    assert drop(1, 4).native


def test_constants_are_numbered_by_slot() -> None:
    found = keep_only(5, [1, 3], Constant()).slot_map()
    assert found.rows == (-1, 0, -1, 1, -1)
    assert found.experts == 2
    assert found.buffers()["constant_slot"].tolist() == [0, -1, 1, -1, 2]
    assert not found.plain
    assert not found.shared


def test_expert_that_only_answers_for_another_slot_stays_in_the_pool() -> None:
    layer = LayerPlan(slots=(Remap(2), Drop(), Drop(), Remap(3)))
    assert layer.pool == [2, 3]
    assert layer.slot_map() == SlotMap.of_rows((0, 1), 2)
    assert not layer.native


def test_layer_in_which_all_stay_is_untouched() -> None:
    layer = keep_only(4, range(4), Drop(), [1, 2, 3, 4])
    assert layer.untouched
    assert layer.native
    assert layer.slot_map() == SlotMap.of_rows((0, 1, 2, 3), 4)
    assert not LayerPlan(slots=(Remap(0, 0.5), Keep())).untouched


def test_scores_keep_six_digits_as_the_file_does() -> None:
    layer = LayerPlan(slots=(Drop(),) * 3, scores=(1 / 3, 1234567.0, 0.0))
    assert layer.scores == (0.333333, 1234570.0, 0.0)


# JSON of a layer and of a slot map


def test_layer_is_written_by_kind_and_read_back() -> None:
    assert MIXED.to_json() == MIXED_JSON
    assert LayerPlan.from_json(json.loads(json.dumps(MIXED_JSON)), "here") == MIXED


def test_empty_kinds_are_left_out() -> None:
    assert drop(0, 1, 2, 3, 4, 5).to_json() == {"experts": 6, "drop": [0, 1, 2, 3, 4, 5]}
    assert keep_only(2, [0, 1], Drop()).to_json() == {"experts": 2, "keep": [0, 1]}


def test_random_layers_survive_the_round_trip() -> None:
    generator = random.Random(0)
    for _ in range(200):
        size = generator.randint(1, 12)
        kinds: list[Callable[[], Answer]] = [
            Keep,
            Fitted,
            lambda: Narrow(generator.randint(1, 9)),
            Drop,
            Constant,
            lambda: Drop(generator.randrange(size)),  # noqa: B023 (called below)
            lambda: Linear(generator.randint(1, 9), shared=generator.random() < 0.5),
            lambda: LowRank(generator.randrange(size), generator.randrange(9)),  # noqa: B023
            lambda: Merged(generator.randrange(size)),  # noqa: B023
            lambda: Remap(generator.randrange(size)),  # noqa: B023
            lambda: Remap(generator.randrange(size), generator.random()),  # noqa: B023
            lambda: Borrowed(generator.randrange(9), generator.randrange(99), generator.random()),
            lambda: Auxiliary(2, vectors=generator.choice(["expert", "layer", "none"])),
        ]
        slots = (Keep(), *(generator.choice(kinds)() for _ in range(size - 1)))
        layer = LayerPlan(slots=slots, scores=tuple(generator.gauss(0, 100) for _ in range(size)))
        text = json.dumps(layer.to_json())
        assert LayerPlan.from_json(json.loads(text), "here") == layer
        slot_map = layer.slot_map()
        assert SlotMap.from_json(json.loads(json.dumps(slot_map.to_json())), "here") == slot_map


def test_slot_map_is_written_without_defaults() -> None:
    assert SlotMap.of_rows((0, 1), 2).to_json() == {"experts": 2, "rows": [0, 1]}
    full = {"experts": 1, "rows": [0, -1, -1], "scales": [1.0, 0.5, 1.0], "constant": [1]}
    full |= {"linear": [{"rank": 4, "shared": True, "slots": [2]}]}
    assert SlotMap.from_json(full, "here").to_json() == full


MAP = {"experts": 2, "rows": [0, 1, -1, -1], "constant": [2], "linear": [{"rank": 4, "slots": [3]}]}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"heads": [4]}, "unknown keys ['heads']"),
        ({"experts": 0}, "experts: it is 0, it must be 1 to 65536"),
        ({"experts": "2"}, "experts: it is '2', not a whole number"),
        ({"experts": 10**9}, "experts: it is 1000000000, it must be 1 to 65536"),
        ({"rows": [0, 2, -1, -1]}, "rows: [1] is 2, it must be -1 to 1"),
        ({"rows": [0, -2, -1, -1]}, "rows: [1] is -2, it must be -1 to 1"),
        ({"rows": []}, "0 rows and 0 scales"),
        ({"rows": None}, "rows: it is None, not a list"),
        ({"scales": [1.0]}, "4 rows and 1 scales"),
        ({"scales": [1.0, 1.0, float("nan"), 1.0]}, "scales: [2] is nan, not a finite number"),
        ({"constant": []}, "slot 2 has row -1 of the pool and nothing else"),
        ({"constant": [2, 1]}, "slot 1 has row 1 of the pool and constant"),
        ({"constant": [2, 3]}, "slot 3 is named twice"),
        ({"constant": [4]}, "slot 4 is outside 0..3"),
        ({"linear": [{"slots": [3]}]}, "it lacks rank"),
        ({"linear": [{"rank": 0, "slots": [3]}]}, "rank is 0, it must be 1 or more"),
        ({"linear": [{"rank": 4.5, "slots": [3]}]}, "rank is 4.5, not a whole number"),
        ({"linear": [{"rank": 4}]}, "slots: it is None, not a list"),
        ({"linear": {"3": 4}}, "not a list"),
    ],
)
def test_slot_map_that_does_not_add_up_is_refused(edit: dict, said: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        SlotMap.from_json(MAP | edit, "config.json, layer 3")
    assert str(refusal.value).startswith("config.json, layer 3")
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"drop": [1, 3]}, "slot 3 is named twice"),
        ({"keep": [0, 0, 3]}, "slot 0 is named twice"),
        ({"constant": [2, 5]}, "slot 5 is named twice"),
        ({"drop": []}, f"slots [1] are not named; each of 6 needs one of {KINDS}"),
        ({"keep": [], "remap": []}, f"slots [0, 3, 4, 5] are not named; each of 6 needs one of {KINDS}"),
        ({"experts": 7}, f"slots [6] are not named; each of 7 needs one of {KINDS}"),
        ({"drop": [6]}, "slot 6 is outside 0..5"),
        ({"drop": [-1]}, "slot -1 is outside 0..5"),
        ({"remap": [{"to": 6, "slots": [4]}, {"to": 0, "slots": [5]}]}, "slot 4 or its expert 6 is outside 0..5"),
        ({"remap": [{"to": -1, "slots": [4]}, {"to": 0, "slots": [5]}]}, "slot 4 or its expert -1 is outside 0..5"),
        ({"dorp": [1]}, "unknown keys ['dorp']"),
    ],
)
def test_hand_edit_that_does_not_add_up_is_named(edit: dict, said: str) -> None:
    with pytest.raises(PlanError) as refusal:
        LayerPlan.from_json(MIXED_JSON | edit, "plan.json, model.layers.0")
    stated = str(refusal.value).removesuffix("; mend the plan, or make it again")
    assert stated == f"plan.json, model.layers.0: {said}"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"keep": [0.5, 3]}, "0.5"),
        ({"experts": 10**9}, "experts: it is 1000000000, it must be 1 to 65536"),
        ({"remap": [{"to": 3, "slots": [4]}, {"to": 0, "scale": float("nan"), "slots": [5]}]}, "scale is nan"),
        ({"remap": [{"to": 3, "slots": [4]}, {"to": 0, "scale": float("inf"), "slots": [5]}]}, "scale is inf"),
        ({"remap": [{"to": 3, "slots": [4]}, {"to": 0, "sacle": 0.5, "slots": [5]}]}, "sacle"),
        ({"scores": [float("nan")]}, "scores: [0] is nan, not a finite number"),
        ({"expected": "low"}, "expected: it is 'low', not a finite number"),
    ],
)
def test_hand_edit_that_means_nothing_is_refused(edit: dict, said: str) -> None:
    with pytest.raises(PlanError) as refusal:
        LayerPlan.from_json(MIXED_JSON | edit, "plan.json, model.layers.0")
    assert str(refusal.value).startswith("plan.json, model.layers.0")
    assert said in str(refusal.value)


# The plan


def test_bytes_of_a_plan_are_counted_by_hand() -> None:
    # Layer 0 loses 2 of its experts and slots. Layer 1 (MIXED) loses 4 experts and 1 slot, and gains a constant of
    # 8 numbers of 2 bytes.
    assert plan_of(drop(1, 4), MIXED).nbytes == 10_000 - 2 * (96 + 16) - (4 * 96 + 1 * 16) + 1 * 8 * 2
    assert plan_of(drop(1, 4)).nbytes == 10_000 - 2 * (96 + 16)
    assert plan_of().nbytes == 10_000


def test_plan_is_native_when_an_ordinary_checkpoint_can_say_it() -> None:
    assert plan_of(drop(1, 4), drop(0, 2)).native
    assert plan_of().native
    assert not plan_of(drop(1, 4), drop(0)).native  # counts differ
    assert not plan_of(drop(1, 4)).native  # the other layer keeps all
    assert not plan_of(keep_only(6, range(4), Constant()), keep_only(6, range(4), Constant())).native


def test_untouched_layers_are_left_out_of_what_the_model_runs() -> None:
    plan = plan_of(drop(1), keep_only(6, range(6), Drop()))
    assert list(plan.by_layer) == [0]


def test_layers_that_the_model_does_not_run_are_priced_but_not_run() -> None:
    unrun = Stack(prefix="model.layers.2", index=None, num_experts=6, expert_bytes=96, slot_bytes=16, dtype="BF16")
    facts = replace(FACTS, stacks=(*FACTS.stacks, unrun))
    plan = plan_of(drop(1), drop(1), drop(5), facts=facts)
    assert plan.nbytes == 10_000 - 3 * 112
    assert list(plan.by_layer) == [0, 1]
    assert plan.native
    assert not plan_of(drop(1), drop(1), facts=facts).native


def test_plan_file_is_read_back_equal(tmp_path: Path) -> None:
    plan = plan_of(drop(1, 4), MIXED, method="mone", parameters={"novice": "mean", "shrinkage": 0.1})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.nbytes == plan.nbytes
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_plan_file_says_what_a_reader_needs_one_list_a_line(tmp_path: Path) -> None:
    plan_of(drop(1, 4), MIXED).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '      "keep": [0, 2, 3, 5],\n      "drop": [1, 4]\n' in text
    assert json.loads(text)["layers"]["model.layers.1"] == MIXED_JSON
    assert json.loads(text)["bytes"] == {"original": 10_000, "planned": 10_000 - 224 - 400 + 16}


def edited(tmp_path: Path, edit: Callable[[dict], object]) -> Path:
    """Save a plan, change its JSON in place and return the file."""
    file = tmp_path / "plan.json"
    content = plan_of(drop(1, 4), drop(0, 2)).to_json()
    edit(content)
    file.write_text(json.dumps(content))
    return file


def test_hand_edit_that_adds_up_is_the_plan(tmp_path: Path) -> None:
    def edit(content: dict) -> None:
        content["layers"]["model.layers.1"] = {
            "experts": 6,
            "keep": [0, 1, 2, 3],
            "remap": [{"to": 0, "slots": [4, 5]}],
        }

    plan = Plan.load(edited(tmp_path, edit))
    assert plan.by_layer[1].slot_map() == SlotMap.of_rows((0, 1, 2, 3, 0, 0), 4)
    assert plan.nbytes == 10_000 - 224 - 2 * 96
    check_plan(plan, FACTS)


def test_error_in_a_layer_names_file_and_layer(tmp_path: Path) -> None:
    file = edited(tmp_path, lambda content: content["layers"]["model.layers.1"].update(drop=[0]))
    with pytest.raises(PlanError) as refusal:
        Plan.load(file)
    assert str(refusal.value) == (f"{file}, model.layers.1: slots [2] are not named; each of 6 needs one of {KINDS}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON that can be read ("),
        ("", "not JSON that can be read ("),
        ("[]", "not a JSON object; make one with `moetailor plan`"),
        ("7", "not a JSON object; make one with `moetailor plan`"),
        ('{"format": "moetailor-calibration"}', "not a moetailor plan; make one with `moetailor plan`"),
        ('{"format": "moetailor-plan"}', "a plan of version None, this moetailor reads 1; make one with"),
        ('{"format": "moetailor-plan", "version": 2}', "a plan of version 2, this moetailor reads 1; make one with"),
        (
            '{"format": "moetailor-plan", "version": 1}',
            "it lacks budget, bytes, calibration, layers, method, model, parameters",
        ),
        (b"\xff\xfe", "not JSON that can be read ("),
    ],
)
def test_file_that_is_no_plan_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as refusal:
        Plan.load(file)
    assert str(refusal.value).startswith(f"{file}: {said}")


def test_plan_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none.json: cannot be read \(No such file or directory\)"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="a folder, not a plan; `moetailor apply` takes MODEL, then PLAN"):
        Plan.load(tmp_path)


LAYER = "model.layers.0"
DAMAGES: dict[str, Callable[[dict], object]] = {
    "no model": lambda content: content.pop("model"),
    "model null": lambda content: content.update(model=None),
    "model with a key too many": lambda content: content["model"].update(extra=1),
    "stack without prefix": lambda content: content["model"]["stacks"][0].pop("prefix"),
    "unknown dtype": lambda content: content["model"]["stacks"][0].update(dtype="F99"),
    "fingerprint a word": lambda content: content["model"].update(fingerprint="abc"),
    "parameters a list": lambda content: content.update(parameters=[1]),
    "layers null": lambda content: content.update(layers=None),
    "layers a list": lambda content: content.update(layers=[]),
    "layer null": lambda content: content["layers"].update({LAYER: None}),
    "layer a list": lambda content: content["layers"].update({LAYER: [1]}),
    "layer without experts": lambda content: content["layers"][LAYER].pop("experts"),
    "experts a word": lambda content: content["layers"][LAYER].update(experts="six"),
    "keep a number": lambda content: content["layers"][LAYER].update(keep=5),
    "remap a list": lambda content: content["layers"][LAYER].update(remap=[1]),
    "remap of a word": lambda content: content["layers"][LAYER].update(remap=[{"to": "one", "slots": [1]}]),
    "scores words": lambda content: content["layers"][LAYER].update(scores=["high"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_plan_is_refused_when_it_is_read(tmp_path: Path, name: str) -> None:
    file = edited(tmp_path, DAMAGES[name])
    with pytest.raises(PlanError) as refusal:
        Plan.load(file)
    assert str(refusal.value).startswith(str(file))


# A plan against a model


def test_plan_fits_the_model_it_was_made_for() -> None:
    check_plan(plan_of(drop(1, 4), MIXED), FACTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "huge"}, "its model type is tiny, this model has huge"),
        ({"width": 16}, "its width is 8, this model has 16"),
        ({"top_k": 3}, "its top-k is 2, this model has 3"),
        ({"stacks": FACTS.stacks[:1]}, "its experts by layer is {0: 6, 1: 6}, this model has {0: 6}"),
        (
            {"stacks": tuple(replace(stack, num_experts=7) for stack in FACTS.stacks)},
            "its experts by layer is {0: 6, 1: 6}, this model has {0: 7, 1: 7}",
        ),
        (
            {"stacks": tuple(replace(s, shape=ExpertShape(width=8, intermediate=4)) for s in FACTS.stacks)},
            "its intermediate size by layer is {0: 2, 1: 2}, this model has {0: 4, 1: 4}",
        ),
    ],
)
def test_plan_for_other_shapes_is_refused_with_both(change: dict, said: str) -> None:
    for allowed in (False, True):
        with pytest.raises(PlanError) as refusal:
            check_plan(plan_of(drop(1, 4)), replace(FACTS, **change), allow_other_weights=allowed)
        assert str(refusal.value) == f"the plan is for another model: {said}"


def test_plan_for_other_weights_needs_a_word() -> None:
    other = replace(FACTS, fingerprint={"config": "c", "shards": {"one": {"bytes": 2}}})
    with pytest.raises(PlanError) as refusal:
        check_plan(plan_of(drop(1, 4)), other)
    assert str(refusal.value) == (
        "the plan was made for other weights of the same shapes; "
        "calibrate this model, or pass --allow-other-weights on purpose"
    )
    check_plan(plan_of(drop(1, 4)), other, allow_other_weights=True)


def test_same_weights_with_another_config_text_are_the_same() -> None:
    check_plan(plan_of(drop(1, 4)), replace(FACTS, fingerprint=FACTS.fingerprint | {"config": "d"}))


def test_same_model_in_another_dtype_has_the_same_shapes() -> None:
    # float32 has twice the bytes and as many numbers.
    stacks = tuple(replace(stack, expert_bytes=192, slot_bytes=32, dtype="F32") for stack in FACTS.stacks)
    check_plan(plan_of(drop(1, 4)), replace(FACTS, stacks=stacks), allow_other_weights=True)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (drop(1, 2, 3, 4, 5), "plan leaves 1 slots but the router picks 2 per token; keep at least 2"),
        (keep_only(6, [], Constant()), "plan keeps no expert; keep at least 1"),
        (drop(0, of=5), "the plan has 5 slots, the layer 6"),
        (
            LayerPlan(slots=tuple(Remap(5 - number) for number in range(6))),
            "plan changes slots but removes no expert; keep every slot as it is, or remove some",
        ),
    ],
)
def test_layer_that_cannot_work_is_refused(layer: LayerPlan, said: str) -> None:
    with pytest.raises(PlanError) as refusal:
        check_plan(plan_of(layer), FACTS)
    assert str(refusal.value) == f"model.layers.0: {said}"


def test_layer_that_is_none_is_refused_with_those_there_are() -> None:
    plan = replace(plan_of(drop(1)), layers={"model.layers.7": drop(1)})
    with pytest.raises(PlanError) as refusal:
        check_plan(plan, FACTS)
    assert str(refusal.value) == (
        "the plan names layer 'model.layers.7', which is no MoE layer; those are model.layers.0, model.layers.1"
    )


@pytest.mark.parametrize(
    ("layer", "groups", "said"),
    [
        # Groups 0-2 and 3-5
        (drop(0, 1), Groups(2, 1, 2), "the router chooses among 2 groups of equal size; the plan leaves [1, 3]"),
        (drop(0, 4, 5), Groups(2, 1, 1), "the router chooses among 2 groups of equal size; the plan leaves [2, 1]"),
        (drop(0, 1, 3, 4), Groups(2, 2, 2), "plan leaves 1 slots in each group, the router scores groups by 2"),
        (
            drop(0, 1, 3, 4),
            Groups(2, 1, 1),
            "a token may use 1 of 2 groups with 1 slots left in each, but the router picks 2; keep at least 2 in each",
        ),
    ],
)
def test_groups_left_unequal_or_too_small_are_refused(layer: LayerPlan, groups: Groups, said: str) -> None:
    facts = replace(FACTS, groups=groups)
    with pytest.raises(PlanError) as refusal:
        check_plan(plan_of(layer, facts=facts), facts)
    assert str(refusal.value).startswith(f"model.layers.0: {said}")


def test_equal_groups_and_constants_fit_a_grouped_router() -> None:
    facts = replace(FACTS, groups=Groups(2, 1, 2))
    check_plan(plan_of(drop(0, 3), keep_only(6, [0, 1, 2], Constant()), facts=facts), facts)
