"""Annealing: the originals of low-rank experts are faded out while these learn (LightMoE, arXiv:2603.12645, 3.3).

A replaced expert runs as W*(t) = beta W + (1 - beta) W_base + B A with beta falling from 1 to 0 over the first share of
the steps. Where own parts do not start at zero they are faded in with the base, W* = beta W + (1 - beta)(W_base + B A),
so that at the start the model is the original in both cases. When beta reaches 0 the originals are let go.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import TrainerCallback

from moetailor.answers import LowRank, low_rank
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.experts import Experts
from moetailor.errors import MoetailorError
from moetailor.runtime.experts import CompressedExperts


def beta(step: int, steps: int, share: float, gamma: float = 0.0) -> float:
    """Return what is left of the originals at a step: 1 at the first, 0 from the given share of all steps on.

    Args:
        step: t, optimizer steps done.
        steps: T.
        share: eps, the share of the steps in which they fade.
        gamma: 0 fades linearly, 1 - t / (eps T); more fades faster at first, as an exponential does.
    """
    tau = min(step / (share * steps), 1.0)
    # (e^(-gamma tau) - e^(-gamma)) / (1 - e^(-gamma)), which tends to 1 - tau
    return 1 - tau if gamma == 0 else (math.exp(-gamma * tau) - math.exp(-gamma)) / (1 - math.exp(-gamma))


class Annealing(TrainerCallback):
    """Fades the originals of a student's low-rank experts out.

    Args:
        anatomy: the MoE layers of the original.
        share: eps, the share of the steps in which they fade, above 0 and at most 1.
        gamma: see `beta`.
    """

    def __init__(self, anatomy: Anatomy, share: float, gamma: float = 0.0) -> None:
        self._anatomy, self._share, self._gamma = anatomy, share, gamma
        self._mixtures: list[Mixture] = []

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Pair the layers of both models; nothing is mixed before training begins.

        Args:
            student: the compressed model.
            teacher: its original.

        Raises:
            MoetailorError: the student has no low-rank experts.
        """
        teacher.requires_grad_(False)
        for layer in self._anatomy.layers.values():
            module = _compressed(student.get_submodule(layer.experts))
            if module is not None and module.slots.of(LowRank):
                self._mixtures.append(Mixture(module, teacher.get_submodule(layer.experts)))
        if not self._mixtures:
            raise MoetailorError("--anneal: the model has no low-rank experts to fade in; --method lightmoe makes them")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mix the originals in, wholly: the student then gives what they did, where both models agree elsewhere."""
        for mixture in self._mixtures:
            mixture.module.instead = mixture

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set beta for the next step."""
        left = beta(state.global_step, state.max_steps, self._share, self._gamma)
        for mixture in self._mixtures:
            mixture.beta = left
        if left == 0:
            self.release()

    def release(self) -> None:
        """Let the originals go: the bases and own parts answer alone."""
        for mixture in self._mixtures:
            mixture.module.instead = None
        self._mixtures.clear()


class Mixture:
    """The experts of one layer, between their originals and what replaces them.

    Args:
        module: the compressed experts; they run through this while training anneals.
        original: the experts that they were.

    Raises:
        MoetailorError: the layer has other answers than kept and low-rank experts.
    """

    def __init__(self, module: Any, original: Any) -> None:
        self.module, self.original, self.beta = module, original, 1.0
        slots = module.slots
        self._low = {slot: number for number, slot in enumerate(low_rank.members(slots))}
        self._kept = {slot: row for slot, row in enumerate(slots.pool_rows) if row >= 0}
        others = len(slots.rows) - len(self._low) - len(self._kept)
        dropped = len(original.down_proj) - len(slots.rows)
        if others or dropped:
            raise MoetailorError(
                f"--anneal mixes kept and low-rank experts with their originals; a layer has {others} slots with other "
                f"answers and {dropped} dropped ones; leave --anneal out"
            )
        self._whole = any(bool(module.tensor(f"low_rank_{part}_out").any()) for part in self._parts)

    @property
    def _parts(self) -> list[str]:
        return [part for part in Experts(self.module).shape.matrices if f"low_rank_{part}_out" in self.module.added]

    def __call__(self, hidden_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Return the layer's routed output, [T, D], by the family's own forward on the mixed weights."""
        return functional_call(self.original, self.weights(), (hidden_TD, slot_TK, gate_TK))

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the mixed weights as the family's parameters."""
        originals, kept = Experts(self.original), Experts(self.module).matrices(detach=False)
        mixed = {}
        for part, stack in originals.matrices().items():
            device = stack.device
            low = torch.tensor(list(self._low), device=device)
            at = torch.tensor(list(self._kept), device=device)
            row = torch.tensor(list(self._kept.values()), device=device)
            with torch.autocast(device.type, enabled=False):
                faded = self._faded(part, stack[low], torch.tensor(list(self._low.values()), device=device))
            mixed[part] = stack.index_copy(0, at, kept[part][row].to(stack)).index_copy(0, low, faded.to(stack))
        return originals.packed(mixed)

    def _faded(self, part: str, original: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Return one matrix of each replaced expert, faded in."""
        module = self.module
        base = module.tensor(f"low_rank_base_{part}")[module.low_rank_base[number]]
        if part not in self._parts:  # biases
            return self.beta * original + (1 - self.beta) * base
        inner = low_rank.factor(module, f"{part}_in", number).to(base)
        outer = low_rank.factor(module, f"{part}_out", number).to(base)
        own = outer.transpose(1, 2) @ inner
        base = base + own if self._whole else base
        return self.beta * original + (1 - self.beta) * base + (0 if self._whole else own)


def _compressed(module: Any) -> CompressedExperts | None:
    """Return the compressed experts at a place, perhaps with adapters around them."""
    return next((part for part in module.modules() if isinstance(part, CompressedExperts)), None)
