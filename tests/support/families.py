"""Tiny random checkpoints of every family: the proof that a family costs nothing.

`FAMILIES` holds what follows the common shape: one experts module called with (hidden, index, weights), one router,
decoder layers that pass on hidden states alone. `REFUSED` holds mixtures of experts that do not, each with its reason.
An entry is the smallest config that keeps the nature of its family: dense first layers, groups, shared experts, sliding
or linear attention, multipliers. Expert counts, widths and top-k differ among entries on purpose.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: the keyword arguments of its transformers config, and what is odd about it."""

    config: dict[str, Any]
    why: str = ""
    """The reason for a refusal."""
    since: str = "5.21"
    """The older of the two tested transformers releases that has the family in this shape."""


def _family(model_type: str, *, why: str = "", since: str = "5.21", **config: Any) -> Family:
    """Add what the tiny configs share; `None` keeps a shared field out."""
    base: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    fields = {key: value for key, value in (base | config).items() if value is not None}
    return Family(config={"model_type": model_type} | fields, why=why, since=since)


# Latent attention of the DeepSeek line, and its sparse form whose indexer keeps fewer tokens than the tests feed.
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DSA: dict[str, Any] = _MLA | {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
# Gated delta net of the Qwen line.
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
_GRANITE: dict[str, Any] = {
    "num_local_experts": 8,
    "intermediate_size": 16,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "tie_word_embeddings": True,
}
# Experts, in the two commonest spellings of their count.
_MOE: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 16}
_ROUTED: dict[str, Any] = {"n_routed_experts": 8, "moe_intermediate_size": 16}
# A dense first layer, in the two ways that configs say it.
_FIRST_K: dict[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_MLP_TYPES: dict[str, Any] = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1}
_SLIDING: dict[str, Any] = {"sliding_window": 8, "head_dim": 8}
_INKLING: dict[str, Any] = {
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "rel_extent": 32,
    "unpadded_vocab_size": 120,
}
_ALTERNATE = ["full_attention", "sliding_attention", "full_attention"]

