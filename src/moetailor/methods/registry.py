"""The methods by name. A method's signature is the schema of its parameters, its docstring its row in the docs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch

from moetailor.answers import Answer, Drop
from moetailor.calibration.statistics import STATISTICS
from moetailor.errors import PlanError, did_you_mean
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.view import LayerView

Build = Callable[..., dict[str, torch.Tensor]]
METHODS: dict[str, Method] = {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to decide what stands behind the slots.

    Attributes:
        name: as the command line knows it.
        function: ``(layer, keep, **parameters) -> LayerPlan``, or, when `scoped`, ``(layers, keeps, **parameters) ->
            Iterable[LayerPlan]`` for several layers that are decided together.
        paper: where it comes from.
        removed: the kind of answer behind a slot whose expert goes.
        needs: the statistics it reads, a promise that the contract suite enforces.
        weights: whether it reads expert weights or sampled tokens.
        scoped: which of the two forms `function` has.
        outline: ``(experts, keep, **parameters) -> LayerPlan``: a plan of the counts and bytes that the method's will
            have, where `removed` alone does not say.
        spreads: ``(**parameters) -> bool``: whether it decides itself how many experts each layer keeps.
        of_total: whether ``--remove`` means a share of the checkpoint's bytes, not of each layer's experts.
        whole: whether it does something of use without removing an expert.
        trained: whether it is made for recovery, so that before training it says little.
        slow: whether it searches: planning takes longer than running the model over held-out text.
        builds: the kinds of answers that `build` computes, see `LayerPlan.computed`.
        build: ``(layer, plan, **parameters) -> tensors``: what a plan of this method adds. The tensors that the answers
            declare, by name; and for `LayerPlan.rebuilt` the matrices of `Experts`, stacked in that order.
    """

    name: str
    function: Callable[..., Any]
    paper: str
    removed: type[Answer]
    needs: frozenset[str]
    weights: bool
    scoped: bool
    outline: Callable[..., LayerPlan] | None
    spreads: Callable[..., bool] | None
    of_total: bool
    whole: bool
    trained: bool
    slow: bool
    builds: frozenset[str]
    build: Build | None

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword-only parameters and their defaults."""
        signature = inspect.signature(self.function)
        return {name: p.default for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").splitlines()[0]

    def plan(
        self,
        layers: Sequence[LayerView],
        keeps: Sequence[int],
        parameters: Mapping[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[LayerPlan]:
        """Decide for some layers, each let go once it is decided.

        Args:
            layers: the layers; a scoped method decides for all of them together.
            keeps: experts that stay in each.
            parameters: all parameters of the method.
            progress: called with (layers done, layers in all).
        """
        plans: list[LayerPlan] = []
        for plan in self._plans(layers, keeps, parameters):
            plans.append(plan)
            if progress:
                progress(len(plans), len(layers))
        return plans

    def _plans(
        self, layers: Sequence[LayerView], keeps: Sequence[int], parameters: Mapping[str, Any]
    ) -> Iterator[LayerPlan]:
        if self.scoped:
            yield from self.function(layers, keeps, **parameters)
            return
        for layer, keep in zip(layers, keeps, strict=True):
            yield self.function(layer, keep, **parameters)
            layer.close()

    def resolve(self, given: Mapping[str, str | Any]) -> dict[str, Any]:
        """Return all parameters, with the given values read as the type of their defaults.

        Raises:
            PlanError: an unknown parameter, or a value that cannot be read.
        """
        known = self.parameters
        for name in given:
            if name not in known:
                what = did_you_mean(name, known) if known else "; it has none"
                raise PlanError(f"method {self.name!r} has no parameter {name!r}{what}")
        hints = get_type_hints(self.function, include_extras=True)
        read = {
            name: _read(self.name, name, given[name], default) if name in given else default
            for name, default in known.items()
        }
        for name, value in read.items():
            _check(self.name, name, value, hints.get(name))
        return read


def method(
    name: str,
    *,
    removed: type[Answer] = Drop,
    paper: str = "",
    needs: Iterable[str] = (),
    weights: bool = False,
    scoped: bool = False,
    outline: Callable[..., LayerPlan] | None = None,
    spreads: Callable[..., bool] | None = None,
    of_total: bool = False,
    whole: bool = False,
    trained: bool = False,
    slow: bool = False,
    builds: Iterable[str] = (),
    build: Build | None = None,
) -> Callable[[Callable], Callable]:
    """Register a function as a method; see `Method` for the arguments."""
    unknown = set(needs) - STATISTICS
    assert not unknown, f"{name}: no statistics called {unknown}"
    assert name not in METHODS, f"{name} is registered twice"

    def register(function: Callable) -> Callable:
        METHODS[name] = Method(
            name=name,
            function=function,
            paper=paper,
            removed=removed,
            needs=frozenset(needs),
            weights=weights,
            scoped=scoped,
            outline=outline,
            spreads=spreads,
            of_total=of_total,
            whole=whole,
            trained=trained,
            slow=slow,
            builds=frozenset(builds),
            build=build,
        )
        return function

    return register


def find_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in METHODS:
        raise PlanError(f"no method {name!r}" + did_you_mean(name, METHODS))
    return METHODS[name]


@dataclass(frozen=True)
class AtLeast:
    """The least value of a parameter, as in ``Annotated[int, AtLeast(1)]``."""

    least: float


def choice(name: str, value: str, known: Iterable[str]) -> str:
    """Return a parameter that must be one of a few words.

    Raises:
        PlanError: it is not.
    """
    if value not in (known := list(known)):
        raise PlanError(f"parameter {name}={value}" + did_you_mean(value, known))
    return value


def _check(method: str, name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        choice(name, value, get_args(hint))
    if get_origin(hint) is Annotated:
        (limit,) = (extra for extra in get_args(hint)[1:] if isinstance(extra, AtLeast))
        if not limit.least <= value < float("inf"):
            raise PlanError(f"method {method!r}: {name}={value} must be a number of at least {limit.least}")


def _read(method: str, name: str, value: Any, default: Any) -> Any:
    try:
        if not isinstance(value, str):
            if isinstance(value, type(default)) or (type(default) is float and type(value) is int):
                return value
            raise ValueError
        if isinstance(default, str):
            return value
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return type(default)(value)
    except (ValueError, KeyError):
        kind = type(default).__name__
        raise PlanError(f"method {method!r}: {name}={value} is not of type {kind} (default {default})") from None
