"""What a method sees of a layer: what was measured, and on demand the experts themselves. Never the model.

Shapes: N sampled tokens, n of them, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moetailor.calibration.effects import Prices
from moetailor.calibration.kept import Kept
from moetailor.calibration.statistics import Sample, Sums
from moetailor.checkpoint.experts import Experts, ExpertShape
from moetailor.checkpoint.family import Groups


@dataclass(kw_only=True)
class LayerView:
    """One MoE layer for a method.

    Attributes:
        index: number of the decoder layer.
        num_experts: experts, which is also the number of slots.
        top_k: experts of a token.
        groups: groups that limit the router's choice, 1 where it chooses freely.
        limits: how they do.
        protected: experts that must stay.
        nbytes: bytes that the layer's experts and stand-ins may take; 0 when nobody said.
        expert_bytes: bytes of one expert.
        slot_bytes: bytes of one slot's rows in the router, where the budget is of all bytes; else 0.
        narrows: whether an ordinary checkpoint can hold fewer neurons in all experts that stay.
        shape: what an expert is made of.
        dtype: safetensors dtype of the experts.
        prices: what errors cost the predictions in the end; None where it was not measured.
        original: the inputs of the sampled tokens in the original model, [N, D], where `sample` has those that they
            have once the layers before this one are compressed; None where both are the same.
        read_sums: reads what calibration summed.
        read_sample: reads the sampled tokens.
        read_correction: reads the router's correction bias.
        read_domains: reads which domain of the text each sampled token comes from; None where there is but one.
        open_experts: opens the experts.
        kept: where what is measured of each expert is kept; None where nowhere is.
        advance: told how many experts were looked at, in work that takes long, and whether that was measured now.
    """

    index: int
    num_experts: int
    top_k: int
    groups: int
    limits: Groups = Groups()  # noqa: RUF009 (frozen)
    protected: frozenset[int] = frozenset()
    nbytes: int = 0
    expert_bytes: int = 0
    slot_bytes: int = 0
    narrows: bool = False
    shape: ExpertShape = ExpertShape(width=0, intermediate=0)  # noqa: RUF009 (frozen)
    dtype: str = "F32"
    prices: Prices | None = None
    original: torch.Tensor | None = None
    read_sums: Callable[[], Sums]
    read_sample: Callable[[], Sample]
    read_correction: Callable[[], torch.Tensor | None]
    open_experts: Callable[[], AbstractContextManager[Experts]]
    read_domains: Callable[[], torch.Tensor] | None = None
    kept: Kept | None = None
    advance: Callable[[int, bool], None] | None = None
    _opened: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def sums(self) -> Sums:
        """What calibration summed over the layer's tokens."""
        return self.read_sums()

    @cached_property
    def sample(self) -> Sample:
        """The sampled tokens of the layer."""
        return self.read_sample()

    @cached_property
    def domains(self) -> torch.Tensor:
        """The domain of the text that each sampled token comes from, by number, [N]."""
        return torch.zeros(len(self.sample.key)).long() if self.read_domains is None else self.read_domains()

    @property
    def sensitivity(self) -> float | None:
        """Nats a token that a coarse squared error of 1 a token costs in the end; None where it was not measured."""
        return None if self.prices is None else self.prices.coarse[self.index]

    @cached_property
    def correction(self) -> torch.Tensor | None:
        """What the router adds to its scores to choose, but not to weigh, float32 [E]; None where it adds nothing."""
        return self.read_correction()

    @cached_property
    def experts(self) -> Experts:
        """The experts, loaded when first asked for and kept until `close`."""
        return self._opened.enter_context(self.open_experts())

    def close(self) -> None:
        """Let go of all that was read; it is read again when asked for."""
        self._opened.close()
        for name in ("sums", "sample", "domains", "correction", "experts", "_there"):
            self.__dict__.pop(name, None)

    def routed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampled tokens that chose an expert, [n], and its gates there, float32 [n]."""
        token, place = (self.sample.index == expert).nonzero().unbind(1)
        return token, self.sample.gate[token, place]

    def each_expert(
        self, what: Mapping[str, Any], measure: Callable[[list[int]], torch.Tensor], at_once: int = 1
    ) -> torch.Tensor:
        """Return a row of numbers for each expert, as they were kept or measured now, float64 [E, columns].

        Args:
            what: all that the numbers depend on, beside calibration and model.
            measure: returns the rows of some experts.
            at_once: how many of them, at most.
        """
        rows = None if self.kept is None else self.kept.read(what)
        for start in range(0, self.num_experts, at_once):
            some = list(range(start, min(start + at_once, self.num_experts)))
            missing = [expert for expert in some if rows is None or bool(rows[expert].isnan().any())]
            if missing:
                measured = measure(missing)
                if rows is None:
                    rows = torch.full((self.num_experts, measured.shape[1]), torch.nan, dtype=torch.float64)
                rows[missing] = measured
                if self.kept is not None:
                    rows = self.kept.write(what, rows)
            if self.advance is not None:
                self.advance(len(some), bool(missing))
        assert rows is not None  # a layer has experts
        return rows

    def inputs(self, token: torch.Tensor) -> torch.Tensor:
        """Return the inputs of sampled tokens, float32 at least and where the experts are, [n, D]."""
        found = self._there[token.to(self._there.device)]
        return found.to(torch.promote_types(self.experts.dtype, torch.float32))

    def outputs(self, expert: int, token: torch.Tensor) -> torch.Tensor:
        """Return what an expert of the original gives for sampled tokens, [n, D]: what a stand-in has to give."""
        inputs = self._there if self.original is None else self.original
        return self.experts.outputs(expert, inputs[token.to(inputs.device)])

    @cached_property
    def _there(self) -> torch.Tensor:
        """The inputs of all sampled tokens where the experts are, moved there once, [N, D]."""
        return self.sample.hidden.to(self.experts.device)

    def mean(self, name: str) -> torch.Tensor:
        """Return a sum divided by the routed tokens of each expert, 0 for experts that no token reached."""
        total, count = getattr(self.sums, name), self.sums.count.clamp_min(1)
        return total / (count[:, None] if total.dim() == 2 else count)
