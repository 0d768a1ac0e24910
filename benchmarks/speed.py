"""Tokens a second of compressed layers beside the original's, in memory and in one process: no checkpoint is written.

One layer with the shapes of OLMoE-1B-7B and random weights, a prompt (512 tokens) and 16 decoded one by one. Original
and result run in turns (A B A B), each turn with a router of its own, one thread; seconds are those of the process (CPU
time), so that other work on the machine disturbs less, and on a GPU those of the clock. A ratio is the median of the
turns with the lowest and highest, above 1 when the result is faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeModel

from layer import busy
from measure import provenance
from moetailor.answers import Answer, Constant, Keep, Linear, LowRank, Width
from moetailor.checkpoint.anatomy import discover
from moetailor.planning.layer_plan import LayerPlan
from moetailor.runtime.reshape import LayerChange, reshape_model
from run import random_ids

EXPERTS, VOCABULARY = 64, 512
RANKS = (96, 16, 256, 48, 192, 32, 128, 64)
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def in_bits(*bits: str, stand_ins: int = 0) -> LayerPlan:
    """Return a plan that keeps experts in these widths in turn; the last ones are linear maps and constants."""
    kept = EXPERTS - stand_ins
    others: list[Answer] = [Linear(16, int8=True) if slot % 2 else Constant() for slot in range(stand_ins)]
    widths = dict(zip(range(kept), cycle(map(Width.parse, bits)), strict=False))
    return LayerPlan(slots=(*[Keep()] * kept, *others), widths=widths)


def of_slots(*slots: Answer) -> LayerPlan:
    """Return a plan with these slots, the others kept."""
    return LayerPlan(slots=(*slots, *[Keep()] * (EXPERTS - len(slots))))


CASES: dict[str, Callable[[], LayerPlan]] = {
    "bases, ranks 16 to 256, maps, constants": lambda: of_slots(
        *(LowRank(slot // 8 * 8, RANKS[slot * 5 % 8]) for slot in range(32)),
        *(Linear((8, 16, 32, 64)[slot % 4]) for slot in range(16)),
        *[Constant()] * 6,
    ),
    "6 bases, rank 64": lambda: of_slots(*(LowRank(slot // 8 * 8, 64) for slot in range(48))),
    "linear, rank 32": lambda: of_slots(*[Linear(32)] * 32),
    "linear, ranks 4 to 256": lambda: of_slots(*(Linear(4 << slot % 7) for slot in range(32))),
    "1 to 8 bits, maps, constants": lambda: in_bits("vq2", "vq4", "vq3/5", "5/7", "8", "vq2/4", stand_ins=16),
} | {bits: lambda bits=bits: in_bits(bits) for bits in ("8", "5", "4", "2", "vq4", "vq3", "vq2", "vq1", "fp8")}


def olmoe(**more: Any) -> OlmoeConfig:
    """Return the config of a model with the shapes of OLMoE-1B-7B and a small vocabulary."""
    shapes = {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_experts_per_tok": 8}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": None}
    return OlmoeConfig(**shapes, **ids, **({"num_experts": EXPERTS} | more))


def fill(model: Any) -> None:
    """Draw weights, and codes of as many sorts as there are."""
    for name, tensor in (*model.named_parameters(), *model.base_model.layers.named_buffers()):
        if tensor.dtype == torch.int32:
            tensor.copy_(torch.randint(-(2**31), 2**31, tensor.shape, dtype=torch.int64, device=tensor.device))
        elif tensor.dtype == torch.uint8 and name.endswith("_scale"):
            tensor.fill_(118)  # 2^-9
        elif tensor.dtype == torch.uint8:
            # As large as scales make them: the largest is 448. Some CPUs are slow with those that are next to nothing.
            drawn = torch.randn_like(tensor, dtype=torch.float32) * 100
            tensor.copy_(drawn.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
        elif tensor.is_floating_point() and tensor.ndim > 1:
            tensor.normal_(0, 0.001 if name.endswith("_scale") else 0.02)
        else:
            tensor.fill_(1)


def filled(dtype: torch.dtype, plan: LayerPlan | None = None, device: str = "cpu") -> Any:
    """Return a model of one layer with random weights, with this plan."""
    config = olmoe(num_hidden_layers=1)
    with torch.device("meta"):
        model: Any = OlmoeModel(config).to(dtype)
    if plan is not None:
        anatomy, slot_map = discover(config, model), plan.slot_map()
        layer = next(iter(anatomy.layers.values()))
        change = LayerChange(experts=slot_map.plain_pool, slots=plan.kept_slots, slot_map=slot_map)
        reshape_model(model, anatomy, {layer.index: change})
    model.to_empty(device=device)
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    fill(model)
    if plan is not None:
        model.layers[0].mlp.experts.fill_map()
    return model.eval()


def prefill_seconds(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of one pass over a prompt."""
    began = busy(ids.device.type)
    model(input_ids=ids, use_cache=False)
    return busy(ids.device.type) - began


def decode_seconds(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of 16 tokens, one by one, behind 64 others."""
    cache = model(input_ids=ids[:, :64], use_cache=True).past_key_values
    began = busy(ids.device.type)
    for at in range(64, 80):
        model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    return busy(ids.device.type) - began


def rerouted(*models: Any) -> None:
    """Draw one router for all models: experts of a result do not all cost the same, nor are all chosen as often."""
    gates = [model.layers[0].mlp.gate.weight for model in models]
    drawn = torch.randn_like(gates[0]) * 0.02
    for gate in gates:
        gate.copy_(drawn)


def main() -> None:
    """Parse the arguments, measure and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the cases to measure")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the models")
    parser.add_argument("--turns", type=int, default=5, help="turns of each ratio (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the models run (default %(default)s)")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(" ".join(f"{name} {value}" for name, value in provenance().items()), flush=True)
    ids = random_ids(1, options.length, VOCABULARY).to(options.device)
    for dtype in options.dtype:
        original = filled(DTYPES[dtype], None, options.device)
        for name in options.only:
            result = filled(DTYPES[dtype], CASES[name](), options.device)
            print(f"{name:40} {dtype:8}", end="", flush=True)
            for run in (prefill_seconds, decode_seconds):
                run(original, ids), run(result, ids)
                ratios = []
                for _ in range(options.turns):
                    rerouted(original, result)
                    ratios.append(run(original, ids) / run(result, ids))
                found = f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                print(f"  {run.__name__.split('_')[0]} {found}", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
