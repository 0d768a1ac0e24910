"""The registry: signatures are schemas, and a method may decide for several layers together."""

from collections.abc import Callable, Iterator, Sequence

import pytest

import moetailor
from moetailor.answers import Drop
from moetailor.methods.registry import METHODS, find_method, method
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView

GetCalibration = Callable[[str], moetailor.Calibration]


@pytest.fixture
def registered() -> Iterator[str]:
    """Register a method that ranks the experts of all layers together."""

    @method("together", needs={"count"}, scoped=True)
    def together(layers: Sequence[LayerView], keeps: Sequence[int], *, bias: float = 0.0, loud: bool = False) -> list:
        """Drop the least used experts of all layers together."""
        ranked = sorted(
            (
                (float(layer.sums.count[e]) + bias, n, e)
                for n, layer in enumerate(layers)
                for e in range(layer.num_experts)
            ),
            reverse=True,
        )
        chosen = ranked[: sum(keeps)]
        plans: list[LayerPlan] = []
        for number, layer in enumerate(layers):
            kept = [expert for _, at, expert in chosen if at == number]
            plans.append(keep_only(layer.num_experts, kept, Drop()))
        return plans

    yield "together"
    del METHODS["together"]


def test_a_scoped_method_decides_for_all_layers_at_once(registered: str, calibration: GetCalibration) -> None:
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


def test_parameters_are_read_as_the_type_of_their_default(registered: str) -> None:
    found = find_method(registered)
    assert found.resolve({"bias": "2", "loud": "true"}) == {"bias": 2.0, "loud": True}
    with pytest.raises(moetailor.PlanError, match="bias=much is not of type float"):
        found.resolve({"bias": "much"})
    with pytest.raises(moetailor.PlanError, match="did you mean 'loud'"):
        found.resolve({"lod": "1"})


def test_a_name_is_registered_once(registered: str) -> None:
    with pytest.raises(AssertionError, match="registered twice"):
        method(registered)(lambda layer, keep: None)


def test_unknown_statistics_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="no statistics called"):
        method("other", needs={"cuont"})
