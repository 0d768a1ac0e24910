"""Compress the reference model with every method at two ratios, from one calibration, and print what each one cost.

Takes some minutes on two CPU cores and needs no network. The same steps serve a real model: give its folder or hub
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

import moetailor
from moetailor.evaluation.fidelity import Reference

HERE = Path(__file__).parent / "reference-moe"
OPTIMAL = {"score": "exact", "novice": "optimal"}
FUNCTIONAL = {"distance": "functional"}
FITTED = {"fit": "ridge", "target": "gated", "features": "best", "cluster": "outputs"}
# name in the table, method, parameters
METHODS: list[tuple[str, str, dict]] = [
    *((name, name, {}) for name in ("random", "frequency", "soft_frequency", "ean", "man", "msan", "reap", "mone")),
    *((name, name, {}) for name in ("seer_moe", "easy_ep", "diep", "aimer", "refit")),
    ("mone, zero vectors", "mone", {"novice": "zero"}),
    ("mone, optimal constants", "mone", {"novice": "optimal"}),
    ("mone, exact error, optimal constants", "mone", OPTIMAL),
    ("conmoe", "conmoe", {}),
    ("conmoe, functional", "conmoe", FUNCTIONAL),
    ("conmoe, functional and scaled", "conmoe", FUNCTIONAL | {"scale": True}),
    *((name, name, {}) for name in ("m_smoe", "hc_smoe", "sub_moe", "ream", "mergemoe")),
    ("mergemoe, best parameters", "mergemoe", FITTED),
    *((f"linear, rank {rank}", "linear", {"rank": rank}) for rank in (4, 8, 16)),
    ("auto, nothing rounded", "auto", {"bits": False}),
    ("auto", "auto", {}),
]
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
        text = moetailor.TextOptions(
            data=(options.calibration_data,), sequences=128, length=options.length, batch_size=16
        )
        with console.status(f"calibrating on {text.sequences} x {text.length} tokens"):
            calibration = moetailor.calibrate(
                options.model, Path(scratch) / "calibration", text=text, residual=True, sensitivity=True
            )

        heldout = moetailor.TextOptions(data=(options.heldout_data,), sequences=64, length=options.length, batch_size=4)
        batches = moetailor.read_batches(heldout, AutoTokenizer.from_pretrained(options.model))
        reference = Reference(Path(scratch) / "reference", batches).record(load())

        table = Table("removed", "method", "size", "perplexity", "KL, nats", "95% interval", "top-1", box=None)
        original = calibration.model.nbytes
        for ratio in RATIOS:
            for name, method, parameters in METHODS:
                console.print(f"{name}, {ratio} removed", style="dim")
                budget = moetailor.Budget.parse(remove=ratio)
                plan = moetailor.make_plan(calibration, method, budget, parameters=parameters)
                compressed = moetailor.apply(plan, load(), calibration=calibration)
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
                    name,
                    f"{plan.nbytes / 1e6:.1f} MB",
                    f"{found.compressed_perplexity.mean:.2f}",
                    f"{found.kl.mean:.4f}",
                    f"{found.kl.low:.3f}-{found.kl.high:.3f}",
                    f"{found.top1_agreement.mean:.1%}",
                )
    console.print(table)
    console.print(f"{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    main()