_ALL: dict[str, Family] = {
    "afmoe": _family(
        "afmoe",
        num_hidden_layers=3,
        num_dense_layers=1,
        num_shared_experts=1,
        global_attn_every_n_layers=2,
        mup_enabled=True,
        **_MOE,
        **_SLIDING,
    ),
    "aria_text": _family(
        "aria_text", since="5.23", moe_num_experts=8, moe_topk=2, num_experts_per_tok=None, intermediate_size=16
    ),
    "axk1": _family("axk1", **_ROUTED, **_MLA, **_MLP_TYPES, **_GROUPS),
    "axk2": _family("axk2", gated_norm_rank=4, **_ROUTED, **_DSA, **_MLP_TYPES),
    "bailing_hybrid": _family(
        "bailing_hybrid",
        since="5.23",
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        head_dim=8,
        **_MOE,
        **_MLA,
        **_MLP_TYPES,
        **_GROUPS,
    ),
    "beam": _family("beam", since="5.23", **_MOE, **_MLP_TYPES, **_GROUPS, **_SLIDING),
    "cohere2_moe": _family(
        "cohere2_moe",
        num_experts=8,
        intermediate_size=16,
        num_shared_experts=1,
        prefix_dense_intermediate_size=48,
        sliding_window_pattern=2,
        logit_scale=1.0,
        **_MLP_TYPES,
        **_SLIDING,
    ),
    "deepseek_v2": _family(
        "deepseek_v2",
        n_routed_experts=12,
        moe_intermediate_size=16,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        **_MLA,
        **_FIRST_K,
    ),
    "deepseek_v3": _family(
        "deepseek_v3", n_routed_experts=12, moe_intermediate_size=16, n_group=3, topk_group=2, **_MLA, **_FIRST_K
    ),
    "deepseek_v32": _family("deepseek_v32", **_ROUTED, **_DSA, **_MLP_TYPES, **_GROUPS),
    "dots1": _family(
        "dots1",
        n_routed_experts=12,
        n_shared_experts=2,
        moe_intermediate_size=16,
        num_experts_per_tok=3,
        max_window_layers=2,
        **_FIRST_K,
        **_SLIDING,
    ),
    "dots3_note_text": _family(
        "dots3_note_text",
        since="5.23",
        layer_types=["indexed_attention"] * 3,
        shared_experts_intermediate_size=16,
        head_dim=16,
        **_ROUTED,
        **_DSA,
        **_MLP_TYPES,
    ),
    "ernie4_5_moe": _family(
        "ernie4_5_moe",
        num_hidden_layers=3,
        moe_num_experts=8,
        moe_k=2,
        num_experts_per_tok=None,
        moe_intermediate_size=16,
    ),
    "exaone_moe": _family("exaone_moe", sliding_window_pattern=2, **_MOE, **_FIRST_K, **_GROUPS, **_SLIDING),
    "flex_olmo": _family("flex_olmo", num_experts=6, intermediate_size=16, norm_topk_prob=True),
    "flint": _family(
        "flint",
        since="5.23",
        num_hidden_layers=3,
        mlp_only_layers=[0],
        layer_types=_ALTERNATE,
        shared_expert_intermediate_size=16,
        **_MOE,
        **_SLIDING,
    ),
    "glm4_moe": _family("glm4_moe", head_dim=8, **_ROUTED, **_FIRST_K, **_GROUPS),
    "glm4_moe_lite": _family("glm4_moe_lite", norm_topk_prob=False, **_ROUTED, **_MLA, **_MLP_TYPES),
    "gpt_oss": _family("gpt_oss", num_local_experts=8, intermediate_size=16, **_SLIDING),
    "granitemoe": _family("granitemoe", **_GRANITE),
    "granitemoe_swa": _family("granitemoe_swa", sliding_window=8, shared_intermediate_size=24, **_GRANITE),
    "granitemoehybrid": _family(
        "granitemoehybrid",
        layer_types=["linear_attention", "full_attention"],
        shared_intermediate_size=24,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
        **_GRANITE,
    ),
    "granitemoeshared": _family("granitemoeshared", shared_intermediate_size=24, **_GRANITE),
    "hunyuan_v1_moe": _family(
        "hunyuan_v1_moe", num_experts=8, moe_topk=2, num_experts_per_tok=None, intermediate_size=16, head_dim=8
    ),
    "hy_v3": _family("hy_v3", head_dim=8, **_MOE, **_MLP_TYPES),
    "jamba": _family(
        "jamba",
        num_hidden_layers=3,
        num_experts=8,
        intermediate_size=16,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=0,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "kimi_linear": _family(
        "kimi_linear",
        since="5.23",
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_head_dim=8,
        linear_num_heads=4,
        **_MOE,
        **_MLP_TYPES,
        **(_MLA | {"q_lora_rank": None}),
    ),
    "kolibri1": _family(
        "kolibri1",
        since="5.23",
        layer_types=["sliding_attention", "full_attention"],
        shared_expert_intermediate_size=16,
        **_MOE,
        **_SLIDING,
    ),
    "laguna": _family(
        "laguna", layer_types=_ALTERNATE, shared_expert_intermediate_size=16, **_MOE, **_MLP_TYPES, **_SLIDING
    ),
    "lfm2_moe": _family(
        "lfm2_moe", num_hidden_layers=3, num_dense_layers=1, layer_types=["conv", "conv", "full_attention"], **_MOE
    ),
    "mellum": _family("mellum", layer_types=_ALTERNATE, **_MOE, **_MLP_TYPES, **_SLIDING),
    "mimo_v2_flash": _family("mimo_v2_flash", sliding_window=8, head_dim=12, v_head_dim=8, **_ROUTED, **_MLP_TYPES),
    "minimax": _family(
        "minimax",
        num_local_experts=6,
        intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
        head_dim=8,
    ),
    "minimax_m2": _family("minimax_m2", num_local_experts=8, intermediate_size=16, head_dim=8),
    "minimax_m3_vl_text": _family(
        "minimax_m3_vl_text",
        num_local_experts=8,
        intermediate_size=16,
        dense_intermediate_size=48,
        shared_intermediate_size=16,
        head_dim=8,
        rotary_dim=4,
        layer_types=["full_attention", "minimax_m3_sparse", "full_attention"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        **_MLP_TYPES,
    ),
    "mixtral": _family("mixtral", num_local_experts=8, intermediate_size=16),
    "nemotron_h": _family(
        "nemotron_h",
        num_hidden_layers=None,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        moe_shared_expert_intermediate_size=24,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=8,
        head_dim=8,
        use_mamba_kernels=False,
        **_ROUTED,
        **_GROUPS,
    ),
    "nemotron_h_latent": _family(
        "nemotron_h",
        num_hidden_layers=None,
        layers_block_type=["moe", "full_attention", "moe"],
        moe_latent_size=24,
        moe_shared_expert_intermediate_size=24,
        head_dim=8,
        **_ROUTED,
    ),
    "olmoe": _family("olmoe", num_experts=8, intermediate_size=16),
    "phimoe": _family("phimoe", num_local_experts=8, intermediate_size=16),
    "qwen2_moe": _family("qwen2_moe", shared_expert_intermediate_size=24, **_MOE),
    "qwen3_5_moe_text": _family("qwen3_5_moe_text", shared_expert_intermediate_size=16, **_MOE, **_DELTA),
    "qwen3_moe": _family(
        "qwen3_moe",
        num_hidden_layers=3,
        mlp_only_layers=[0],
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        head_dim=8,
    ),
    "qwen3_next": _family("qwen3_next", shared_expert_intermediate_size=16, **_MOE, **_DELTA),
    "qwen4_exp_text": _family(
        "qwen4_exp_text",
        since="5.23",
        shared_expert_intermediate_size=16,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        **_MOE,
        **_DELTA,
    ),
    "solar_open": _family("solar_open", n_routed_experts=8, moe_intermediate_size=24, head_dim=8),
    "dbrx": Family(
        why="2-D expert weights [E * I, D], no router that returns the choice",
        config={
            "model_type": "dbrx",
            "vocab_size": 128,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "deepseek_v4": _family(
        "deepseek_v4",
        why="the first layers choose experts by token id",
        num_hidden_layers=3,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        intermediate_size=None,
        num_key_value_heads=1,
        head_dim=16,
        partial_rotary_factor=0.5,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=2,
        sliding_window=8,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        **_ROUTED,
    ),
    "gemma4_text": _family(
        "gemma4_text",
        why="no block holds router and experts; the router has a scale for each expert",
        top_k_experts=2,
        num_experts_per_tok=None,
        enable_moe_block=True,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        **_MOE,
        **_SLIDING,
    ),
    "glm_moe_dsa": _family("glm_moe_dsa", why="layers also pass on token choices", **_ROUTED, **_DSA, **_MLP_TYPES),
    "hy_v4": _family(
        "hy_v4",
        why="layers also pass on token choices",
        since="5.23",
        **_ROUTED,
        **_DSA,
        **_MLP_TYPES,
    ),
    "inkling2_text": _family(
        "inkling2_text",
        why="layers also read the outputs of earlier blocks",
        since="5.23",
        layer_types=["hybrid_sliding", "hybrid"],
        n_layers_per_attn_res_block=1,
        intermediate_size=None,
        **_ROUTED,
        **_INKLING,
    ),
    "inkling_text": _family(
        "inkling_text",
        why="the router also weighs the shared experts: rows beyond the experts, four return values",
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        logits_mup_width_multiplier=1.0,
        **_ROUTED,
        **_MLP_TYPES,
        **_INKLING,
    ),
    "jetmoe": _family(
        "jetmoe",
        why="attention has experts too; no experts module",
        num_local_experts=8,
        kv_channels=8,
        intermediate_size=16,
        num_attention_heads=None,
    ),
    "llama4_text": _family(
        "llama4_text",
        why="every expert runs on every token, scaled at its input",
        num_hidden_layers=3,
        moe_layers=[1, 2],
        num_local_experts=8,
        intermediate_size=16,
        intermediate_size_mlp=48,
        head_dim=8,
    ),
    "longcat_flash": _family(
        "longcat_flash",
        why="the router also chooses among zero-computation experts",
        num_hidden_layers=None,
        num_layers=2,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_topk=3,
        num_experts_per_tok=None,
        intermediate_size=None,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        head_dim=8,
        **_MLA,
    ),
    "zaya": _family(
        "zaya",
        why="the router has a class for skipping and reads the previous layer's router",
        num_experts=8,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        router_hidden_size=16,
        head_dim=8,
    ),
}
_PRESENT = {name: f for name, f in _ALL.items() if Version(transformers.__version__) >= Version(f.since)}

FAMILIES: dict[str, Family] = {name: family for name, family in _PRESENT.items() if not family.why}
"""What the installed transformers has and the common shape covers."""

REFUSED: dict[str, Family] = {name: family for name, family in _PRESENT.items() if family.why}
"""What must be refused with a reason, never compressed by guessing."""

_ROUTER = re.compile(r"\.(gate|router)\.")
_BIAS = re.compile(r"(^|[._])bias$")


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Make a fresh config of a family, with changes: config classes edit the lists that they are given."""
    return AutoConfig.for_model(**copy.deepcopy(_PRESENT[name].config | changes))


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a family's tiny model with random weights that make routing matter.

    Args:
        name: A key of `FAMILIES` or `REFUSED`.
        seed: Two calls with one seed give the same bits.
        changes: Fields of the config that are to be others.

    Returns:
        The model in float32 on the CPU, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32)
    _stir(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _stir(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Replace the zeros, ones and 0.02s of a fresh model: with them experts are near silent and routing near even."""

    def noise(like: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(like.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or _BIAS.search(name):  # norms, biases, decay rates keep their level
            parameter.add_(noise(parameter, 0.1))
        else:
            parameter.copy_(noise(parameter, 0.5 if _ROUTER.search(name) else 0.2))
    for name, buffer in model.named_buffers():
        if _BIAS.search(name):  # corrections of the router's scores
            buffer.copy_(noise(buffer, 0.1))
