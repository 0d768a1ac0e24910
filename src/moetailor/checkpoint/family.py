"""What a model family must declare because it cannot be discovered: a few spellings, and what is refused, by name.

Everything else (where the layers are, which tensors have a row for each expert) is found by `anatomy.discover`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from moetailor.errors import CheckpointError
from moetailor.schema import Few, Within

# Spellings of the number of routed experts in config.json; every one that is present is rewritten.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Spellings of the number of experts that a token is routed to.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
# Spellings of the number of groups of a group-limited router.
GROUPS = ("n_group", "num_expert_group")
GROUPS_USED = ("topk_group", "num_limited_groups")

# The name by which a config says that moetailor compressed the experts.
QUANT_METHOD = "moetailor"
# What says in a config that weights are not plain numbers: quantization_config, compression_config, quantization, ...
QUANTIZED = re.compile("quantiz|compression_config")
UNQUANTIZED = "not supported yet; give the bf16 or fp32 original"

# Routers whose probabilities are sigmoids of their logits; softmax everywhere else.
SIGMOID = frozenset(
    (
        "afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe flint "
        "glm4_moe glm4_moe_lite "
        "hy_v3 kimi_linear kolibri1 laguna lfm2_moe mimo_v2_flash minimax_m2 minimax_m3_vl_text nemotron_h solar_open"
    ).split()
)

# Families that break the common contract, each with what it does instead.
REFUSED = {
    "dbrx": "its experts lie in flat matrices that transformers does not run through the common interface",
    "jetmoe": "its attention has experts too, and neither kind runs through the common interface",
    "deepseek_v4": "some of its layers choose experts by a table of token ids",
    "glm_moe_dsa": "its decoder layers pass on more than hidden states",
    "hy_v4": "its decoder layers pass on more than hidden states",
    "inkling_text": "its router has rows for shared experts among those of the routed ones",
    "inkling2_text": "its decoder layers pass on more than hidden states",
    "zaya": "its router has one more class than experts and a state that passes from layer to layer",
    "llama4": "vision-wrapped, and its experts take inputs scaled by the router score instead of weighting outputs",
    "llama4_text": "its experts take inputs scaled by the router score instead of weighting outputs",
    "longcat_flash": "its router also chooses identity experts, which have no weights to compress",
    "gemma4": "vision-wrapped",
    "gemma4_text": "its router returns probabilities instead of logits and reads config.top_k_experts while running",
}


@dataclass(frozen=True)
class Groups:
    """How groups limit a router's choice.

    Attributes:
        count: groups of equal size; 1 where the router chooses freely.
        used: how many of them a token may use.
        least: slots that a group must have to be scored.
    """

    count: Annotated[Few, Within(1)] = 1
    used: Annotated[Few, Within(1)] = 1
    least: Annotated[Few, Within(1)] = 1


def check_family(config: Any) -> None:
    """Refuse, by name, what breaks the common contract.

    Args:
        config: a transformers config, or config.json.

    Raises:
        CheckpointError: a family of `REFUSED`, or a vision-wrapped model.
    """
    name = _get(config, "model_type")
    if isinstance(name, str) and name in REFUSED:
        raise CheckpointError(f"model type {name!r} is not supported: {REFUSED[name]}")
    wrapped = "text_config" in config if isinstance(config, dict) else config.get_text_config() is not config
    if wrapped:
        raise CheckpointError(f"model type {name!r} wraps a text model inside a multi-modal one: not supported yet")


def check_unquantized(config: Any) -> None:
    """Refuse a checkpoint whose weights are not plain numbers.

    Args:
        config: a transformers config, or config.json.

    Raises:
        CheckpointError: quantized weights, in any spelling, or a result of moetailor.
    """
    for name, entry in (config if isinstance(config, dict) else vars(config)).items():
        if entry and QUANTIZED.search(str(name)) and (isinstance(entry, dict) or hasattr(entry, "quant_method")):
            method = _get(entry, "quant_method") or _get(entry, "format") or name
            if method == QUANT_METHOD:
                raise CheckpointError("this checkpoint is already compressed by moetailor; give the original instead")
            raise CheckpointError(f"weights are quantized ({method}): {UNQUANTIZED}")
        if isinstance(entry, dict):
            check_unquantized(entry)


def expert_count_spellings(config: Any) -> list[str]:
    """Return the attributes of a config (object or dict) that hold the number of routed experts."""
    return [name for name in EXPERT_COUNTS if _get(config, name) is not None]


def top_k(config: Any) -> int:
    """Return how many experts a token is routed to.

    Raises:
        CheckpointError: no known spelling is present, or the number differs by layer.
    """
    for name in TOP_K:
        value = _get(config, name)
        if isinstance(value, int):
            return value
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]
        if value is not None:
            raise CheckpointError(f"config.json: {name} = {value!r}; a top-k that differs by layer is not supported")
    raise CheckpointError(f"config.json names no top-k (looked for {', '.join(TOP_K)})")


def group_limits(config: Any) -> Groups:
    """Return how groups limit the router's choice; `Groups()` where it is free."""
    # DeepSeek-V2 states groups even where its `greedy` choice ignores them.
    if _get(config, "topk_method") == "greedy":
        return Groups()
    count = next((value for name in GROUPS if isinstance(value := _get(config, name), int)), None)
    if count is None:
        return Groups()
    used = next((value for name in GROUPS_USED if isinstance(value := _get(config, name), int)), count)
    # DeepSeek-V2 scores a group by its best expert, all later families by the sum of its best two.
    least = 1 if _get(config, "model_type") == "deepseek_v2" else 2
    return Groups() if count == used == 1 else Groups(count=count, used=used, least=least)


def router_probabilities(model_type: str) -> str:
    """Return ``sigmoid`` or ``softmax``: how the family turns router logits into probabilities."""
    return "sigmoid" if model_type in SIGMOID else "softmax"


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
