"""The two layers that stand in place of vLLM's own: a router with a row for each slot, and what answers behind it.

Shapes: T tokens, K slots of a token, D model width, F intermediate size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.platforms import current_platform

from moetailor_vllm.answers import Answers, Arrivals
from moetailor_vllm.config import AllArrived, MoetailorConfig, current_config, slots_of
from moetailor_vllm.stand_ins import Expert
from moetailor_vllm.stored import Rank


@PluggableLayer.register_oot(name="GateLinear")
class SlotGate(GateLinear):
    """A router with a row for each slot that is left."""

    _cut: tuple[int, int] | None = None

    def __init__(self, input_size: int, output_size: int, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        config, given = current_config(), output_size
        slots = slots_of(config, prefix)
        if slots:
            output_size = len(slots.rows)
        if isinstance(config, MoetailorConfig):
            kwargs["quant_config"] = kwargs.get("quant_config") or config
        super().__init__(input_size, output_size, *args, prefix=prefix, **kwargs)
        if slots:
            self._cut = given, output_size

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Cut what models hang onto the router later to its slots: correction biases."""
        if self._cut and param is not None and param.shape == self._cut[:1]:
            param = nn.Parameter(torch.full_like(param[: self._cut[1]], torch.nan), requires_grad=False)
        super().register_parameter(name, param)


