"""What choosing, rounding, merging and fitting cost on one layer with the shapes of a known model, random weights.

Each method plans and builds twice in a process of its own: first counted, then timed; with `--uncounted` once. Beside
its seconds stands what its matrix products alone would take at the float32 rate of this machine, measured in the same
process on products of the layer's own shapes, and the peak of its memory (VmHWM). Products are counted by torch as they
run; factorisations are not counted. The share is that of processor seconds, of all threads, so that other work on the
machine does not count; on a GPU that of wall time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from make_checkpoint import make_checkpoint
from measure import provenance, run_process

# Experts, top-k, width and expert width; of DeepSeek-V3 a sixteenth of the experts. The smallest tries the script.
SHAPES = {"olmoe": (64, 8, 2048, 1024), "qwen3-30b": (128, 8, 2048, 768), "deepseek-v3": (16, 2, 7168, 2048)}
SHAPES |= {"tiny": (8, 2, 128, 64)}
BEST_MERGE = {"fit": "ridge", "target": "gated", "features": "best"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("auto", {}),
    "auto, nothing rounded": ("auto", {"bits": False}),
    "quantize, 4 bits": ("quantize", {}),
    "mergemoe, ridge, gated, centre": ("mergemoe", BEST_MERGE | {"features": "centre"}),
    "mergemoe, ridge, gated, best features": ("mergemoe", BEST_MERGE),
    "mergemoe, ridge, gated, centre, by outputs": (
        "mergemoe",
        BEST_MERGE | {"features": "centre", "cluster": "outputs"},
    ),
    "linear, rank 32": ("linear", {"rank": 32}),
    "linear, rank 32, chosen": ("linear", {"rank": 32, "ranks": "chosen"}),
    "lightmoe, least squares, fitted": (
        "lightmoe",
        {"base": "least_squares", "start": "fitted", "ranks": "chosen", "rank": 64},
    ),
    "refit": ("refit", {}),
}


def checkpoint_of(shape: str, folder: Path) -> Path:
    """Write a checkpoint with one layer of a shape."""
    experts, top_k, width, inner = SHAPES[shape]
    sizes = {"experts": experts, "top_k": top_k, "hidden": width, "expert_width": inner, "vocab": 4096}
    return make_checkpoint(folder / "checkpoint", layers=1, **sizes)


def layer_view(folder: Path, tokens: int, shape: str, device: str) -> Any:
    """Return the layer of a checkpoint, a random sample, and the sums that go with it; half of its bytes may stay."""
    from moetailor.calibration.effects import Prices
    from moetailor.calibration.statistics import Sample, Sums
    from moetailor.checkpoint.experts import ExpertShape
    from moetailor.checkpoint.weights import ExpertWeights
    from moetailor.planning.view import LayerView

    generator, (experts, top_k, width, inner) = torch.Generator().manual_seed(0), SHAPES[shape]
    weights = ExpertWeights(folder, device=device)
    logits = torch.randn(tokens, experts, generator=generator)
    gate, index = logits.softmax(1).topk(top_k, 1)
    hidden = torch.randn(tokens, width, generator=generator)
    sample = Sample(key=torch.arange(tokens), hidden=hidden, index=index.int(), gate=gate, logits=logits)
    sums = Sums.zeros(experts, width)
    sums.tokens += tokens
    sums.count += torch.bincount(index.flatten(), minlength=experts)
    for name, values in (("gate", gate), ("gate_sq", gate.square()), ("gate_sq_norm_sq", gate.square())):
        getattr(sums, name).index_add_(0, index.flatten(), values.flatten().double())
    expert_bytes = 3 * width * inner * 2
    return LayerView(
        index=0,
        num_experts=experts,
        top_k=top_k,
        groups=1,
        nbytes=experts // 2 * (expert_bytes + (1 + 2 * 32) * width * 2),
        expert_bytes=expert_bytes,
        shape=ExpertShape(width=width, intermediate=inner),
        prices=Prices(coarse={0: 1e-3}, noise={0: 1e-3}, flips={0: 1e-3}, together=()),
        read_sums=lambda: sums,
        read_sample=lambda: sample,
        read_correction=lambda: None,
        open_experts=lambda: weights.open(0),
        dtype="BF16",
    )


def matrix_rate(shape: str, device: str) -> float:
    """Return float32 operations of the products of an expert on 4,096 tokens in a `busy` second, the best of five."""
    _, _, width, inner = SHAPES[shape]
    x, weight = torch.randn(4096, width, device=device), torch.randn(inner, width, device=device)
    best = float("inf")
    for _ in range(5):
        began = busy(device)
        torch.nn.functional.linear(x, weight)
        best = min(best, busy(device) - began)
    return 2 * 4096 * width * inner / best


def now(device: str) -> float:
    """Return the time when all that was asked of the device is done."""
    from moetailor.checkpoint.devices import finish

    finish(device)
    return time.perf_counter()


def busy(device: str) -> float:
    """Return the processor seconds of this process so far; on a GPU the time."""
    return time.process_time() if device == "cpu" else now(device)


def measure(name: str, folder: Path, tokens: int, shape: str, device: str, *, counted: bool) -> dict[str, float]:
    """Plan and build once; return seconds, operations, where they are to be counted, and the machine's rate."""
    from torch.utils.flop_counter import FlopCounterMode

    import moetailor
    from moetailor.transform.build import rounded_experts

    warnings.simplefilter("ignore", moetailor.MoetailorWarning)
    method = moetailor.METHODS[CASES[name][0]].of(CASES[name][1])
    counter, rate = FlopCounterMode(display=False), matrix_rate(shape, device)

    def run() -> tuple[float, float, float]:
        layer, done = layer_view(folder, tokens, shape, device), 0
        began = now(device)

        def told(experts: int, new: bool) -> None:
            nonlocal done
            done += experts
            print(f"{name}: {done} experts looked at after {now(device) - began:.0f} s", file=sys.stderr)

        layer.advance = told
        plan = method.plan(layer, layer.num_experts // 2)
        planned = now(device)
        given = method.build(layer, plan)
        rounded_experts(
            layer, plan, {part: given[part] for part in given if part in layer.shape.tensors}, method.rounding
        )
        layer.close()
        return began, planned, now(device)

    with torch.no_grad():
        # Counting takes as long as small steps do, so it has a run of its own, in which libraries start, too.
        if counted:
            with counter:
                run()
        start = busy(device)
        began, planned, built = run()
        spent = busy(device) - start
    rate = max(rate, matrix_rate(shape, device))
    return {
        "plan": planned - began,
        "build": built - planned,
        "busy": spent,
        "operations": float(counter.get_total_flops()),
        "rate": rate,
        "device_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0,
    }


def lines(names: Sequence[str], tokens: int, shape: str, device: str, *, counted: bool = True) -> Iterator[str]:
    """Measure each case in a process of its own; yield the lines of a table."""
    yield f"{'case':40} {'plan':>7} {'build':>7} {'busy':>8} {'products alone':>15} {'share':>6} {'peak':>8}"
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = checkpoint_of(shape, Path(scratch)), Path(scratch) / "out.json"
        for name in names:
            where = f"--checkpoint {folder} --tokens {tokens} --shape {shape} --device {device}"
            where += " --uncounted" * (not counted)
            ran = run_process(["bash", "-c", f"exec {sys.executable} {__file__} --case '{name}' {where} > {out}"])
            found = json.loads(out.read_text())
            alone, took = found["operations"] / found["rate"], found["busy"]
            products = f"{alone:14.1f}s {alone / took:6.2f}" if counted else f"{'-':>15} {'-':>6}"
            on_device = f" + {found['device_bytes'] / 1e9:.2f} GB" * bool(found["device_bytes"])
            yield (
                f"{name:40} {found['plan']:6.1f}s {found['build']:6.1f}s {took:7.1f}s {products} "
                f"{ran.peak_bytes / 1e9:5.2f} GB{on_device}"
            )


def main() -> None:
    """Measure every case in a process of its own and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="sampled tokens (default %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="olmoe", help="(default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where it is computed (default %(default)s)")
    parser.add_argument("--uncounted", action="store_true", help="count no operations, which takes as long again")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the cases to measure")
    parser.add_argument(
        "--case", choices=CASES, help="measure one case in this process, say how far it is, and print JSON"
    )
    parser.add_argument("--checkpoint", type=Path, help="of the case")
    options = parser.parse_args()
    if options.case:
        given = (options.case, options.checkpoint, options.tokens, options.shape, options.device)
        print(json.dumps(measure(*given, counted=not options.uncounted)))
        return
    print(" ".join(f"{key} {value}" for key, value in provenance().items()))
    for line in lines(options.only, options.tokens, options.shape, options.device, counted=not options.uncounted):
        print(line, flush=True)


if __name__ == "__main__":
    main()
