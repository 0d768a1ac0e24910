"""The experts module of a compressed layer: slots in, rows of the pool and other answers out.

It is the family's own class with a slot map in front, so the family's activation, layout and every experts
implementation (eager, grouped, batched) keep working. Shapes: T tokens, K slots of a token, P pairs, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moetailor.answers import Call, SlotMap
from moetailor.answers.products import Pairs, grouped, joined_gates, runs_plain
from moetailor.checkpoint.devices import runs_kernels
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import DTYPE_NAMES, DTYPES
from moetailor.checkpoint.storage import Storage, TensorSpec, find_storage


class CompressedExperts(nn.Module):
    """What a compressed layer adds to its family's experts class; see `reshape.compressed_class`.

    Attributes:
        slots: the map, as config.json has it.
        added: the tensors that answers have beside the pool, by name; each is stored as parameters where it can train,
            else as buffers, under the names that `TensorSpec.parts` gives.
        lenders: experts modules of other layers that answer here, by decoder layer; not submodules.
        instead: runs in place of everything here when it is set: annealing, while the originals are still mixed in.
        slot_map: row of the pool of each slot whose row is all, -1 for others, int32 [slots].
        slot_scale: factor on each slot's gate, float32 [slots]; absent when all are 1.
    """

    slots: SlotMap
    added: Mapping[str, TensorSpec]
    lenders: Mapping[int, Any]
    instead: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    down_proj: nn.Parameter
    slot_map: torch.Tensor
    slot_scale: torch.Tensor

    def forward(self, hidden_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Return the layer's routed output, [T, D].

        Args:
            hidden_TD: input of the experts.
            slot_TK: slots that the router chose.
            gate_TK: their gates.
        """
        if self.instead is not None:
            return self.instead(hidden_TD, slot_TK, gate_TK)
        if self.slots.scales is not None:
            gate_TK = gate_TK * self.slot_scale[slot_TK].to(gate_TK.dtype)
        if self.slots.plain:
            return self.rows(hidden_TD, self.slot_map[slot_TK].long(), gate_TK)
        call = Call(hidden_TD, slot_TK, gate_TK, len(self.slots.answers))
        # Sums are kept in float32 at least, as the grouped and batched implementations do.
        out_TD = torch.zeros_like(hidden_TD, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        # Only live pairs reach a matrix product: each becomes a token of its own with one expert.
        if self.slots.plain_pool and len(pairs := self._pairs(call)):
            out_TD = pairs.added(out_TD, self._rows(hidden_TD[pairs.token], pairs))
        for kind in self.slots.kinds:
            out_TD = kind.run(self, call, out_TD)
        return out_TD.to(hidden_TD.dtype)

    def _pairs(self, call: Call) -> Pairs:
        """Return the pairs of a token and a row of the pool."""
        if call.listed is not None:
            gates = call.gates(self.slots.pool_numbers)
            return Pairs.listed(gates, gates.values(), call.gate_TK.dtype)
        row_TK, gate_TK = call.of_slots(self.slot_map), call.gate_TK
        return Pairs.of(*(joined_gates(row_TK, gate_TK) if self.slots.shared else (row_TK, gate_TK)))

    def _rows(self, hidden_PD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return what rows of the pool give pairs, gates included, [P, D]."""
        experts = Experts(self)
        both = (getattr(self, name) for name in (experts.first, "down_proj"))
        if experts.transposed or not all(runs_plain(hidden_PD, each) for each in both):
            return self.rows(hidden_PD, pairs.number[:, None], pairs.gate)

        def given(name: str, inputs: torch.Tensor) -> torch.Tensor:
            return grouped(inputs, getattr(self, name), pairs.number, getattr(self, f"{name}_bias", None))

        return given("down_proj", experts.activated_together(given(experts.first, hidden_PD))) * pairs.gate

    def rows(self, hidden_TD: torch.Tensor, row_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """Run rows of the pool by the family's own forward, [T, D]."""
        return super().forward(hidden_TD, row_TK, gate_TK)

    @torch.no_grad()
    def weights(self, slot: int) -> dict[str, torch.Tensor]:
        """Return the matrices and biases, in float32, of an expert that gives what a slot gives, its scale included."""
        answer, experts = self.slots.answers[slot], Experts(self)
        given = experts.expert(self.slots.pool_rows[slot]) if answer is None else answer.weights(self, slot)
        scale = 1.0 if self.slots.scales is None else self.slots.scales[slot]
        return {name: part.float() * (scale if name.startswith("down") else 1.0) for name, part in given.items()}

    def tensor(self, name: str, rows: torch.Tensor | slice | None = None) -> torch.Tensor:
        """Return the numbers of one of the added tensors, or of some of its rows."""
        storage, parts = self._parts(name, rows)
        return storage.decode(parts, self.added[name].shape)

    def product(self, name: str, x_nPI: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return x W^T for some of the matrices of one of the added tensors and a few inputs of each, [n, P, O]."""
        storage, parts = self._parts(name, rows)
        return storage.product(x_nPI, parts, self.added[name].shape)

    def picked(self, counts: Mapping[str, int], x_PI: torch.Tensor, number_P: torch.Tensor) -> torch.Tensor:
        """Return x W^T of each input with a matrix of the added tensors that are in few bits, float32 [P, O].

        Args:
            counts: how many inputs meet matrices of each tensor, in their order; where kernels run there is one tensor.
            x_PI: inputs, those of one matrix next to each other.
            number_P: that of each in its tensor; zeros come of negative ones where kernels run.
        """
        given: Any = [(*self._parts(name, None), self.added[name].shape, count) for name, count in counts.items()]
        if runs_kernels(x_PI):
            ((storage, parts, shape, _),) = given
            return storage.picked(x_PI, number_P, parts, shape)
        from moetailor.checkpoint.storage import compiled  # numba takes half a second

        return compiled.products(given, x_PI, number_P.numpy())

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Return the stored tensors of one of the added tensors by their suffixes."""
        return self._parts(name, None)[1]

    def _parts(self, name: str, rows: torch.Tensor | slice | None) -> tuple[Storage, dict[str, torch.Tensor]]:
        storage, suffixes = self._storages[name]
        every = {suffix: getattr(self, name + suffix) for suffix in suffixes}
        return storage, every if rows is None else {suffix: part[rows] for suffix, part in every.items()}

    def add_tensors(self, added: Mapping[str, TensorSpec]) -> None:
        """Make room for the tensors of the answers, empty, on the device and in the dtype of the weights."""
        self.added = dict(added)
        ways = {name: find_storage(spec.storage) for name, spec in added.items()}
        # What each product asks for.
        self._storages = {name: (way, tuple(way.parts(added[name].shape, "F32"))) for name, way in ways.items()}
        weight = self.down_proj
        for name, spec in self.added.items():
            trains = ways[name].trains
            for part, (dtype, shape) in spec.parts(name, DTYPE_NAMES[weight.dtype]).items():
                empty = torch.empty(shape, dtype=DTYPES[dtype], device=weight.device)
                if trains:
                    parameter = nn.Parameter(empty, requires_grad=weight.requires_grad and spec.trainable)
                    self.register_parameter(part, parameter)
                else:
                    self.register_buffer(part, empty)

    def fill_map(self) -> None:
        """Compute what follows from the map, where the layer runs: no file holds it."""
        for name in ("plain", "plain_pool", "packed", "by_kind", "in_bits"):
            getattr(self.slots, name)  # kept there: no graph that is traced can compute them
        with torch.device("cpu"):  # transformers loads models under the meta device, where nothing can be computed
            buffers = self.slots.buffers()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to(self._device), persistent=False)
        for spec in self.added.values() if torch.device(self._device).type != "meta" else ():
            find_storage(spec.storage).ready(self._device)
        for name, buffer in list(self.named_buffers(recurse=False)):
            if not buffer.numel() and name not in buffers:  # parameters without rows
                dtype = self._stored.dtype if self._stored.is_floating_point() else buffer.dtype
                empty = torch.empty(buffer.shape, dtype=dtype, device=self._device)
                self.register_buffer(name, empty, persistent=False)

    @property
    def _stored(self) -> torch.Tensor:
        """A weight of the layer, wherever it is stored; one of its dtype where there is one."""
        if len(self.down_proj):
            return self.down_proj
        parts = [getattr(self, part) for name, spec in self.added.items() for part in spec.parts(name, "F32")]
        return next((part for part in parts if part.is_floating_point()), [*parts, self.down_proj][0])

    @property
    def _device(self) -> Any:
        """Where the layer runs: accelerate keeps offloaded weights elsewhere, and says so in its hook."""
        hook = getattr(self, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        found = (getattr(each, "execution_device", None) for each in hooks if self._stored.is_meta)
        return next((device for device in found if device is not None), self._stored.device)
