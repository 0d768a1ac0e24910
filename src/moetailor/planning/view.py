"""What a method sees of a layer: what was measured, and on demand the experts themselves. Never the model.

Shapes: T tokens, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moetailor.calibration.statistics import Sample, Sums
from moetailor.checkpoint.family import Groups


class Experts:
    """The experts of one layer, whatever their family's layout.

    Matrices are named ``gate`` and ``up`` [F, D] and ``down`` [D, F], with ``gate_bias`` and ``up_bias`` [F] and
    ``down_bias`` [D] where the family has biases; families without gates have no ``gate``. Stacks of them have a
    leading axis of experts.

    Args:
        module: the experts module, with weights.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.gated = hasattr(module, "gate_up_proj")
        self.transposed = bool(getattr(module, "is_transposed", False))
        self.concatenated = bool(getattr(module, "is_concatenated", True))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.module.down_proj.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.module.down_proj.device

    @property
    def inputs(self) -> list[str]:
        """The matrices that are applied to an expert's input."""
        return ["gate", "up"] if self.gated else ["up"]

    def matrices(self, experts: Sequence[int] | slice = slice(None), *, detach: bool = True) -> dict[str, torch.Tensor]:
        """Return the stacked matrices of some experts, views where the layout allows.

        Args:
            experts: which.
            detach: leave gradients out.
        """
        found = {}
        for name in ("gate_up_proj" if self.gated else "up_proj", "down_proj"):
            weight = getattr(self.module, name)[experts]
            parts = {name: weight.transpose(1, 2) if self.transposed else weight}
            if (bias := getattr(self.module, f"{name}_bias", None)) is not None:
                parts[f"{name}_bias"] = bias[experts]
            found |= parts
        split = self._split(found)
        return {name: stack.detach() for name, stack in split.items()} if detach else split

    def one(self, expert: int) -> dict[str, torch.Tensor]:
        """Return the matrices of one expert."""
        return {name: stack[0] for name, stack in self.matrices(slice(expert, expert + 1)).items()}

    def packed(self, matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return stacked matrices as the family's parameters: the inverse of `matrices`."""
        found = {}
        for name, part in (("gate_up_proj" if self.gated else "up_proj", "up"), ("down_proj", "down")):
            for suffix in ("", "_bias"):
                if part + suffix not in matrices:
                    continue
                both = [matrices[f"gate{suffix}"], matrices[f"up{suffix}"]] if self.gated and part == "up" else None
                weight = matrices[part + suffix] if both is None else self._join(both, axis=1)
                turned = self.transposed and not suffix
                found[name + suffix] = weight.transpose(1, 2).contiguous() if turned else weight.contiguous()
        return found

    @torch.no_grad()
    def hidden(self, one: Mapping[str, torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection is applied to, [T, F].

        Args:
            one: the expert's matrices.
            x_TD: tokens.
        """
        x_TD = x_TD.to(one["up"])
        return self.activated([F.linear(x_TD, one[part], one.get(f"{part}_bias")) for part in self.inputs])

    def activated(self, projected: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the down projection is applied to, [T, F], from what `inputs` gave, each [T, F]."""
        return (
            self.module._apply_gate(self._join(projected, axis=1)) if self.gated else self.module.act_fn(projected[0])
        )

    @torch.no_grad()
    def outputs(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the raw output of one expert for each token, [T, D] in the weights' dtype."""
        one = self.one(expert)
        return F.linear(self.hidden(one, x_TD), one["down"], one.get("down_bias"))

    def _split(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        split = {}
        for name, weight in found.items():
            part, suffix = ("down" if name.startswith("down") else "up"), ("_bias" if name.endswith("_bias") else "")
            if part == "up" and self.gated:
                halves = weight.chunk(2, dim=1) if self.concatenated else (weight[:, ::2], weight[:, 1::2])
                split[f"gate{suffix}"], split[f"up{suffix}"] = halves
            else:
                split[part + suffix] = weight
        return split

    def _join(self, both: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return (
            torch.cat(list(both), axis)
            if self.concatenated
            else torch.stack(list(both), axis + 1).flatten(axis, axis + 1)
        )


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
        itemsize: bytes of a number.
        inner: neurons of an expert, F.
        matrices: matrices of an expert: 3 with a gate, 2 without.
        effect: nats a token that a squared error of 1 a token costs in the end; None where it was not recorded.
        original: the sampled tokens as they are in the original model, [N, D], where `sample` has what the already
            compressed layers before this one make of them.
        read_sums: reads what calibration summed.
        read_sample: reads the sampled tokens.
        read_correction: reads the router's correction bias.
        read_domains: reads which domain of the text each sampled token comes from; None where there is but one.
        open_experts: opens the experts.
    """

    index: int
    num_experts: int
    top_k: int
    groups: int
    limits: Groups = Groups()  # noqa: RUF009 (frozen)
    protected: frozenset[int] = frozenset()
    nbytes: int = 0
    expert_bytes: int = 0
    itemsize: int = 0
    inner: int = 0
    matrices: int = 3
    effect: float | None = None
    original: torch.Tensor | None = None
    read_sums: Callable[[], Sums]
    read_sample: Callable[[], Sample]
    read_correction: Callable[[], torch.Tensor | None]
    open_experts: Callable[[], AbstractContextManager[nn.Module]]
    read_domains: Callable[[], torch.Tensor] | None = None
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

    @cached_property
    def correction(self) -> torch.Tensor | None:
        """What the router adds to its scores to choose, but not to weigh, float32 [E]; None where it adds nothing."""
        return self.read_correction()

    @cached_property
    def experts(self) -> Experts:
        """The experts, loaded when first asked for and kept until `close`."""
        return Experts(self._opened.enter_context(self.open_experts()))

    def close(self) -> None:
        """Let go of all that was read; it is read again when asked for."""
        self._opened.close()
        for name in ("sums", "sample", "domains", "correction", "experts"):
            self.__dict__.pop(name, None)

    def routed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampled tokens that chose an expert, [n], and its gates there, float32 [n]."""
        token, place = (self.sample.index == expert).nonzero().unbind(1)
        return token, self.sample.gate[token, place]

    def outputs(self, expert: int, token: torch.Tensor) -> torch.Tensor:
        """Return what an expert of the original gives for sampled tokens, [n, D]: what a stand-in has to give."""
        inputs = self.sample.hidden if self.original is None else self.original
        return self.experts.outputs(expert, inputs[token])

    def mean(self, name: str) -> torch.Tensor:
        """Return a sum divided by the routed tokens of each expert, 0 for experts that no token reached."""
        total, count = getattr(self.sums, name), self.sums.count.clamp_min(1)
        return total / (count[:, None] if total.dim() == 2 else count)
