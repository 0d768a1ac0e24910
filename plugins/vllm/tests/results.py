"""Results of moetailor on tiny models of several families, and what transformers gives for them."""

import shutil
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.answers import Width
from moetailor.checkpoint.loader import quiet_transformers
from moetailor.planning.plan import Plan
from support.families import tiny_model
from support.serving import KINDS
from support.tiny import mixed_plan, token_batches

# vLLM's CPU kernels want widths of 32; attention wants heads of that size.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": SHAPE | {"intermediate_size": 32},
    "qwen2_moe": SHAPE | {"moe_intermediate_size": 32},
    "qwen3_moe": SHAPE | {"moe_intermediate_size": 32, "head_dim": 32},
    "glm4_moe": SHAPE
    | {"moe_intermediate_size": 32, "head_dim": 32, "n_shared_experts": 1, "routed_scaling_factor": 1.5},
    "gpt_oss": SHAPE | {"intermediate_size": 32, "head_dim": 32},
}
# Whose correction biases hang on the block in vLLM, not on the router.
BIASED = {"exaone_moe": SHAPE | {"moe_intermediate_size": 32, "head_dim": 32, "intermediate_size": 64}}
PROMPTS = np.array([[(a * i * i + b * i + c) % 120 + 4 for i in range(32)] for a, b, c in ((7, 3, 11), (5, 1, 99))])
TOKENS = 64
# Wide enough for groups and blocks of 128, of which vLLM has kernels.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "moe_intermediate_size": 128, "head_dim": 64}
WIDTHS = ("int4g32", "fp8b128", "mxfp4", "vq2/4", "8", "4", "nvfp4")


@cache
def calibrated(family: str, folder: Path) -> moetailor.Calibration:
    """Return the calibration of a family's tiny model, which lies in a folder; `NAME, wide`: of a wider one in
    bfloat16.
    """
    with quiet_transformers():
        name, _, wide = family.partition(", ")
        model = tiny_model(name, **(MODELS | BIASED)[name] | (WIDE if wide else {}))
        model.to(torch.bfloat16 if wide else torch.float32).save_pretrained(folder / family)
    text = token_batches(8, 48)
    return moetailor.calibrate(folder / family, folder / f"{family}-cal", text=text, residual=True, sensitivity=True)


@cache
def make(family: str, method: str, folder: Path) -> Path:
    """Return the folder of a result; see `by_hand` for `mixed`, `widths`, `one layer` and `int4g32`."""
    calibration, out = calibrated(family, folder), folder / f"{family}-{method.replace(', ', '-')}"
    plan, form = by_hand(calibration, family, method), "moetailor"
    if plan is None:
        plan, form = KINDS[method].plan(calibration), KINDS[method].format
    return moetailor.apply(plan, folder / family, out, calibration=calibration, format=form)


def packed(width: str, form: str, folder: Path) -> Path:
    """Return the folder of a wide model with fewer experts in few bits, in some format."""
    calibration = calibrated("qwen3_moe, wide", folder)
    plan = moetailor.make_plan(calibration, "reap", moetailor.Budget.parse(remove="25%"), width=Width.parse(width))
    out = folder / f"wide-{width}-{form}"
    return moetailor.apply(plan, folder / "qwen3_moe, wide", out, calibration=calibration, format=form)


def by_hand(calibration: moetailor.Calibration, family: str, method: str) -> Plan | None:
    """Return a plan that no method of `KINDS` makes; `mixed` is drops, remaps with scales, constants
    and linear maps in one layer, `widths` has every expert of a layer in another storage, `one layer` leaves all but
    the last as they are.
    """
    if method == "int4g32":
        return moetailor.make_plan(
            calibration,
            "quantize",
            moetailor.Budget.parse(remove="0%"),
            parameters={"bits": 4, "codes": "int", "group": 32},
        )
    if method == "one layer":
        plan = KINDS["mone"].plan(calibration)
        return replace(plan, layers=dict([*plan.layers.items()][-1:]))
    if method == "widths":
        plan = KINDS["quantize"].plan(calibration)
        layers = {
            prefix: replace(layer, widths=dict(zip(layer.pool, cycle(map(Width.parse, WIDTHS)), strict=False)))
            for prefix, layer in plan.layers.items()
        }
        return replace(plan, layers=layers)
    # Groups of glm4_moe must stay equal.
    return mixed_plan(calibration, drop=family != "glm4_moe") if method == "mixed" else None


@torch.no_grad()
def expected(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return transformers' greedy tokens [S, TOKENS] and log-probabilities of the prompts' positions [S, T, V]."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompts = torch.from_numpy(PROMPTS)
    mask = torch.ones_like(prompts)
    greedy = model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    return greedy[:, prompts.shape[1] :].numpy(), log_probabilities(model)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module) -> np.ndarray:
    """Return those that a model gives at the prompts' positions, [S, T, V]."""
    return model(torch.from_numpy(PROMPTS)).logits.double().log_softmax(-1)[:, :-1].numpy()


def copied(folder: Path, name: str) -> Path:
    """Return a copy of a result, to be damaged."""
    shutil.copytree(folder, out := folder.with_name(f"{folder.name}-{name}"))
    return out
