"""What callers may hand in: any iterable, also one that can be read once only, means what a list of the same means."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import moetailor
from moetailor.planning.budget import Budget
from support.tiny import load, token_batches
from support.training import blocks

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
REFERENCE = Path(__file__).parents[1] / "examples" / "reference-moe"
KEEP = Budget.parse(keep=6)


def once(values: Iterable) -> Iterable:
    """Return a generator: read a second time, it is empty."""
    yield from values


def test_every_public_argument_that_holds_several_is_tested_here() -> None:
    """A new one fails until it is listed, and tested below. What is made by moetailor itself is left out."""
    found = set()
    for name in moetailor.__all__:
        given = getattr(moetailor, name)
        if inspect.isfunction(given):
            hints = {key: str(p.annotation) for key, p in inspect.signature(given).parameters.items()}
        elif is_dataclass(given) and name.endswith("Options"):
            hints = {field.name: str(field.type) for field in fields(given)}
        else:
            continue
        found |= {
            (name, key) for key, hint in hints.items() if any(kind in hint for kind in ("Iter", "Seq", "list", "tuple"))
        }
    assert found == {
        *((name, key) for name in ("make_plan", "precheck", "compress", "allocate") for key in ("layers", "protect")),
        *(("compare", key) for key in ("methods", "remove", "sizes")),
        *(("recover", key) for key in ("train", "callbacks")),
        ("calibrate", "text"),
        ("TextOptions", "data"),
        ("ExampleOptions", "data"),
        ("TaskOptions", "tasks"),
    }


@pytest.mark.parametrize("allocation", ["uniform", "error", "global"])
def test_plans(calibration: GetCalibration, checkpoint: Get, tmp_path: Path, allocation: str) -> None:
    made, options = calibration("olmoe"), {"allocation": allocation}
    listed = moetailor.make_plan(made, "reap", KEEP, layers=[0, 1], protect=[(0, 3), (1, 7)], **options)
    assert all(expert in listed.by_layer[at].pool for at, expert in ((0, 3), (1, 7)) if at in listed.by_layer)
    protect = once([iter((0, 3)), [1, 7]])
    assert moetailor.make_plan(made, "reap", KEEP, layers=once([1, 0, 1]), protect=protect, **options) == listed
    said = [
        moetailor.precheck(checkpoint("olmoe"), tmp_path / "out", method="reap", budget=KEEP, layers=layers, **options)
        for layers in ([1], once([1]))
    ]
    assert said[0] == said[1]
    assert "in 1 of them" in said[1]


def test_compress(tmp_path: Path) -> None:
    data = str(REFERENCE / "calibration.jsonl")
    plans = []
    for name, hand in (("list", list), ("once", once)):
        text = moetailor.TextOptions(data=hand([data]), sequences=2, length=16)
        given = {
            "layers": hand([1]),
            "protect": hand([(1, 0)]),
            "method": "random",
            "budget": Budget.parse(remove="50%"),
        }
        _, plan = moetailor.compress(REFERENCE, tmp_path / name, text=text, **given)
        plans.append(plan)
    assert plans[0] == plans[1]
    assert list(plans[1].by_layer) == [1]
    assert 0 in plans[1].by_layer[1].pool


def test_searches(calibration: GetCalibration, tmp_path: Path) -> None:
    options = moetailor.SearchOptions(population=2, generations=1, survivors=1)
    found = [
        moetailor.allocate(
            calibration("deepseek_v3"), "frequency", Budget.parse(keep=9), tmp_path / f"{number}.json", options=options,
            layers=hand([1, 2]), protect=hand([[1, 0]]),
        )
        for number, hand in enumerate((list, once))
    ]  # fmt: skip
    assert found[0] == found[1]


def test_calibrations(calibration: GetCalibration, checkpoint: Get, tmp_path: Path) -> None:
    made = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=once(token_batches()), residual=True)
    assert {**calibration("olmoe").hashes, "sensitivity.json": ""} == {**made.hashes, "sensitivity.json": ""}


def test_comparisons(tmp_path: Path) -> None:
    text = moetailor.TextOptions(data="none")
    said = []
    for methods, remove in ((["reap", "moen"], ["25%"]), (once(["reap", "moen"]), once(["25%"])), ("moen", 0.25)):
        with pytest.raises(moetailor.PlanError) as refused:
            moetailor.compare(REFERENCE, tmp_path, text=text, held_out=text, methods=methods, remove=remove)
        said.append(str(refused.value))
    assert said[0].startswith("--methods moen: no method 'moen'; did you mean 'mone'?")
    assert said == said[:1] * 3
    for sizes in (["40%", "x"], once(["40%", "x"]), "x"):
        with pytest.raises(moetailor.PlanError, match=r"--size x: not a size"):
            moetailor.compare(REFERENCE, tmp_path, text=text, held_out=text, methods="reap", sizes=sizes)
    for word, remove in (("reap", once(["0.25", "x"])), (once(["reap"]), "x"), (once(["reap"]), 25)):
        with pytest.raises(moetailor.PlanError, match=r"--remove (x: not a share|25: must be at least 0%)"):
            moetailor.compare(REFERENCE, tmp_path, text=text, held_out=text, methods=word, remove=remove)


class Count(TrainerCallback):
    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def test_trainings(checkpoint: Get, tmp_path: Path) -> None:
    losses = []
    for number, (train, hand) in enumerate(((["router"], list), (once(["router"]), once), ("router", tuple))):
        count = Count()
        done = moetailor.recover(
            checkpoint("olmoe"), tmp_path / str(number), examples=blocks(), loss="task", train=train,
            options=moetailor.RecoveryOptions(steps=1), callbacks=hand([count]),
        )  # fmt: skip
        assert count.steps == 1
        losses.append(done.losses)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(moetailor.TextOptions, "data"), (moetailor.ExampleOptions, "data"), (moetailor.TaskOptions, "tasks")],
)
def test_options(kind: Callable[..., Any], name: str) -> None:
    for given in (["a", "b"], once(["a", "b"]), {"a": 1, "b": 2}):
        assert getattr(kind(**{name: given}), name) == ("a", "b")
    assert getattr(kind(**{name: "one"}), name) == ("one",)


@pytest.mark.parametrize("given", [{"tokens": 0}, {"seed": 2**63}, {"seed": -(2**63) - 1}])
def test_samples_that_cannot_be(given: dict) -> None:
    with pytest.raises(moetailor.CalibrationError, match="sample 1 or more, with 64 bits of seed"):
        moetailor.SampleOptions(**given)


@pytest.mark.parametrize("name", ["sequences", "length", "batch_size"])
def test_texts_that_cannot_be(name: str) -> None:
    with pytest.raises(moetailor.CalibrationError, match=f"--{name.replace('_', '-')} 0: is not 1 or more"):
        moetailor.TextOptions(data=("a",), **{name: 0})


def test_no_text_at_all(checkpoint: Get, tmp_path: Path) -> None:
    with pytest.raises(moetailor.CalibrationError, match="no batch of text given"):
        moetailor.calibrate(checkpoint("olmoe"), tmp_path / "calibration", text=[])
    assert not (tmp_path / "calibration").exists()


def test_arguments_that_would_be_passed_over(calibration: GetCalibration, checkpoint: Get, tmp_path: Path) -> None:
    made = calibration("olmoe")
    with pytest.raises(moetailor.PlanError, match="--allocation eror; did you mean 'error'"):
        moetailor.make_plan(made, "reap", KEEP, allocation="eror")  # type: ignore[arg-type]
    plan = moetailor.make_plan(made, "reap", KEEP)
    with pytest.raises(moetailor.MoetailorError, match="a model in memory is changed in place"):
        moetailor.apply(plan, load(checkpoint("olmoe")), tmp_path / "out")  # type: ignore[call-overload]
    other = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "other", text=token_batches(length=10))
    with pytest.raises(moetailor.PlanError, match="other: not the calibration that the plan was made from"):
        moetailor.apply(plan, checkpoint("olmoe"), tmp_path / "out", calibration=other)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_removes_nothing_says_so(calibration: GetCalibration) -> None:
    with pytest.warns(moetailor.MoetailorWarning, match="remove 10%: takes no expert from any layer of 8"):
        assert not moetailor.make_plan(calibration("olmoe"), "reap", Budget.parse(remove="10%")).layers
