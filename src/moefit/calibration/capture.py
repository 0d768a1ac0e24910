"""The one hook: what the router decided and what each chosen expert gave, taken while the layer runs.

Inside the hook the experts module is called with every routed pair as a token of its own, its single expert and a gate
of one: the result is each expert's raw output, by the family's own code and kernels, at the cost of one normal run.
Gating and summing are done here afterwards, so nothing is computed twice and no routing is recomputed.

Shapes: T tokens, K experts of a token, E experts, R = T x K routed pairs, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moefit.checkpoint.anatomy import MoELayer
from moefit.errors import CalibrationError


@dataclass(kw_only=True)
class Captured:
    """One run of one MoE layer.

    Attributes:
        hidden: input of the experts, [T, D].
        logits: router logits, [T, E].
        index: chosen experts, [T, K].
        gate: their gates as the model used them, [T, K].
        token: token of each routed pair, sorted by expert, [R].
        expert: expert of each routed pair, ascending, [R].
        pair_gate: gate of each routed pair, [R].
        output: raw expert output of each routed pair, [R, D].
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    index: torch.Tensor
    gate: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    pair_gate: torch.Tensor
    output: torch.Tensor


@contextmanager
def captured(model: nn.Module, layer: MoELayer, receive: Callable[[Captured], None]) -> Iterator[None]:
    """Call `receive` with each run of one MoE layer while the context lasts.

    Args:
        model: the model, with this layer's weights in memory.
        layer: which layer.
        receive: gets what was captured, before the layer's output is used.
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
    inner, own = experts.forward, "forward" in vars(experts)

    def run(hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        index_TK = index_TK.long()
        expert_R, order_R = torch.sort(index_TK.reshape(-1), stable=True)
        token_R = order_R // index_TK.shape[1]
        gate_R = weight_TK.reshape(-1)[order_R]
        output_RD = inner(hidden_TD[token_R], expert_R[:, None], torch.ones_like(gate_R)[:, None])
        receive(
            Captured(
                hidden=hidden_TD,
                logits=logits[0],
                index=index_TK,
                gate=weight_TK,
                token=token_R,
                expert=expert_R,
                pair_gate=gate_R,
                output=output_RD,
            )
        )
        # y_t = sum over the chosen experts of g f(x_t)
        gated_RD = output_RD * gate_R[:, None].to(output_RD.dtype)
        summed = torch.empty_like(gated_RD)
        summed[order_R] = gated_RD
        return summed.view(*index_TK.shape, -1).sum(1).to(hidden_TD.dtype)

    handle = router.register_forward_hook(keep_logits)
    experts.forward = run
    try:
        yield
    finally:
        handle.remove()
        if own:
            experts.forward = inner
        else:
            del experts.forward
