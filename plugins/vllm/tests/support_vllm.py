"""A layer of random experts with one of every answer, as moetailor runs it and as the plug-in does."""

from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moetailor.answers import Answer, Constant, Linear, LowRank, Packed, SlotMap
from moetailor.checkpoint.experts import Experts
from moetailor.runtime.reshape import compressed_class
from moetailor_vllm.answers import Answers
from moetailor_vllm.slots import Slots
from moetailor_vllm.stand_ins import Expert
from moetailor_vllm.stored import ALONE, Rank

WIDTH, INNER, TOP_K = 32, 192, 3


def slot_map(experts: int, *slots: int | Answer | tuple[int, Packed], scaled: bool = False) -> SlotMap:
    """Return a map: for each slot a row of the pool, a row in few bits or another answer."""
    pairs = [
        slot if isinstance(slot, tuple) else (slot, None) if isinstance(slot, int) else (-1, slot) for slot in slots
    ]
    rows, answers = zip(*pairs, strict=True)
    scales = tuple(0.5 + 0.1 * n for n in range(len(rows))) if scaled else None
    return SlotMap(experts=experts, rows=rows, answers=answers, scales=scales)


def everything(*more: Any) -> SlotMap:
    """Return a map with a remap, scales, constants, linear maps of two ranks, low ranks over two bases, and more."""
    return slot_map(
        4,
        0,
        Constant(),
        1,
        Linear(2),
        1,
        LowRank(5, 3),
        LowRank(8),
        LowRank(5, 10),
        LowRank(8, 2),
        Constant(),
        Linear(5),
        *more,
        scaled=True,
    )


def moetailor_layer(slots: SlotMap, biased: bool = False, seed: int = 0) -> torch.nn.Module:
    """Return moetailor's experts module with random numbers, of a family with biases or of one without."""
    if biased:
        config: Any = GptOssConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=len(slots.plain_pool))
    else:
        config = Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=INNER, num_experts=len(slots.plain_pool))
    config._experts_implementation = "eager"
    family = GptOssExperts if biased else Qwen3MoeExperts
    module: Any = family(config)
    shape = Experts(module).shape
    module.__class__ = compressed_class(family)
    module.slots = slots
    generator = torch.Generator().manual_seed(seed)
    module.add_tensors(slots.tensors(shape))
    module.fill_map()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    for name, spec in module.added.items():
        numbers = torch.randn(spec.shape, generator=generator) * 0.3
        for part, stored in spec.encode(name, numbers, "F32").items():
            getattr(module, part).data.copy_(stored)
    return module


def served(slots: SlotMap, module: Any, rank: Rank = ALONE, *, live: bool = False) -> Answers:
    """Return the plug-in's answers of one rank with the tensors of moetailor's module."""
    expert = Expert(
        width=WIDTH,
        inner=INNER,
        dtype=torch.float32,
        activated=lambda *projected: Experts(module).activated(projected),
        biased=Experts(module).shape.biased,
        live=live,
        rank=rank,
    )
    answers = Answers(Slots.read(slots.to_json(), "layer 0"), expert, "experts")
    parts = [part for name, spec in module.added.items() for part in spec.parts(name, "F32")]
    for part in parts:
        answers.load(part, getattr(module, part).data)
    answers.check()
    return answers


def call(slots: SlotMap, tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs, slots and gates of some tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator)
    chosen = torch.rand(tokens, len(slots.rows), generator=generator).topk(TOP_K, 1).indices
    return x, chosen, torch.rand(tokens, TOP_K, generator=generator)


def pooled(module: Any, x_TD: torch.Tensor, row_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Return what rows of the pool give, token by token: what vLLM's kernel computes."""
    out = torch.zeros_like(x_TD)
    for token, (rows, weights) in enumerate(zip(row_TK.tolist(), weight_TK.tolist(), strict=True)):
        for row, weight in zip(rows, weights, strict=True):
            gate, up = (module.gate_up_proj[row] @ x_TD[token]).chunk(2)
            out[token] += weight * (module.down_proj[row] @ (F.silu(gate) * up))
    return out


def in_float64(module: Any, x_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
    """Return what the answers give, each slot of each token by itself in float64."""
    slots: SlotMap = module.slots
    constants, maps = list(slots.of(Constant)), slots.of(Linear)
    start = dict(zip(maps, accumulate((map.rank for map in maps.values()), initial=0), strict=False))

    def given(slot: int, x: torch.Tensor) -> torch.Tensor:
        scale = slots.scales[slot] if slots.scales else 1.0
        if slot in constants:
            return scale * module.tensor("constant")[constants.index(slot)].double()
        if slot in maps:
            rows = slice(start[slot], start[slot] + maps[slot].rank)
            inner, outer = (module.tensor(name)[rows].double() for name in ("linear_in", "linear_out"))
            return scale * (module.tensor("linear_constant")[list(maps).index(slot)] + outer.T @ (inner @ x))
        weights = {name: weight.double() for name, weight in module.weights(slot).items()}  # the scale included
        return weights["down"] @ (F.silu(weights["gate"] @ x) * (weights["up"] @ x))

    out = torch.zeros_like(x_TD, dtype=torch.float64)
    for token, (chosen, gates) in enumerate(zip(slot_TK.tolist(), gate_TK.tolist(), strict=True)):
        for slot, gate in zip(chosen, gates, strict=True):
            out[token] += gate * given(slot, x_TD[token].double())
    return out
