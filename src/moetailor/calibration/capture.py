"""The one hook: while a layer runs, it shows what the router decided and what each chosen expert gave.

Under the hook the experts module gets every routed pair as a token of its own, with one expert and a gate of one. So it
returns each expert's raw output, by the family's own code and kernels, and computes every pair once, as in a normal
run. Gates are applied and outputs are summed here afterwards; routing is not recomputed. The pairs run in portions, of
whole experts where these are small enough: what lies between two products then stays in the processor's cache, and
memory does not grow with the batch.

Shapes: T tokens, K experts of a token, E experts, R = T x K routed pairs (or a portion of them), D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from moetailor.checkpoint.anatomy import MoELayer
from moetailor.errors import CalibrationError

# Bytes of a portion's outputs: on the CPU what its cache holds, elsewhere what keeps the device busy.
PORTION_CPU, PORTION_DEVICE = 8 * 2**20, 512 * 2**20


@dataclass(kw_only=True)
class Routed:
    """The tokens of one run of one MoE layer.

    Attributes:
        hidden: input of the experts, [T, D].
        logits: router logits, [T, E].
        index: chosen experts, [T, K].
        gate: their gates as the model used them, [T, K].
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    index: torch.Tensor
    gate: torch.Tensor


@dataclass(kw_only=True)
class Pairs:
    """A portion of the routed pairs of one run.

    Attributes:
        token: token of each pair, [R].
        expert: expert of each pair, ascending, [R].
        gate: gate of each pair, [R].
        output: raw expert output of each pair, [R, D].
    """

    token: torch.Tensor
    expert: torch.Tensor
    gate: torch.Tensor
    output: torch.Tensor


class Receiver(Protocol):
    """What the hook shows the runs of a layer to."""

    def tokens(self, run: Routed) -> None:
        """Get the tokens of a run, before its pairs."""

    def pairs(self, run: Pairs) -> None:
        """Get a portion of the run's pairs."""


@contextmanager
def captured(
    model: nn.Module,
    layer: MoELayer,
    receiver: Receiver | None,
    instead: Callable[[], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Show a receiver each run of one MoE layer while the context lasts.

    Args:
        model: the model, with this layer's weights in memory.
        layer: which layer.
        receiver: gets the tokens and pairs of each run; without one the layer runs in the same way, so that what it
            gives is the same to the bit.
        instead: returns what the experts get in place of the layer's inputs, [T, D]; the router gets the layer's.
    """
    router, experts = model.get_submodule(layer.router), model.get_submodule(layer.experts)
    logits: list[torch.Tensor] = []

    def keep_logits(module: nn.Module, args: Any, output: Any) -> None:
        # Releases of transformers order the router's outputs differently; the logits have one number a slot.
        parts = output if isinstance(output, tuple) else (output,)
        wide = [part for part in parts if part.shape[-1] == layer.num_experts and part.is_floating_point()]
        if not wide:
            raise CalibrationError(
                f"{layer.router}: returned no logits for {layer.num_experts} experts; this family is not supported"
            )
        logits[:] = [wide[0].reshape(-1, layer.num_experts)]

    # The instance's own `forward` is kept underneath: it may carry accelerate's hooks, and the experts implementation
    # the user chose.
    inner = experts.forward

    def run(hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        index_TK = index_TK.long()
        expert_R, order_R = torch.sort(index_TK.reshape(-1), stable=True)
        token_R = order_R // index_TK.shape[1]
        gate_R = weight_TK.reshape(-1)[order_R]
        if receiver is not None:
            receiver.tokens(Routed(hidden=hidden_TD, logits=logits[0], index=index_TK, gate=weight_TK))
        seen_TD = hidden_TD if instead is None else instead()
        # y_t = sum over the chosen experts of g f(x_t), in float32 at least
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        summed_TD = hidden_TD.new_zeros(len(hidden_TD), layer.width, dtype=wide)
        limit = PORTION_CPU if hidden_TD.device.type == "cpu" else PORTION_DEVICE
        for part in portions(expert_R, max(limit // (layer.width * hidden_TD.element_size()), 1)):
            token, expert, gate = token_R[part], expert_R[part], gate_R[part]
            output = inner(seen_TD[token], expert[:, None], torch.ones_like(gate)[:, None])
            if receiver is not None:
                receiver.pairs(Pairs(token=token, expert=expert, gate=gate, output=output))
            _add_rows(summed_TD, token, output * gate[:, None].to(output.dtype))
        return summed_TD.to(hidden_TD.dtype)

    handle = router.register_forward_hook(keep_logits)
    try:
        with replaced_forward(experts, run):
            yield
    finally:
        handle.remove()


@contextmanager
def silenced(model: nn.Module, layer: MoELayer) -> Iterator[None]:
    """Make the routed experts of one MoE layer give zeros while the context lasts."""

    def nothing(hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        return hidden_TD.new_zeros(len(hidden_TD), layer.width)

    with replaced_forward(model.get_submodule(layer.experts), nothing):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Replace a module's forward on the instance while the context lasts."""
    before, own = module.forward, "forward" in vars(module)
    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward


def portions(expert_R: torch.Tensor, most: int) -> Iterator[slice]:
    """Cut routed pairs, sorted by expert, into portions of at most `most`; experts with no more pairs stay whole."""
    start = stop = 0
    for count in torch.bincount(expert_R).tolist():
        if start < stop and stop - start + count > most:
            yield slice(start, stop)
            start = stop
        stop += count
        while stop - start > most:
            yield slice(start, start + most)
            start += most
    if start < stop:
        yield slice(start, stop)


def _add_rows(sum_TD: torch.Tensor, token_R: torch.Tensor, rows_RD: torch.Tensor) -> None:
    """Add each pair's row to the row of its token, in a fixed order."""
    if sum_TD.device.type == "cpu":
        sum_TD.index_add_(0, token_R, rows_RD.to(sum_TD.dtype))
    else:
        # On other devices `index_add_` adds in any order; this sorts first.
        sum_TD.index_put_((token_R,), rows_RD.to(sum_TD.dtype), accumulate=True)
