"""What a method is: a dataclass of its parameters that says what becomes of the slots of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch

from moetailor import ranks
from moetailor.answers import Answer, Drop
from moetailor.checkpoint.layout import Stack
from moetailor.errors import PlanError, did_you_mean
from moetailor.fitting.widths import Rounding
from moetailor.methods.choose import kept_of_group
from moetailor.planning.layer_plan import LayerPlan, keep_first
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work


@dataclass(frozen=True)
class AtLeast:
    """The least value of a parameter, as in ``Annotated[int, AtLeast(1)]``."""

    least: float


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to decide what stands behind the slots. Its fields are its parameters, all with defaults.

    Attributes:
        name: as the command line knows it, in small letters.
        paper: where it comes from.
        replaces_with: the kind of answer behind a slot whose expert goes.
        needs: the statistics it reads, a promise that the contract suite enforces.
        uses: statistics that it goes by where they are there, and does without.
        reads_weights: whether it reads expert weights or sampled tokens.
        remove_counts_bytes: whether ``--remove`` means a share of the checkpoint's bytes, not of each layer's experts.
        removes: whether its plans take experts away, so that ``--remove`` and ``--keep`` mean something.
        scores: whether it scores experts, which ``--allocation global`` goes by.
        useful_whole: whether it does something of use without removing an expert.
        trained: whether its result is meant to be trained (`moetailor recover`) before it is used or compared.
        slow: whether it searches: planning takes longer than running the model over held-out text.
        builds: the kinds of answers whose tensors `build` computes, see `LayerPlan.computed`.
        rounding: how experts that its plans keep in few bits are rounded.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    replaces_with: ClassVar[type[Answer]] = Drop
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    reads_weights: ClassVar[bool] = False
    remove_counts_bytes: ClassVar[bool] = False
    removes: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    useful_whole: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    builds: ClassVar[frozenset[str]] = frozenset()
    rounding: ClassVar[Rounding] = "gptq"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if get_origin(hint) is not ClassVar:
                _check(self.name, name, getattr(self, name), hint)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the method with some parameters, those that are text read as the type of their defaults.

        Raises:
            PlanError: an unknown parameter, or a value that cannot be read.
        """
        known = {field.name: field.default for field in fields(cls)}
        for name in given:
            if name not in known:
                what = did_you_mean(name, known) if known else "; it has none"
                raise PlanError(f"method {cls.name!r} has no parameter {name!r}{what}")
        return cls(**{name: _read(cls.name, name, value, known[name]) for name, value in given.items()})

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters by name, as a plan records them."""
        return asdict(self)

    @property
    def label(self) -> str:
        """How a comparison calls it: its name, and the parameters that are not the defaults."""
        changed = [f"{f.name}={value}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return ":".join([self.name, *changed])

    @property
    def decides_counts(self) -> bool:
        """Whether it decides itself how many experts each layer keeps."""
        return False

    @property
    def keeps_all(self) -> bool:
        """Whether it takes no expert away, with its parameters."""
        return not self.removes

    @property
    def decides_widths(self) -> bool:
        """Whether it decides itself in how many bits experts lie."""
        return False

    @abstractmethod
    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer.

        Args:
            layer: the layer.
            keep: experts that stay.
        """

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide for some layers, each let go once it is decided.

        Args:
            layers: the layers.
            keeps: experts that stay in each.
        """

        def planned(pair: tuple[LayerView, int]) -> LayerPlan:
            layer, keep = pair
            found = self.plan(layer, keep)
            layer.close()
            return found

        yield from ranks.each(list(zip(layers, keeps, strict=True)), planned)

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return what a plan of this method adds to a layer.

        The tensors that the answers declare, by name; and for `LayerPlan.rebuilt` the matrices of `Experts`, stacked in
        that order.

        Args:
            layer: the layer.
            plan: what becomes of its slots.
        """
        return {}

    def work(self, layer: LayerSize) -> Work | None:
        """Return what planning one layer computes; None where nobody has counted it.

        Args:
            layer: the layer.
        """
        return None if self.reads_weights else Work()

    def trying(self, layers: Sequence[LayerSize]) -> Work:
        """Return what is computed on some of the layers before the first one is decided.

        Args:
            layers: the layers.
        """
        return Work()

    def kept_under(self, layer: LayerView) -> Mapping[str, Any] | None:
        """Return what the rows of numbers that it keeps of each expert depend on, see `LayerView.each_expert`; None
        where it keeps none.

        Args:
            layer: the layer, of which nothing is read.
        """
        return None

    def building(self, layer: LayerSize, plan: LayerPlan) -> Work | None:
        """Return what `build` computes for one layer, without experts in few bits; None where nobody has counted it.

        Args:
            layer: the layer.
            plan: what becomes of its slots.
        """
        return None if self.reads_weights and plan.computed & self.builds else Work()

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return a plan with the counts and bytes that the method's will have; the first experts stay.

        Args:
            experts: slots of the layer.
            keep: experts that stay.
            groups: groups of the router; where slots are dropped the same number of each stays.
        """
        groups = groups if self.replaces_with.drops else 1
        size, each = experts // groups, kept_of_group(keep, groups)
        kept = [group * size + number for group in range(groups) for number in range(each)]
        return keep_first(experts, kept, self.replaces_with)

    def estimate_of(self, stack: Stack, keep: int, groups: int = 1) -> LayerPlan:
        """Return `estimate` for a layer on disk, of which more is known than how many experts it has.

        Args:
            stack: the layer.
            keep: experts that stay.
            groups: groups of the router.
        """
        return self.estimate(stack.num_experts, keep, groups)

    def narrowest(self, plan: LayerPlan) -> LayerPlan:
        """Return an estimate with what stays in the fewest bytes that the method may leave it in.

        Args:
            plan: what `estimate` gave.
        """
        return plan


class JointMethod(Method):
    """A method that decides for several layers together."""

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Decide for one layer as if there were no other."""
        (only,) = self.plan_layers([layer], [keep])
        return only

    @abstractmethod
    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide for some layers, each let go once nothing more is read of it.

        Args:
            layers: the layers.
            keeps: experts that stay in each; where `decides_counts`, as many in all or the bytes that they take.
        """


def _check(method: str, name: str, value: Any, hint: Any) -> None:
    """Refuse a word that is not one of those annotated, or a number below the least one."""
    if get_origin(hint) is Literal and value not in (known := get_args(hint)):
        raise PlanError(f"parameter {name}={value}" + did_you_mean(str(value), known))
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
