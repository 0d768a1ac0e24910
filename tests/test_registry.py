"""The registry: fields are schemas, and a method may decide for several layers together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

import moetailor
from moetailor.answers import Drop
from moetailor.calibration.statistics import Sums
from moetailor.methods.description import describe
from moetailor.methods.method import AtLeast, JointMethod, Method
from moetailor.methods.registry import METHODS, find_method, register
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView
from support.hand import layer_of, sums_of

GetCalibration = Callable[[str], moetailor.Calibration]


@dataclass(frozen=True, kw_only=True)
class Together(JointMethod):
    """Drop the least used experts of all layers together.

    However many of a layer these are.

    Attributes:
        bias: added to every count, which changes
            nothing.
        loud: says nothing.
        size: of nothing.
        word: about nothing.
    """

    bias: float = 0.0
    loud: bool = False
    size: Annotated[int, AtLeast(2)] = 3
    word: Literal["one", "two"] = "one"

    name = "together"
    needs = frozenset({"count"})

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        ranked = sorted(
            (
                (float(layer.sums.count[e]) + self.bias, n, e)
                for n, layer in enumerate(layers)
                for e in range(layer.num_experts)
            ),
            reverse=True,
        )
        chosen = ranked[: sum(keeps)]
        for number, layer in enumerate(layers):
            kept = [expert for _, at, expert in chosen if at == number]
            yield keep_only(layer.num_experts, kept, Drop())


@pytest.fixture
def registered() -> Iterator[str]:
    """Register a method that ranks the experts of all layers together."""
    register(Together)
    yield "together"
    del METHODS["together"]


def test_a_joint_method_decides_for_all_layers_at_once(registered: str, calibration: GetCalibration) -> None:
    made = calibration("olmoe")
    plan = moetailor.make_plan(made, registered, moetailor.Budget.parse(keep=6))
    counts = [len(layer.pool) for layer in plan.layers.values()]
    assert sum(counts) == 6 * len(made.layers)
    every = sorted(float(c) for layer in made.layers for c in made.sums(layer).count)
    kept = [
        float(made.sums(stack.index).count[expert])
        for stack in made.model.stacks
        for expert in plan.layers[stack.prefix].pool
    ]
    assert sorted(kept) == every[-len(kept) :]


def test_a_joint_method_decides_for_one_layer_as_if_there_were_no_other() -> None:
    layer = layer_of(sums_of([(0, 1.0, [1.0]), (2, 1.0, [1.0]), (2, 1.0, [1.0])], 3, 3))
    assert Together().plan(layer, 1).pool == [2]


def test_every_layer_is_let_go_once_it_is_decided() -> None:
    read: list[int] = []
    layers = [layer_of(sums_of([(0, 1.0, [1.0]), (1, 1.0, [1.0])], 2, 2), index=number) for number in range(2)]

    def noted(layer: LayerView) -> Callable[[], Sums]:
        inner = layer.read_sums

        def read_sums() -> Sums:
            read.append(layer.index)
            return inner()

        return read_sums

    for layer in layers:
        layer.read_sums = noted(layer)
    for at, _ in enumerate(METHODS["frequency"]().plan_layers(layers, [1, 1])):
        assert read == list(range(at + 1))  # and none before its turn
        assert not any("sums" in layer.__dict__ for layer in layers)


def test_parameters_are_read_as_the_type_of_their_default(registered: str) -> None:
    found = find_method(registered)
    assert found.of({"bias": "2", "loud": "true"}).parameters == {"bias": 2.0, "loud": True, "size": 3, "word": "one"}
    with pytest.raises(moetailor.PlanError, match="bias=much is not of type float"):
        found.of({"bias": "much"})
    with pytest.raises(moetailor.PlanError, match="did you mean 'loud'"):
        found.of({"lod": "1"})
    with pytest.raises(moetailor.PlanError, match="method 'together': size=1 must be a number of at least 2"):
        found.of({"size": "1"})
    with pytest.raises(moetailor.PlanError, match="parameter word=three"):
        found.of({"word": "three"})


def test_parameters_are_checked_however_a_method_is_made() -> None:
    with pytest.raises(moetailor.PlanError, match="size=1 must be a number of at least 2"):
        Together(size=1)
    with pytest.raises(moetailor.PlanError, match="parameter word=three"):
        Together(word="three")  # type: ignore[arg-type]


def test_a_name_is_found_however_it_is_capitalised(registered: str, calibration: GetCalibration) -> None:
    assert find_method("ToGether") is Together
    plan = moetailor.make_plan(calibration("olmoe"), "MoNE", moetailor.Budget.parse(keep=6))
    assert plan.method == "mone"
    with pytest.raises(moetailor.PlanError, match="no method 'mona'; did you mean 'mone'"):
        find_method("mona")


def test_a_method_is_described_by_its_fields_and_docstring() -> None:
    said = describe(Together)
    assert (said.summary, said.text) == (
        "Drop the least used experts of all layers together.",
        "However many of a layer these are.",
    )
    assert [
        (parameter.name, parameter.kind, parameter.default, parameter.meaning) for parameter in said.parameters
    ] == [
        ("bias", "a number", 0.0, "added to every count, which changes nothing."),
        ("loud", "true or false", False, "says nothing."),
        ("size", "a whole number, at least 2", 3, "of nothing."),
        ("word", "one or two", "one", "about nothing."),
    ]
    assert [kind.kind for kind in said.becomes] == ["drop"]
    kinds = {name: [kind.kind for kind in describe(METHODS[name]).becomes] for name in ("linear", "refit", "ream")}
    assert kinds == {"linear": ["constant", "linear"], "refit": ["drop"], "ream": ["drop", "merged"]}
    assert describe(METHODS["easy_ep"]).options == ("--residual",)


def test_a_method_is_no_method_without_a_plan() -> None:
    class Undecided(Method):
        name = "undecided"

    with pytest.raises(TypeError, match="abstract"):
        Undecided()  # type: ignore[abstract]


def test_a_name_is_registered_once(registered: str) -> None:
    with pytest.raises(AssertionError, match="registered twice"):
        register(Together)


def test_unknown_statistics_are_our_own_mistake() -> None:
    class Other(Together):
        name = "other"
        needs = frozenset({"cuont"})

    with pytest.raises(AssertionError, match="no statistics called"):
        register(Other)
