"""What merging and fitting cost on one layer with the shapes of OLMoE-1B-7B: 64 experts to 32, random weights.

Each method plans and builds in a process of its own. Beside its seconds stands what its matrix products alone would
take at the float32 rate of this machine, measured in the same process on products of the layer's own shapes, and the
peak of its memory (VmHWM). Products are counted by torch as they run; factorisations are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from measure import provenance, run_process

EXPERTS, KEEP, TOP_K, WIDTH, INNER = 64, 32, 8, 2048, 1024
BEST_MERGE = {"fit": "ridge", "target": "gated", "features": "best"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mergemoe, ridge, gated, centre": ("mergemoe", BEST_MERGE | {"features": "centre"}),
    "mergemoe, ridge, gated, best features": ("mergemoe", BEST_MERGE),
    "mergemoe, ridge, gated, centre, by outputs": (
        "mergemoe",
        BEST_MERGE | {"features": "centre", "cluster": "outputs"},
    ),
    "linear, rank 32": ("linear", {"rank": 32}),
    "linear, rank 32, chosen": ("linear", {"rank": 32, "ranks": "chosen"}),
}


def layer_view(tokens: int) -> Any:
    """Return a layer with random weights, a random sample, and the sums that go with it."""
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    from moetailor.calibration.statistics import Sample, Sums
    from moetailor.checkpoint.experts import ExpertShape
    from moetailor.planning.view import LayerView

    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    module = OlmoeExperts(OlmoeConfig(**sizes))
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.requires_grad_(False)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    gate, index = logits.softmax(1).topk(TOP_K, 1)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    sample = Sample(key=torch.arange(tokens), hidden=hidden, index=index.int(), gate=gate, logits=logits)
    sums = Sums.zeros(EXPERTS, WIDTH)
    sums.tokens += tokens
    sums.count += torch.bincount(index.flatten(), minlength=EXPERTS)
    for name, values in (("gate", gate), ("gate_sq", gate.square()), ("gate_sq_norm_sq", gate.square())):
        getattr(sums, name).index_add_(0, index.flatten(), values.flatten().double())
    expert_bytes = 3 * WIDTH * INNER * 4
    return LayerView(
        index=0,
        num_experts=EXPERTS,
        top_k=TOP_K,
        groups=1,
        nbytes=KEEP * (expert_bytes + (1 + 2 * 32) * WIDTH * 4),
        expert_bytes=expert_bytes,
        shape=ExpertShape(width=WIDTH, intermediate=INNER),
        read_sums=lambda: sums,
        read_sample=lambda: sample,
        read_correction=lambda: None,
        open_experts=lambda: nullcontext(module),
    )


def matrix_rate() -> float:
    """Return float32 operations a second of the products of an expert on 4,096 tokens, the best of five."""
    x, weight = torch.randn(4096, WIDTH), torch.randn(INNER, WIDTH)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2 * 4096 * WIDTH * INNER / best


def measure(name: str, tokens: int) -> dict[str, float]:
    """Plan and build once; return seconds, counted operations and the machine's rate."""
    from torch.utils.flop_counter import FlopCounterMode

    import moetailor

    warnings.simplefilter("ignore", moetailor.MoetailorWarning)
    method = moetailor.METHODS[CASES[name][0]].of(CASES[name][1])
    layer = layer_view(tokens)
    rate = matrix_rate()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        began = time.perf_counter()
        plan = method.plan(layer, KEEP)
        planned = time.perf_counter()
        method.build(layer, plan)
        built = time.perf_counter()
    rate = max(rate, matrix_rate())
    return {
        "plan": planned - began,
        "build": built - planned,
        "operations": float(counter.get_total_flops()),
        "rate": rate,
    }


def main() -> None:
    """Measure every case in a process of its own and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="sampled tokens (default %(default)s)")
    parser.add_argument("--case", choices=CASES, help="measure one case in this process, and print JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.tokens)))
        return
    print(" ".join(f"{key} {value}" for key, value in provenance().items()))
    print(f"{'case':40} {'plan':>7} {'build':>7} {'products alone':>15} {'share':>6} {'peak':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES:
            out = Path(scratch) / "out.json"
            script = f"{sys.executable} {__file__} --case '{name}' --tokens {options.tokens} > {out}"
            ran = run_process(["bash", "-c", f"exec {script}"])
            found = json.loads(out.read_text())
            alone, took = found["operations"] / found["rate"], found["plan"] + found["build"]
            print(
                f"{name:40} {found['plan']:6.1f}s {found['build']:6.1f}s {alone:14.1f}s {alone / took:6.2f} "
                f"{ran.peak_bytes / 1e9:5.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
