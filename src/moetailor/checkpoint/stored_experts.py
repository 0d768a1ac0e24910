"""Experts that stay on disk: those that are asked for are read then, so that no layer need fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moetailor.checkpoint.coded import Coded
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import LazyTensor, TensorInfo
from moetailor.checkpoint.layout import DiskStack
from moetailor.checkpoint.loader import StreamedModel


class StoredExperts(Experts):
    """The experts of one layer of a checkpoint, as `Experts`.

    Args:
        streamed: the model.
        path: the experts module in it.
        stack: how they lie.
        working_nbytes: see `Experts`.
    """

    def __init__(self, streamed: StreamedModel, path: str, stack: DiskStack, working_nbytes: int | None = None) -> None:
        super().__init__(streamed.model.get_submodule(path), working_nbytes)
        self._streamed, self._path, self._stack = streamed, path, stack

    @property
    def device(self) -> torch.device:
        """Where they are read to."""
        return self._streamed.device

    def rows(self, experts: Sequence[int] | slice) -> dict[str, torch.Tensor]:
        """Read the rows of the family's parameters that belong to some experts."""
        every = range(self._stack.num_experts)
        numbers = list(every[experts]) if isinstance(experts, slice) else list(experts)
        some, known = sorted(set(numbers)), self._streamed.checkpoint.numbers
        sources = {key: LazyTensor(known[key]) for key, expert in self._stack.experts.items() if expert in some}
        sources |= {key: _Rows(known[key], axis, some) for key, axis in self._stack.fused.items()}
        found = self._streamed.some(self._path, sources, len(some))
        place = torch.tensor([some.index(number) for number in numbers], device=self.device)
        return found if numbers == some else {name: rows[place] for name, rows in found.items()}


class _Rows(LazyTensor):
    """Some rows of a tensor that has one for each expert."""

    def __init__(self, info: TensorInfo | Coded, axis: int, some: Sequence[int]) -> None:
        super().__init__(info)
        self._axis, self._some = axis, some

    def __getitem__(self, key: object) -> torch.Tensor:
        return _read_rows(self.info, self._axis, self._some)[key]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        """Return the shape of these rows."""
        shape = list(self.info.shape)
        shape[self._axis] = len(self._some)
        return shape


def _read_rows(info: TensorInfo | Coded, axis: int, some: Sequence[int]) -> torch.Tensor:
    if isinstance(info, Coded):
        used = {part: own for part, own in info.parts.items() if part not in info.way.beside}
        parts = {part: _read_rows(own, axis, some) for part, own in used.items()}
        return info.way.decode(parts, (*info.shape[:axis], len(some), *info.shape[axis + 1 :]), info.dtype)
    if axis:
        return info.read().index_select(axis, torch.tensor(some))
    step, shape = info.nbytes // info.shape[0], (1, *info.shape[1:])
    rows = (replace(info, shape=shape, offset=info.offset + row * step, nbytes=step) for row in some)
    return torch.cat([row.read() for row in rows])