@PluggableLayer.register_oot(name="RoutedExperts")
class SlotExperts(RoutedExperts):
    """Routed experts with a pool of other rows than the router has slots, and what answers for the rest."""

    slotted = True
    live = False
    # Of a layer that stays whole only what must arrive is known; of other formats' layers nothing.
    answers: Answers | None
    whole: Arrivals | None

    def __init__(
        self,
        layer_name: str,
        params_dtype: torch.dtype,
        moe_config: FusedMoEConfig,
        quant_config: Any,
        *,
        expert_map_manager: ExpertMapManager,
        **kwargs: Any,
    ) -> None:
        slots = slots_of(quant_config, layer_name)
        if slots is None:
            super().__init__(
                layer_name, params_dtype, moe_config, quant_config, expert_map_manager=expert_map_manager, **kwargs
            )
            self.answers = None
            self.whole = Arrivals(layer_name) if isinstance(quant_config, MoetailorConfig) else None
            if self.whole is not None:
                self.expect(self.whole, moe_config.num_logical_experts, moe_config.hidden_dim)
            return
        refuse(layer_name, moe_config, expert_map_manager, kwargs)
        # A kernel has one row at least: where all experts are in few bits, of zeros.
        pool = max(len(slots.pool), 1)
        width, inner = moe_config.hidden_dim, moe_config.intermediate_size
        if (bias := kwargs.get("e_score_correction_bias")) is not None:  # cut where it hangs on the router
            bias.data = bias.data.new_full((len(slots.rows),), torch.nan)
        moe_config = copy.copy(moe_config)
        moe_config.num_experts = moe_config.num_local_experts = moe_config.num_logical_experts = pool
        manager = ExpertMapManager(
            max_num_batched_tokens=expert_map_manager.max_num_batched_tokens,
            top_k=expert_map_manager.top_k,
            global_num_experts=pool,
            num_redundant_experts=0,
            num_expert_group=None,
            moe_parallel_config=expert_map_manager.moe_parallel_config,
            placement_strategy=expert_map_manager.placement_strategy,
            enable_eplb=False,
        )
        super().__init__(layer_name, params_dtype, moe_config, quant_config, expert_map_manager=manager, **kwargs)
        if self.quant_method.is_monolithic:
            raise NotImplementedError(
                f"{layer_name}: {type(self.quant_method).__name__} routes inside its kernel, where slots cannot be "
                "mapped; choose another one with --moe-backend"
            )
        # Kernels of CPUs are in no graph, so they need not run what no slot asks for.
        self.live = current_platform.is_cpu() and not self.quant_method.mk_can_overlap_shared_experts
        self.number = next(NUMBERS)
        LAYERS[self.number] = self
        expert = Expert(
            width=width,
            inner=inner,
            dtype=params_dtype,
            activated=self.activated,
            gated=moe_config.is_act_and_mul,
            biased=moe_config.has_bias,
            live=self.live,
            rank=Rank(moe_config.moe_parallel_config.tp_rank, moe_config.moe_parallel_config.tp_size),
        )
        self.answers, self.whole = Answers(slots, expert, layer_name), None
        self.swiglu = SwigluOAIAndMul()  # this one is no operator of every platform
        self.expect(self.answers, len(slots.pool), width)
        if not slots.pool:
            for weight in self.parameters(recurse=False):
                if weight is not bias:
                    weight.data.zero_()

    def expect(self, arrivals: Arrivals, rows: int, width: int) -> None:
        """Note which weights of experts must arrive.

        Args:
            arrivals: where to note it.
            rows: experts.
            width: of the model.
        """
        arrivals.quant_method = AllArrived()
        shards = ("w1", "w3", "w2") if self.moe_config.is_act_and_mul else ("w1", "w2")
        arrivals.wanted |= {f"{shard} of expert {row}" for row in range(rows) for shard in shards}

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> bool | None:  # type: ignore[override]
        """Take an expert's weight, as vLLM does, and note that it came."""
        names = dict(zip(("weight_name", "shard_id", "expert_id"), args, strict=False)) | kwargs
        if (arrivals := self.answers or self.whole) is not None:
            arrivals.note(f"{names['shard_id']} of expert {names['expert_id']}")
        return super().weight_loader(param, loaded_weight, *args, **kwargs)

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Take the stand-ins' tensors, and leave the pool's to vLLM.

        Raises:
            ValueError: a tensor is neither, or not of the shape that the slot map says.
        """
        answers = self.answers
        if answers is None:
            yield from super().load_weights(weights)
            return
        mine: list[str] = []

        def pool() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                before, name = answers.arrivals, name.removeprefix("routed_experts.")
                if name in answers.stored:
                    answers.load(name, tensor)
                    mine.append(f"answers.{name}")
                else:
                    yield name, tensor
                if answers.arrivals == before:
                    raise ValueError(f"moetailor-vllm: {self.layer_name}.{name} is none of the layer's tensors")

        yield from super().load_weights(pool())
        yield from mine

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        """Return what rows of the pool give, by vLLM's kernel, and stand-ins; [T, D], to be added up over ranks."""
        if self.answers is None:
            return super().forward_modular(x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        if self.live:
            return answered(x, topk_weights, topk_ids, self.number)
        return self.answer(x, topk_weights, topk_ids, shared_experts, shared_experts_input)

    def answer(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *shared: Any) -> torch.Tensor:
        """Return the same of a layer that has a map."""
        answers = self.answers
        assert answers is not None
        slot_TK = topk_ids.long()
        weight_TK = topk_weights.float() * answers.scale[slot_TK]
        row_TK, row_weight_TK = answers.rows(slot_TK, weight_TK)
        row_weight_TK, row_TK = row_weight_TK.to(topk_weights), row_TK.to(topk_ids)
        if self.live and not (live_TK := answers.row[slot_TK] >= 0).all():
            # Pairs that have a row, each as a token of its own that has no other.
            token_P, slot_P = live_TK.nonzero(as_tuple=True)
            out_TD = torch.zeros_like(x, dtype=torch.float32)
            if len(token_P):
                pair = token_P, slot_P
                out_PD = super().forward_modular(x[token_P], row_weight_TK[pair][:, None], row_TK[pair][:, None])
                out_TD.index_add_(0, token_P, out_PD.float())
        else:
            out_TD = super().forward_modular(x, row_weight_TK, row_TK, *shared)
        if answers.stand_ins:
            # Kernels may want wider rows than the model has.
            given_TD = answers.given(x[:, : answers.width], slot_TK, weight_TK)
            out_TD[:, : answers.width] += given_TD.to(out_TD.dtype)
        return out_TD.to(x.dtype)

    def activated(self, *projected: torch.Tensor) -> torch.Tensor:
        """Return what the down projection is applied to, [P, F], from what gate and up gave, by vLLM's own operator."""
        if self.activation == MoEActivation.SWIGLUOAI:
            return self.swiglu(torch.stack(projected, -1).flatten(-2))
        both, out = torch.cat(projected, -1), torch.empty_like(projected[0])
        config = ApplyMoEActivationConfig.from_configs(self.moe_config, self.quant_method.moe_quant_config)
        return apply_moe_activation(self.activation, out, both, activation_config=config)


# Layers with a map, by number, so that `answered` finds them.
LAYERS: WeakValueDictionary[int, SlotExperts] = WeakValueDictionary()
NUMBERS = count()


@torch.library.custom_op("moetailor_vllm::answered", mutates_args=())
def answered(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, number: int) -> torch.Tensor:
    """Return what a layer with a map gives, [T, D]; an operator of its own, as shapes in it follow from the routing.

    Args:
        x: tokens.
        topk_weights: weights of their slots.
        topk_ids: slots.
        number: of the layer.
    """
    return LAYERS[number].answer(x, topk_weights, topk_ids)


@answered.register_fake
def _(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(x)


def refuse(layer: str, config: FusedMoEConfig, manager: ExpertMapManager, more: dict[str, Any]) -> None:
    """Refuse what cannot be served, by name.

    Args:
        layer: path of the experts.
        config: of the layer.
        manager: of the layer.
        more: what else the layer is built with.

    Raises:
        NotImplementedError: see the message.
    """
    reasons = {
        "expert parallelism; use tensor parallelism": manager.use_ep,
        "load balancing of experts (EPLB)": config.moe_parallel_config.enable_eplb,
        "LoRA adapters": config.is_lora_enabled,
        "shared experts fused into the routed ones": manager.num_fused_shared_experts,
        "router weights on the experts' input": more.get("apply_router_weight_on_input"),
    }
    if named := [reason for reason, true in reasons.items() if true]:
        raise NotImplementedError(f"moetailor-vllm: {layer}: compressed layers are not served with {named[0]}")
