"""Compress the reference model with four methods at two ratios, from one calibration, and print what each one cost.

Takes a minute or two on two CPU cores and needs no network. The same steps serve a real model: give its folder or hub
name with --model, and text of your own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import moefit
from moefit.evaluation.fidelity import Reference

HERE = Path(__file__).parent / "reference-moe"
METHODS = ("frequency", "reap", "mone", "conmoe")
RATIOS = ("25%", "50%")


def main() -> None:
    """Calibrate once, then plan, apply and compare each method at each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE), help="folder or hub name (default: the reference model)")
    parser.add_argument("--calibration-data", default=str(HERE / "calibration.jsonl"))
    parser.add_argument("--heldout-data", default=str(HERE / "heldout.jsonl"))
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    options = parser.parse_args()
    console, began = Console(), time.time()

    def load() -> object:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval()

    with tempfile.TemporaryDirectory() as scratch:
        text = moefit.TextOptions(data=(options.calibration_data,), sequences=128, length=options.length, batch_size=16)
        with console.status(f"calibrating on {text.sequences} x {text.length} tokens"):
            calibration = moefit.calibrate(options.model, Path(scratch) / "calibration", text=text)

        heldout = moefit.TextOptions(data=(options.heldout_data,), sequences=64, length=options.length, batch_size=4)
        batches = moefit.read_batches(heldout, AutoTokenizer.from_pretrained(options.model))
        reference = Reference(Path(scratch) / "reference", batches).record(load())

        table = Table("removed", "method", "size", "perplexity", "KL, nats", "95% interval", "top-1", box=None)
        original = calibration.model.nbytes
        for ratio in RATIOS:
            for method in METHODS:
                console.print(f"{method}, {ratio} removed", style="dim")
                plan = moefit.make_plan(calibration, method, moefit.Budget.parse(remove=ratio))
                compressed = moefit.apply(plan, load(), calibration=calibration)
                found = reference.compare(compressed)[""]
                if not table.row_count:
                    table.add_row(
                        "-",
                        "original",
                        f"{original / 1e6:.1f} MB",
                        f"{found.original_perplexity.mean:.2f}",
                        "0",
                        "",
                        "100%",
                    )
                table.add_row(
                    ratio,
                    method,
                    f"{plan.nbytes / 1e6:.1f} MB",
                    f"{found.compressed_perplexity.mean:.2f}",
                    f"{found.kl.mean:.4f}",
                    f"{found.kl.low:.4f} to {found.kl.high:.4f}",
                    f"{found.top1_agreement.mean:.1%}",
                )
    console.print(table)
    console.print(f"{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    main()
