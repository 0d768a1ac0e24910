"""Quantize: every expert stays, in few bits: what to compare with before anything is removed.

GPTQ (arXiv:2210.17323) on moments weighted by squared gates, with searched scales and the down projection fitted to
what the rounded gate and up projections give; or the nearest codes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from moetailor.answers import Keep, Kind, Width
from moetailor.errors import PlanError
from moetailor.fitting.widths import Rounding
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work

# Codes in names of rows.
SHORT = {"int": "sym"}


@register
@dataclass(frozen=True, kw_only=True)
class Quantize(Method):
    """Keep every expert, all in the same few bits.

    Attributes:
        bits: of a weight of the gate and up projections, 2 to 8; by `vq` from 1 on.
        down: of a weight of the down projection; `bits` when 0.
        group: inputs that share a scale, at most.
        codes: ``uint`` for integers with zero points, ``int`` for integers around zero, ``vq`` for 1 to 4 bits from
            codebooks, each code of several weights, ``fp8`` for floats of 8 bits with a scale for each row,
            ``fp8b128`` with one for each block of 128 x 128, ``mxfp4`` and ``nvfp4`` for floats of 4 bits.
        rounding: ``gptq`` or ``nearest``.
    """

    bits: Annotated[int, AtLeast(1)] = 4
    down: Annotated[int, AtLeast(0)] = 0
    group: Annotated[int, AtLeast(1)] = 128
    codes: Kind = "uint"  # type: ignore[misc]
    rounding: Rounding = "gptq"  # type: ignore[misc]

    name = "quantize"
    paper = "arXiv:2210.17323"
    reads_weights = True
    replaces_with = Keep
    removes = False
    useful_whole = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width.whole:
            raise PlanError(f"bits={self.bits}: there are 2 to 8, and 1 to 4 with codes=vq")

    @property
    def decides_widths(self) -> bool:
        """Always."""
        return True

    @property
    def width(self) -> Width:
        """How every expert lies."""
        return Width(bits=self.bits, down=self.down, group=self.group, codes=self.codes)

    @property
    def label(self) -> str:
        """How a comparison calls it: its bits, and what else is not the default."""
        words = {"rounding": self.rounding, "group": f"g{self.group}", "codes": SHORT.get(self.codes, self.codes)}
        changed = [words[f.name] for f in fields(self) if f.name in words and getattr(self, f.name) != f.default]
        return " ".join([str(self.width).partition(",")[0], *changed])

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Keep all."""
        return self.estimate(layer.num_experts, keep)

    def work(self, layer: LayerSize) -> Work:
        """Nothing: experts are rounded when the plan is applied."""
        return Work()

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return the plan, whatever the layer is."""
        return untouched(experts).narrowed(self.width)
