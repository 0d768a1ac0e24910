"""What moetailor costs, as ratios measured in one run on layers with the shapes of OLMoE-1B-7B and random weights.

Machines differ and other work disturbs, so nothing is compared with a number from another run: what a ratio compares
runs in turns (A B A B), each turn gives a ratio, and the table shows the median with the lowest and highest turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import moetailor
from make_checkpoint import make_checkpoint
from measure import apply_command, calibrate_command, drop_cache, plan_command, provenance, run_process
from moetailor.answers import Auxiliary, LowRank
from moetailor.checkpoint.models import load_model
from moetailor.runtime.experts import CompressedExperts

IMPLEMENTATIONS = ("eager", "grouped_mm")
APPLIED = (("mone", "50%"), ("reap", "25%"))
SERVED: tuple[tuple[str, str, dict], ...] = (
    ("mone", "50%", {}),
    ("linear", "50%", {"rank": 32}),
    ("conmoe", "50%", {}),
    ("reap", "50%", {}),
    ("lightmoe", "50%", {}),
    ("compressed_experts", "0%", {}),
)
STAGES = ("mone", "conmoe", "reap")


@dataclass(frozen=True)
class Ratio:
    """A measured ratio: median, lowest and highest turn, median seconds of both sides, and the goal if there is one."""

    what: str
    median: float
    low: float
    high: float
    seconds: tuple[float, float]
    goal: str = ""
    note: str = ""

    def row(self) -> str:
        """Return the line of the table."""
        spread = f"[{self.low:.2f}, {self.high:.2f}]"
        times = f"{self.seconds[0]:.2f} s / {self.seconds[1]:.2f} s"
        return f"{self.what:44} {self.median:6.2f} {spread:16} {times:22} {self.goal:8} {self.note}".rstrip()


def in_turns(
    what: str, first: Callable[[], float], second: Callable[[], float], turns: int, *, goal: str = "", note: str = ""
) -> Ratio:
    """Measure first / second in turns, after a warm-up of both; each call returns its seconds."""
    first(), second()
    pairs = [(first(), second()) for _ in range(turns)]
    ratios = [a / b for a, b in pairs]
    medians = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
    return Ratio(what, statistics.median(ratios), min(ratios), max(ratios), medians, goal, note)


def timed(run: Callable[[], Any]) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def calibration_cost(checkpoint: Path, work: Path, turns: int, batch: int, length: int) -> Iterator[Ratio]:
    """Time the layers of a calibration in memory against the plain forward pass over the same tokens, in float32.

    Both sides run the same model without its head, with the same experts implementation. Of calibration it is the time
    of the layers, from its log: the forward pass, the statistics, the check of the weights, the layer's file. The
    sample takes the share of tokens that the defaults give: one in sixteen.
    """
    model: Any = load_model(checkpoint, dtype=torch.float32, device="cpu")
    ids = random_ids(batch, length, model.config.vocab_size)
    batches, sample = [moetailor.Batch.of(ids)], moetailor.SampleOptions(tokens=max(ids.numel() // 16, 1))
    out = work / "cost"

    def calibrate() -> float:
        shutil.rmtree(out, ignore_errors=True)
        moetailor.calibrate(model, out, text=batches, sample=sample, states="memory")
        return sum(json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines())

    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        plain = lambda: timed(lambda: model.get_decoder()(input_ids=ids, use_cache=False))  # noqa: E731
        yield in_turns(f"calibration / plain forward, {name}", calibrate, plain, turns, goal="<= 1.15")
    shutil.rmtree(out)


def apply_cost(checkpoint: Path, calibration: Path, work: Path, turns: int) -> Iterator[Ratio]:
    """Time apply against `cp --reflink=never` of the original's files and of the result's, both with fsync.

    Before each turn of either side the kernel is told to forget the files that will be read (posix_fadvise DONTNEED),
    so both read from the disk. The time of apply is that of the call: the start of Python is left out.
    """
    opened, copied, out, kept = moetailor.Calibration.open(calibration), work / "copied", work / "out", work / "kept"
    for method, remove in APPLIED:
        plan = moetailor.make_plan(opened, method, moetailor.Budget.parse(remove=remove))
        moetailor.apply(plan, checkpoint, kept, calibration=opened, verify=False)

        def applied(plan: moetailor.Plan = plan) -> float:
            drop_cache(checkpoint)
            seconds = timed(lambda: moetailor.apply(plan, checkpoint, out, calibration=opened, verify=False))
            shutil.rmtree(out)
            return seconds

        for what, source in (("the original", checkpoint), ("the result", kept)):

            def cp(source: Path = source) -> float:
                drop_cache(source)
                seconds = timed(lambda: copy_synced(source, copied))
                shutil.rmtree(copied)
                return seconds

            name, goal = f"apply {method} {remove} / cp of {what}", "<= 1.5" if what == "the original" else ""
            yield in_turns(name, applied, cp, turns, goal=goal)
        shutil.rmtree(kept)


def copy_synced(source: Path, out: Path) -> None:
    """Copy a folder with cp and wait until it is on the disk."""
    subprocess.run(["cp", "--recursive", "--reflink=never", source, out], check=True)
    for path in (*out.iterdir(), out):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def serving_speed(checkpoint: Path, calibration: Path, options: argparse.Namespace) -> Iterator[Ratio]:
    """Compare compressed and original: prefill of one prompt and decoding from it, float32, without the head.

    Ratios are of tokens a second, above 1 when the compressed model is faster. Beside each stands the share of the
    expert runs that is left, from the routing of this very prompt, and the ratio that follows for the layers' matrix
    products, of which attention's projections stay.
    """
    opened, chosen = moetailor.Calibration.open(calibration), options.methods and options.methods.split(",")
    original: Any = load_model(checkpoint, dtype=torch.float32, device="cpu")
    ids = random_ids(1, options.length, original.config.vocab_size)
    for method, remove, parameters in SERVED:
        if chosen and method not in chosen:
            continue
        plan = moetailor.make_plan(opened, method, moetailor.Budget.parse(remove=remove), parameters=parameters)
        small = load_model(checkpoint, dtype=torch.float32, device="cpu")
        # A plan of the checkpoint fits the model that was loaded from it.
        moetailor.apply(plan, small, calibration=opened)
        share = live_share(small, ids)
        note = f"expert runs {share:.2f}, so {expected_speed(original, small, share):.2f}"
        for name in IMPLEMENTATIONS:
            for model in (original, small):
                model.set_experts_implementation(name)
            for phase, measure in (("prefill", prefill_seconds), ("decode", decode_seconds)):
                # Tokens a second of the small over the large model are seconds of the large over the small.
                yield in_turns(
                    f"{method} {remove} / original, {phase}, {name}",
                    lambda measure=measure: measure(original, ids, options.new_tokens),
                    lambda measure=measure, small=small: measure(small, ids, options.new_tokens),
                    options.turns,
                    note=note,
                )
        del small


def prefill_seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Return the seconds of one pass over a prompt."""
    return timed(lambda: model.get_decoder()(input_ids=ids, use_cache=False))


