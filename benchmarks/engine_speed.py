"""Tokens a second of results in vLLM beside their original's, in one process, and what the products let expect.

Two layers with the shapes of OLMoE-1B-7B and random weights, as they are and with slots as methods leave them, are
written into a folder. vLLM loads all of them with moetailor-vllm, and they run in turns (A B C A B C), one thread each;
seconds are those of the process (CPU time), so that other work on the machine disturbs less. A ratio is the median of
the turns with the lowest and highest, above 1 when the result is faster. What is expected follows from the layers'
matrix products in prefill and the expert runs that the routing of a prompt leaves (`run.py`); few bits are as many
products. The Python that runs this has vLLM, moetailor-vllm and moetailor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

import torch
from transformers import OlmoeForCausalLM

from measure import provenance
from moetailor.answers import Constant, Linear, LowRank
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.models import load_model
from moetailor.planning.layer_plan import LayerPlan
from moetailor.runtime.quantizer import QUANT_METHOD, MoetailorConfig, MoetailorQuantizer
from moetailor.runtime.reshape import LayerChange, reshape_model
from run import expected_speed, live_share, random_ids
from speed import EXPERTS, RANKS, VOCABULARY, fill, in_bits, of_slots, olmoe

CONTEXT, LAYERS = 1024, 2
ORIGINAL, DROPPED = "original", "reap 50%"
CASES: dict[str, Callable[[], LayerPlan] | None] = {
    DROPPED: None,
    "mone 50%": lambda: of_slots(*[Constant()] * 32),
    "linear 50%": lambda: of_slots(*[Linear(32)] * 32),
    "auto, nothing rounded": lambda: of_slots(
        *(LowRank(slot // 8 * 8, RANKS[slot * 5 % 8]) for slot in range(16)),
        *(Linear((8, 16, 32, 64)[slot % 4]) for slot in range(16)),
        *[Constant()] * 16,
    ),
    "auto, bits": lambda: in_bits("4", "vq4/5", "5/7", "8", "3", "vq2/4", stand_ins=16),
    "quantize, 4 bits": lambda: in_bits("4"),
    "quantize, int4g32": lambda: in_bits("int4g32"),
    "quantize, fp8b128": lambda: in_bits("fp8b128"),
    "quantize, mxfp4": lambda: in_bits("mxfp4"),
    "quantize, vq2": lambda: in_bits("vq2"),
}


def write(name: str, folder: Path) -> None:
    """Write the original, or a result, with random weights."""
    experts = EXPERTS // 2 if name == DROPPED else EXPERTS
    config = olmoe(num_experts=experts, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = OlmoeForCausalLM(config).to(torch.bfloat16)
    if make := CASES.get(name):
        slot_map, anatomy = make().slot_map(), discover(config, model)
        change = LayerChange(experts=slot_map.plain_pool, slots=make().kept_slots, slot_map=slot_map)
        reshape_model(model, anatomy, dict.fromkeys(anatomy.layers, change))
        form = MoetailorConfig.of(dict.fromkeys(anatomy.layers, slot_map))
        model.config.quantization_config, model.quantization_method = form, QUANT_METHOD
        model.hf_quantizer, model.is_quantized = MoetailorQuantizer(form, pre_quantized=True), True
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    fill(model)
    model.save_pretrained(folder)


def share_left(whole: Any, folder: Path, ids: torch.Tensor) -> tuple[float, float]:
    """Return the share of expert runs that a result's routing leaves, and the speed that it lets expect."""
    small: Any = load_model(folder, dtype=torch.bfloat16, device="cpu")
    share = live_share(small, ids)
    return share, expected_speed(whole, small, share)


def loaded(folder: Path, compiled: bool) -> Any:
    """Return vLLM's model of a folder."""
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        max_model_len=CONTEXT,
        max_num_seqs=8,
        max_num_batched_tokens=CONTEXT,
    )


def seconds(model: Any, prompts: torch.Tensor, tokens: int) -> float:
    """Return the CPU seconds of a call: prompts, and so many tokens behind each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=tokens)
    began = time.process_time()
    model.generate([{"prompt_token_ids": row} for row in prompts.tolist()], params, use_tqdm=False)
    return time.process_time() - began


def prefill(model: Any, prompts: torch.Tensor) -> float:
    """Return the CPU seconds of a prompt of 512 tokens."""
    return seconds(model, prompts[:1], 1)


def decode(model: Any, prompts: torch.Tensor, sequences: int, tokens: int = 8) -> float:
    """Return the CPU seconds of tokens one by one behind 16 others, for so many sequences at once."""
    short = prompts[:sequences, :16]
    return seconds(model, short, tokens + 1) - seconds(model, short, 1)


PHASES = {
    "prefill": prefill,
    "decode, 8 sequences": lambda model, prompts: decode(model, prompts, 8),
    "decode, one": lambda model, prompts: decode(model, prompts, 1),
}


def main() -> None:
    """Parse the arguments, write what is not there, measure and print a line for each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="FOLDER", help="where the original and results are written")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the results to measure")
    parser.add_argument("--turns", type=int, default=5, help="turns of each ratio (default %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folders = {name: options.work / name.replace(", ", "-").replace(" ", "-") for name in (ORIGINAL, *options.only)}
    for name, folder in folders.items():
        if not folder.exists():
            write(name, folder)
    print(" ".join(f"{name} {value}" for name, value in provenance().items()), flush=True)
    whole: Any = load_model(folders[ORIGINAL], dtype=torch.bfloat16, device="cpu")
    prompts = random_ids(8, 512, VOCABULARY)
    expected = {name: share_left(whole, folders[name], prompts[:1]) for name in options.only}
    del whole
    models = {name: loaded(folder, options.compiled) for name, folder in folders.items()}
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.turns + 1):
        for phase, measure in PHASES.items():
            for name, model in models.items():
                found = measure(model, prompts)
                print(f"{turn} {phase} {name} {found:.3f} s", file=sys.stderr, flush=True)
                if turn:  # the first warms up
                    taken.setdefault((name, phase), []).append(found)
    print("original: " + ", ".join(f"{phase} {statistics.median(taken[ORIGINAL, phase]):.2f} s" for phase in PHASES))
    for name in options.only:
        share, speed = expected[name]
        print(f"{name:24} expert runs {share:.2f}, expected {speed:.2f}", end="")
        for phase in PHASES:
            pairs = zip(taken[ORIGINAL, phase], taken[name, phase], strict=True)
            ratios = [original / result for original, result in pairs]
            print(f"  {phase} {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
