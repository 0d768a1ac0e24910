"""Auto: for every slot of every layer the answer that costs least, within one budget of bytes for the whole model.

Not from a paper. The menu of a slot: its own expert in some number of bits, with more of them for the down projection,
or as it lay; a constant; a linear map of some rank (`linear`). Each answer is priced in bytes, and in what it adds to
the squared error of its layer's output on tokens that it was not fitted on, times what such an error costs the
predictions, as calibration measured it (`--sensitivity`). Which answers to take is then one knapsack over all slots of
all layers, so layers and experts get as much as they are worth. In it a domain of the calibration text that has few
tokens counts for more than these, or what they alone need would go first. ``--remove`` stands for the bytes that MoNE
writes at that ratio.

Without ``bits`` nothing is rounded, and another menu is taken: constants, linear maps, another expert with a scale,
nothing where no token reached a slot, and the layer's base, alone or with a part of low rank (`lightmoe`).

Left out: experts made of several, which lose to a base with parts of low rank at all bytes that were measured, and take
as long to price as to build.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from moetailor import ranks
from moetailor.answers import Constant, Keep, Linear, LowRank, Width
from moetailor.calibration.domains import balanced
from moetailor.errors import PlanError
from moetailor.fitting import linear_maps, low_rank
from moetailor.fitting.work import of_held_out_maps, of_low_rank, of_map, of_noise, of_outputs
from moetailor.methods import mix_bits, mix_plain
from moetailor.methods.method import AtLeast, JointMethod
from moetailor.methods.registry import register
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView
from moetailor.planning.work import LayerSize, Work


@register
@dataclass(frozen=True, kw_only=True)
class Auto(JointMethod):
    """Choose for every slot what costs the predictions least for its bytes, over all layers together.

    Attributes:
        balance: how domains of the calibration text share the budget: 0 by their tokens, 1 all alike.
        bits: whether experts may stay in few bits; without it all is stored as it lay.
        stand_ins: whether constants and linear maps may take the place of experts; without them all experts stay.
        uniform_layers: keep all experts, those of a layer in one width, which engines can load; ``--uniform-layers``.
        widths: bits of gate, up and down projections that are on the menu, such as ``8,4``, and 16 for experts as they
            lay; all when empty.
        group: inputs that share a scale, at most.
        codes: of experts in few bits: ``vq`` takes 1 to 4 bits from codebooks, ``uint`` integers with zero points,
            ``int`` integers around zero, ``fp8``, ``fp8b128``, ``mxfp4`` and ``nvfp4`` floats; ``vq`` when empty, and
            ``uint`` in uniform layers, which engines load.
    """

    balance: Annotated[float, AtLeast(0)] = 0.75
    bits: bool = True
    stand_ins: bool = True
    uniform_layers: bool = False
    widths: str = ""
    group: Annotated[int, AtLeast(1)] = 128
    codes: Literal["", "uint", "int", "vq", "fp8", "fp8b128", "mxfp4", "nvfp4"] = ""

    name = "auto"
    replaces_with = Constant
    needs = frozenset(
        {"tokens", "count", "gate", "gate_sq", "gate_sq_output", "gate_sq_norm_sq", "norm_max", "sensitivity"}
    )
    reads_weights = True
    builds = frozenset({"constant", "linear", "low_rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance > 1:
            raise PlanError(f"balance={self.balance}: at 1 all domains count alike; give a number from 0 to 1")
        few = {"uniform_layers=true": self.uniform_layers, "stand_ins=false": not self.stand_ins}
        few |= {f"widths={self.widths}": bool(self.widths), f"codes={self.codes}": bool(self.codes)}
        if not self.bits and (told := next((words for words, given in few.items() if given), None)):
            raise PlanError(f"{told}: is about experts in few bits, and bits=false allows none")
        if self.uniform_layers and self.codes == "vq":
            raise PlanError("codes=vq: uniform layers are what engines load, which is no codebooks; take uint or int")
        _ = self.stays  # which refuses what is not on the menu

    @property
    def stays(self) -> list[Width | Keep]:
        """How experts that stay may lie where bits are on the menu."""
        codes = self.codes or ("uint" if self.uniform_layers else "vq")
        return mix_bits.ways_to_stay(self.widths, group=self.group, codes=codes)

    @property
    def decides_widths(self) -> bool:
        """Where bits are on the menu."""
        return self.bits

    @property
    def decides_counts(self) -> bool:
        """Always."""
        return True

    @property
    def keeps_all(self) -> bool:
        """Where nothing may stand in for experts."""
        return self.uniform_layers or not self.stand_ins

    @property
    def _plain_widths(self) -> list[Width]:
        """The widths on the menu that are the same for all matrices, narrowest first."""
        alike = (entry for entry in self.stays if isinstance(entry, Width) and not entry.down)
        return sorted(alike, key=lambda width: width.bits)

    def estimate(self, experts: int, keep: int, groups: int = 1) -> LayerPlan:
        """Return a plan with kept experts and novices; or, where all experts stay, one with these, in more bits the
        more are to be kept.
        """
        if not self.keeps_all:
            return super().estimate(experts, keep, groups)
        widths = self._plain_widths
        return untouched(experts).narrowed(widths[(len(widths) - 1) * (keep - 1) // max(experts - 1, 1)])

    def narrowest(self, plan: LayerPlan) -> LayerPlan:
        """Return it in the fewest bits on the menu."""
        return plan.narrowed(self._plain_widths[0]) if self.bits else plan

    def plan_layers(self, layers: Sequence[LayerView], keeps: Sequence[int]) -> Iterator[LayerPlan]:
        """Decide for all layers, in the bytes of kept experts and novices for the others."""
        nbytes = sum(layer.nbytes or _novices(layer, keep) for layer, keep in zip(layers, keeps, strict=True))
        if not layers:
            return
        if not self.bits:
            choices = list(ranks.each(layers, self._choice))
            # By one process: how far it comes in its time is not the same twice.
            yield from ranks.once(lambda: list(mix_plain.mixed(choices, nbytes)))
            return
        prices = layers[0].prices
        assert prices is not None
        yield from mix_bits.mixed(list(ranks.each(layers, self._priced)), prices, nbytes)

    def _choice(self, layer: LayerView) -> mix_plain.Choice:
        found = mix_plain.choice(layer, _weight(layer, self.balance))
        layer.close()
        return found

    def _priced(self, layer: LayerView) -> mix_bits.Priced:
        found = mix_bits.priced(layer, _weight(layer, self.balance), self.stays)
        layer.close()
        if self.uniform_layers:
            return found.uniform()
        return found if self.stand_ins else found.staying()

    def kept_under(self, layer: LayerView) -> Mapping[str, Any]:
        """Return the menu."""
        return mix_bits.kept_under(layer, self.stays) if self.bits else mix_plain.kept_under(layer)

    def work(self, layer: LayerSize) -> Work:
        """Return the work of pricing all entries of the menu for each expert."""
        experts = layer.experts
        if self.bits:
            widths = [entry for entry in self.stays if isinstance(entry, Width)]
            return experts * (of_held_out_maps(layer, mix_bits.RANKS[-1]) + of_noise(layer, widths))
        # Each expert also runs on some tokens of every other one, and what it gives is compared with what these give.
        tokens = experts * min(mix_plain.COMPARED, layer.tokens)
        compared = of_outputs(layer.shape, tokens) + Work(elements=8 * tokens * layer.shape.width)
        low = of_low_rank(layer, mix_plain.low_ranks(layer.shape))
        priced = of_held_out_maps(layer, mix_plain.LINEAR[-1]) + low
        return experts * (priced + compared)

    def building(self, layer: LayerSize, plan: LayerPlan) -> Work | None:
        """Return the work of the maps; of low-rank experts nobody has counted it."""
        maps = (of_map(layer, answer.rank) for answer in plan.of(Linear).values())
        return None if plan.of(LowRank) else sum(maps, Work())

    def build(self, layer: LayerView, plan: LayerPlan) -> dict[str, torch.Tensor]:
        """Return the tensors of constants and linear maps, and of low-rank experts over the layer's base."""
        found = linear_maps.build_maps(layer, plan, mix_bits.RIDGE) if plan.of(Constant) or plan.of(Linear) else {}
        return found | (
            low_rank.built_on(layer, plan, [mix_plain.base_of(layer)], "fitted") if plan.of(LowRank) else {}
        )


def _weight(layer: LayerView, balance: float) -> torch.Tensor:
    """Return what errors of each expert weigh when domains are balanced: the mean of its tokens' weights by squared
    gates, 1 where no token reached it, float64 [E].
    """
    gate_sq, index = layer.sample.gate.double().square(), layer.sample.index.long().flatten()
    weighed = gate_sq * balanced(layer.domains, balance)[:, None]
    total, mass = (torch.zeros(layer.num_experts).double().index_add(0, index, q.flatten()) for q in (weighed, gate_sq))
    return torch.where(mass > 0, total / mass, 1.0)


def _novices(layer: LayerView, keep: int) -> int:
    """Return the bytes of kept experts and novices for the others."""
    return keep * layer.expert_bytes + (layer.num_experts - keep) * answers_nbytes(
        [Constant()], layer.shape, layer.dtype
    )