def decode_seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Return the seconds of decoding from a quarter of the prompt; each next token is the prompt's own."""
    decoder, start = model.get_decoder(), ids.shape[1] // 4
    cache = decoder(input_ids=ids[:, :start], use_cache=True).past_key_values

    def steps() -> None:
        for at in range(start, start + new_tokens):
            decoder(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)

    return timed(steps)


def live_share(model: Any, ids: torch.Tensor) -> float:
    """Return the expert runs that a prompt asks for, as a share of top-k runs for each token and MoE layer."""
    live, routed = 0.0, 0

    def count(module: Any, args: tuple) -> None:
        nonlocal live, routed
        slot_TK = args[1]
        routed += slot_TK.numel()
        if not isinstance(module, CompressedExperts):
            live += slot_TK.numel()
            return
        if auxiliary := module.slots.of(Auxiliary):
            live += len(slot_TK) * next(iter(auxiliary.values())).main
            return
        row_TK = torch.tensor(module.slots.rows)[slot_TK]
        # Slots of one token that share a row are one run; constants (negative rows) are none.
        live += distinct(row_TK, row_TK >= 0)
        if module.slots.of(LowRank):
            number_TK = module.low_rank_slot[slot_TK]
            base_TK = module.low_rank_base[number_TK.clamp_min(0).long()]
            # A base runs once for a token, and every slot has an own part.
            rank_N = (module.low_rank_row < len(module.low_rank_up_in)).sum(1)
            rows = int(rank_N[number_TK[number_TK >= 0].long()].sum())
            own = sum(module.down_proj.shape[1:]) / module.down_proj[0].numel()
            live += distinct(base_TK, number_TK >= 0) + rows * own

    handles = [module.register_forward_pre_hook(count) for module in model.modules() if hasattr(module, "down_proj")]
    model.get_decoder()(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return live / routed


def distinct(value_TK: torch.Tensor, counted_TK: torch.Tensor) -> int:
    """Return how many different values the tokens have where they count, summed over tokens."""
    found = value_TK.masked_fill(~counted_TK, -1).sort(1).values
    first = torch.ones_like(counted_TK)
    first[:, 1:] = found[:, 1:] != found[:, :-1]
    return int((first & (found >= 0)).sum())


def expected_speed(model: Any, small: Any, share: float) -> float:
    """Return all products of the original's layers over those of the compressed ones, when a share of the experts' runs
    is left: in prefill, where linear maps of stand-ins are two thin products over all of a layer's.
    """
    layers = model.get_decoder().layers
    dense = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    stacks = sum(p.numel() for name, p in layers.named_parameters() if name.split(".")[-2] == "experts")
    experts = stacks * model.config.num_experts_per_tok // model.config.num_experts
    maps = sum(p.numel() for name, p in small.named_parameters() if ".linear_" in name)
    return (dense + experts) / (dense + share * experts + maps)


def stage_peaks(checkpoint: Path, work: Path, tokens: int, length: int) -> tuple[dict[str, float], Path]:
    """Return the most memory (VmHWM, GB) of each stage as a process of its own, and the calibration they made."""
    calibration, peaks = work / "calibration", {}
    command = calibrate_command(checkpoint, calibration, tokens=tokens, batch_tokens=tokens, length=length)
    peaks["calibrate --stream"] = run_process(command).peak_bytes / 1e9
    for method, remove in ((name, "50%") for name in STAGES):
        plan, out = work / f"{method}.json", work / method
        peaks[f"plan {method} {remove}"] = run_process(plan_command(calibration, plan, method, remove)).peak_bytes / 1e9
        command = apply_command(checkpoint, plan, out, calibration)
        peaks[f"apply {method} {remove}"] = run_process(command).peak_bytes / 1e9
        shutil.rmtree(out)
    return peaks, calibration


def random_ids(batch: int, length: int, vocab: int) -> torch.Tensor:
    """Return seeded token ids."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def measure_all(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print everything."""
    about = provenance()
    print(" ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    # A small vocabulary, still that of the tokenizer: embedding and head are not measured, and would take memory.
    checkpoint = make_checkpoint(work / "checkpoint", layers=options.layers, vocab=4096)
    peaks, calibration = stage_peaks(checkpoint, work, 4 * options.length, options.length)
    for name, peak in peaks.items():
        print(f"{name:44} {peak:6.2f} GB at most", flush=True)
    print(f"{'ratio':44} median [low, high]     seconds of both sides  goal", flush=True)
    ratios: list[Ratio] = []
    parts = {
        "apply": lambda: apply_cost(checkpoint, calibration, work, options.turns),
        "calibrate": lambda: calibration_cost(checkpoint, work, options.turns, 4, options.length),
        "serve": lambda: serving_speed(checkpoint, calibration, options),
    }
    for name in options.parts.split(","):
        for ratio in parts[name]():
            ratios.append(ratio)
            print(ratio.row(), flush=True)
    return {"about": about, "peaks_gb": peaks, "ratios": [asdict(ratio) for ratio in ratios]}


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the model measured (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode (default %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each ratio (default %(default)s)")
    parser.add_argument("--parts", default="apply,calibrate,serve", help="what to measure (default %(default)s)")
    parser.add_argument("--methods", help="of `serve`: only these methods, by comma")
    parser.add_argument("--workdir", type=Path, help="where a temporary folder of 6 GB goes (default: the system's)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=options.workdir) as work:
        numbers = measure_all(Path(work), options)
    if options.json is not None:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
