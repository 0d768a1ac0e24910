"""The weights that methods read, experts and correction biases: layer by layer, from disk or a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetailor.checkpoint.anatomy import Anatomy, discover, tensors_of
from moetailor.checkpoint.devices import resolve_device
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import Checkpoint
from moetailor.checkpoint.layout import DiskStack, find_stacks
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.stored_experts import StoredExperts


class ExpertWeights:
    """Expert weights of a checkpoint (opened when first asked for) or of a model in memory.

    Args:
        source: folder, hub name, opened checkpoint, or a model: streamed from one or in memory.
        anatomy: the MoE layers, of a model that is changed while its weights are read; else they are discovered.
        trust_remote_code: run code that comes with the checkpoint.
        device: where weights of a checkpoint are put; CUDA when there is one.
        batch_memory: bytes that experts computed together may take; what the device is good for when None.
    """

    def __init__(
        self,
        source: str | Path | Original | StreamedModel | nn.Module,
        *,
        anatomy: Anatomy | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        batch_memory: int | None = None,
    ) -> None:
        self._source, self._batch_memory = source, batch_memory
        self._trust, self._device = trust_remote_code, device
        if anatomy is not None:
            self.anatomy = anatomy

    @property
    def in_memory(self) -> bool:
        """Whether the weights are those of a model in memory."""
        return isinstance(self._source, nn.Module)

    @cached_property
    def _original(self) -> Original:
        assert not isinstance(self._source, nn.Module | StreamedModel)
        if isinstance(self._source, Original):
            return self._source
        return Original(self._source, trust_remote_code=self._trust)

    @property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint."""
        return self._source.checkpoint if isinstance(self._source, StreamedModel) else self._original.checkpoint

    @cached_property
    def _streamed(self) -> StreamedModel:
        if isinstance(self._source, StreamedModel):
            return self._source
        # As tensors say it: cuda is one of several.
        checked, device = self._original.skeleton, torch.empty(0, device=resolve_device(self._device)).device
        return checked if checked.device == device else self._original.streamed(dtype=torch.float32, device=device)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The MoE layers."""
        if isinstance(self._source, nn.Module | StreamedModel):
            model: Any = self._source if isinstance(self._source, nn.Module) else self._source.model
            return discover(model.config, model)
        return self._original.anatomy

    @cached_property
    def stacks(self) -> dict[str, DiskStack]:
        """The MoE layers on disk, by prefix."""
        return find_stacks(self.checkpoint, self.anatomy, self._streamed.names)

    @contextmanager
    def open(self, layer: int) -> Iterator[Experts]:
        """Give the experts of a decoder layer, float32 when they come from disk.

        Where they take more together than working on them may, they stay there, and are read when they are asked for.
        """
        moe = self.anatomy.layers[layer]
        if isinstance(self._source, nn.Module):
            yield Experts(self._source.get_submodule(moe.experts), self._batch_memory)
            return
        module = self._streamed.model.get_submodule(moe.experts)
        stack = next(stack for stack in self.stacks.values() if stack.index == layer)
        apart = StoredExperts(self._streamed, moe.experts, stack, self._batch_memory)
        nbytes = sum(4 * parameter.numel() for parameter in module.parameters())
        if nbytes > apart.working_nbytes:
            yield apart
            return
        with self._streamed.loaded(moe.experts):
            yield Experts(module, self._batch_memory)

    def correction(self, layer: int) -> torch.Tensor | None:
        """Return the correction bias of a decoder layer's router, float32 [E] on the CPU; None where it has none."""
        path = self.anatomy.layers[layer].correction
        if path is None:
            return None
        if isinstance(self._source, nn.Module):
            return tensors_of(self._source)[path].detach().flatten().float().cpu()
        # A checkpoint may leave out a bias of zeros.
        keys = [key for key, name in self._streamed.names.items() if name == path]
        return self.checkpoint.numbers[keys[0]].read().flatten().float() if keys else None

    def norms(self, prefix: str) -> torch.Tensor:
        """Return the Frobenius norm of each expert of a layer on disk, float64 [E]: for layers that no text reaches."""
        stack = self.stacks[prefix]
        square = torch.zeros(stack.num_experts, dtype=torch.float64)
        for name, expert in stack.experts.items():
            square[expert] += self.checkpoint.numbers[name].read().float().square().sum(dtype=torch.float64)
        for name in stack.fused:
            square += self.checkpoint.numbers[name].read().float().square().flatten(1).sum(1, dtype=torch.float64)
        return square.sqrt()
