"""What a short distillation of routers, and of stand-ins, takes off the KL of train-free results.

Each method halves the experts of every layer, then the named tensors are trained towards the original's predictions on
the reference model's calibration text, or on more. KL(original || result) is on the whole held-out file, which nothing
has seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

import moetailor
from measure import REFERENCE, provenance
from moetailor.recovery.examples import read_blocks

BEST_MERGE = {"fit": "ridge", "target": "gated", "features": "best", "cluster": "outputs"}
# method, parameters, what trains
ROWS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("reap", {}, ("router",)),
    ("reap", {}, ("router", "experts")),
    ("mergemoe", BEST_MERGE, ("router",)),
    ("mergemoe", BEST_MERGE, ("router", "experts")),
    ("mone", {"score": "exact", "novice": "optimal"}, ("router",)),
    ("mone", {"score": "exact", "novice": "optimal"}, ("router", "standins")),
    ("linear", {"rank": 8}, ("router",)),
    ("linear", {"rank": 8}, ("router", "standins")),
    ("lightmoe", {"start": "svd", "ranks": "chosen", "bases": 1}, ("router", "standins")),
]


def divergence(folder: Path) -> float:
    """Return the mean KL on the held-out file."""
    text = moetailor.TextOptions(data=(str(REFERENCE / "heldout.jsonl"),), sequences=10_000, length=256, batch_size=8)
    return moetailor.evaluate(folder, REFERENCE, text=text).overall.kl.mean


def main() -> None:
    """Print and write a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default %(default)s)")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the text (default %(default)s)")
    parser.add_argument("--data", action="append", help="text to train on (default: the calibration text); repeatable")
    parser.add_argument("--rows", help="only rows of these methods, by comma")
    parser.add_argument("--json", type=Path, help="results, one JSON object a line")
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", moetailor.MoetailorWarning)
    text = str(REFERENCE / "calibration.jsonl")
    blocks = read_blocks(
        moetailor.ExampleOptions(data=tuple(options.data or [text]), length=256),
        AutoTokenizer.from_pretrained(REFERENCE),
    )
    print(" ".join(f"{name} {value}" for name, value in provenance().items()))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        calibration = moetailor.calibrate(
            REFERENCE,
            work / "calibration",
            text=moetailor.TextOptions(data=(text,), sequences=128, length=256, batch_size=16),
            sample=moetailor.SampleOptions(tokens=128 * 256),
        )
        for number, (method, parameters, train) in enumerate(ROWS):
            if options.rows and method not in options.rows.split(","):
                continue
            plan = moetailor.make_plan(calibration, method, moetailor.Budget.parse(remove="50%"), parameters=parameters)
            start = moetailor.apply(plan, REFERENCE, work / f"{number}.start", calibration=calibration)
            began = time.perf_counter()
            result = moetailor.recover(
                start,
                work / f"{number}.end",
                examples=blocks,
                teacher=REFERENCE,
                train=train,
                loss="kd",
                options=moetailor.RecoveryOptions(epochs=options.epochs, batch_size=4, lr=options.lr),
            )
            seconds, before, after = time.perf_counter() - began, divergence(start), divergence(result.out)
            name = f"{method}, {' and '.join(train)}"
            print(
                f"{name:34} KL {before:.4f} -> {after:.4f}  {1 - after / before:5.1%} less  "
                f"{result.tokens:,} tokens  {seconds:.0f} s  "
                f"training {sum(result.losses[:10]) / 10:.3f} -> {sum(result.losses[-10:]) / 10:.3f}",
                flush=True,
            )
            if options.json:
                row = {"row": name, "before": before, "after": after, "tokens": result.tokens, "seconds": seconds}
                with options.json.open("a") as out:
                    out.write(json.dumps(row | {"lr": options.lr, "commit": provenance()["commit"]}) + "\n")


if __name__ == "__main__":
    main()
