"""Every method on the reference model at equal bytes: the tables of docs/methods.md.

For each calibration seed one calibration, from which every method is planned at the bytes that published MoNE writes at
the ratio (`--size`), applied in memory, and compared with the original on the whole held-out file. Writes the table and
every number of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moetailor
from measure import provenance
from moetailor.evaluation.fidelity import Reference

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "examples" / "reference-moe"
RATIOS = ("25%", "50%")
BEST_LIGHT = {"start": "fitted", "ranks": "chosen", "bases": 1, "rank": 24}
BEST_MERGE = {"fit": "ridge", "target": "gated", "features": "best", "cluster": "outputs"}
# name in the table, method, parameters, what is fitted on
ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("frequency", "frequency", {}, "original"),
    ("ean", "ean", {}, "original"),
    ("reap", "reap", {}, "original"),
    ("seer_moe", "seer_moe", {}, "original"),
    ("easy_ep", "easy_ep", {}, "original"),
    ("diep", "diep", {}, "original"),
    ("aimer", "aimer", {}, "original"),
    ("naee, drawn", "naee", {"exhaustive": 0}, "original"),
    ("naee, exchanged", "naee", {"exhaustive": 0, "samples": 100, "swaps": 64, "tokens": 1024}, "original"),
    ("refit", "refit", {}, "original"),
    ("mone", "mone", {}, "original"),
    ("mone, exact error and optimal constant", "mone", {"score": "exact", "novice": "optimal"}, "original"),
    ("conmoe", "conmoe", {}, "original"),
    ("conmoe, functional and scaled", "conmoe", {"distance": "functional", "scale": True}, "original"),
    ("conmoe, scope of 2 layers", "conmoe", {"scope": 2}, "original"),
    ("m_smoe", "m_smoe", {}, "original"),
    ("m_smoe, global budget", "m_smoe", {"budget": "global"}, "original"),
    ("hc_smoe", "hc_smoe", {}, "original"),
    ("ream", "ream", {}, "original"),
    ("ream, saliency of the paper", "ream", {"saliency": "gate"}, "original"),
    ("ream, propagated", "ream", {}, "compressed"),
    ("sub_moe", "sub_moe", {}, "original"),
    ("mergemoe", "mergemoe", {}, "original"),
    ("mergemoe, best parameters", "mergemoe", BEST_MERGE, "original"),
    ("mergemoe, best parameters, propagated", "mergemoe", BEST_MERGE, "compressed"),
    ("linear, rank 4", "linear", {"rank": 4}, "original"),
    ("linear, rank 8", "linear", {"rank": 8}, "original"),
    ("linear, rank 16", "linear", {"rank": 16}, "original"),
    ("linear, chosen ranks", "linear", {"rank": 8, "ranks": "chosen"}, "original"),
    ("linear, shared input, rank 16", "linear", {"rank": 16, "shared": True}, "original"),
    ("linear, rank 8, propagated", "linear", {"rank": 8}, "compressed"),
    ("lightmoe, before recovery", "lightmoe", {}, "original"),
    ("lightmoe, best parameters", "lightmoe", BEST_LIGHT, "original"),
    ("auto", "auto", {}, "original"),
]


def measure(row: tuple, ratio: str, calibration: moetailor.Calibration, reference: Reference, model: str) -> dict:
    """Return the numbers of one cell: plan, build, compare."""
    name, method, parameters, propagate = row
    size = moetailor.make_plan(calibration, "mone", moetailor.Budget.parse(remove=ratio)).nbytes
    began = time.process_time()  # of one thread; other work on the machine does not count
    plan = moetailor.make_plan(calibration, method, moetailor.Budget.parse(size=size), parameters=parameters)
    loaded, original = (AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval() for _ in range(2))
    options = {"propagate": propagate} if propagate != "original" else {}
    compressed = moetailor.apply(plan, loaded, calibration=calibration, **options)
    seconds = time.process_time() - began
    domains = reference.compare(compressed, original)
    found = domains.pop("")
    return {
        "row": name,
        "ratio": ratio,
        "kl": found.kl.mean,
        "perplexity": found.compressed_perplexity.mean,
        "top1": found.top1_agreement.mean,
        "bytes": plan.nbytes,
        "size": size,
        "seconds": round(seconds, 2),
        "domains": {name: part.kl.mean for name, part in domains.items()},
    }


@dataclass(frozen=True)
class Job:
    """What every cell is measured on; called with a seed and a ratio in a process of its own."""

    model: str
    calibration_data: str
    heldout_data: str
    scratch: Path
    rows: tuple

    def __call__(self, seed: int, ratio: str) -> list[dict]:
        """Return the cells of all rows."""
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", moetailor.MoetailorWarning)
        logging.disable_progress_bar()
        calibration, reference = self.calibration(seed), self.reference()
        cells = []
        with torch.no_grad():
            for row in self.rows:
                cells.append(measure(row, ratio, calibration, reference, self.model) | {"seed": seed})
                print(json.dumps(cells[-1]), flush=True)
        return cells

    def calibration(self, seed: int) -> moetailor.Calibration:
        """Calibrate, or open what was calibrated."""
        text = moetailor.TextOptions(data=(self.calibration_data,), sequences=128, length=256, seed=seed, batch_size=16)
        sample = moetailor.SampleOptions(tokens=128 * 256, seed=seed)
        folder = self.scratch / f"calibration-{seed}"
        return moetailor.calibrate(self.model, folder, text=text, sample=sample, residual=True, sensitivity=True)

    def reference(self, *, record: bool = False) -> Reference:
        """Return the original's predictions on the whole held-out file."""
        text = moetailor.TextOptions(data=(self.heldout_data,), sequences=None, length=256, batch_size=8)
        batches = moetailor.read_batches(text, AutoTokenizer.from_pretrained(self.model))
        reference = Reference(self.scratch / "reference", batches)
        if record:
            reference.record(AutoModelForCausalLM.from_pretrained(self.model, dtype="float32").eval())
        return reference


def means(cells: list[dict]) -> list[dict]:
    """Return one entry for each row and ratio: means over the seeds, and the lowest and highest KL."""
    entries = []
    for ratio in RATIOS:
        for name, method, parameters, propagate in ROWS:
            some = [cell for cell in cells if cell["row"] == name and cell["ratio"] == ratio]
            if some:
                keys = ("kl", "perplexity", "top1", "bytes", "seconds")
                entry = {"row": name, "method": method, "parameters": parameters, "propagate": propagate}
                entry |= {"ratio": ratio} | {key: statistics.mean(cell[key] for cell in some) for key in keys}
                entry["domains"] = {
                    domain: statistics.mean(cell["domains"][domain] for cell in some) for domain in some[0]["domains"]
                }
                entry |= {"low": min(cell["kl"] for cell in some), "high": max(cell["kl"] for cell in some)}
                entries.append(entry | {"seeds": len(some), "commit": provenance()["commit"]})
    return entries


def line(entry: dict) -> str:
    """Return an entry as a line of text."""
    return (
        f"{entry['ratio']:4} {entry['row']:40} KL {entry['kl']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]  "
        f"perplexity {entry['perplexity']:6.2f}  top-1 {entry['top1']:.1%}  {entry['bytes'] / 1e6:6.2f} MB  "
        f"{entry['seconds']:5.1f} s"
    )


def best_by_domain(entries: list[dict]) -> list[str]:
    """Return for each ratio and domain the row with the lowest mean KL, and the one after it, as lines of text."""
    lines = []
    for ratio in RATIOS:
        some = [entry for entry in entries if entry["ratio"] == ratio]
        for domain in some[0]["domains"] if len(some) > 1 else ():
            first, second = sorted(some, key=lambda entry: entry["domains"][domain])[:2]
            told = [f"{entry['row']} {entry['domains'][domain]:.5f}" for entry in (first, second)]
            lines.append(f"{ratio:4} {domain:12} {told[0]}, then {told[1]}")
    return lines


def main() -> None:
    """Measure every row at every ratio and seed; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REFERENCE), help="folder or hub name (default: the reference model)")
    parser.add_argument("--calibration-data", default=str(REFERENCE / "calibration.jsonl"))
    parser.add_argument("--heldout-data", default=str(REFERENCE / "heldout.jsonl"))
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default %(default)s)")
    parser.add_argument("--rows", help="only rows whose name holds one of these words, by comma")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    options = parser.parse_args()
    wanted = options.rows.split(",") if options.rows else [""]
    rows = [row for row in ROWS if any(word in row[0] for word in wanted)]
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(options.model, options.calibration_data, options.heldout_data, Path(scratch), tuple(rows))
        job.reference(record=True)
        for seed in range(options.seeds):
            job.calibration(seed)
        parts = [(seed, ratio) for seed in range(options.seeds) for ratio in RATIOS]
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            cells = [cell for some in pool.map(job, *zip(*parts, strict=True)) for cell in some]
    print("\n".join(map(line, means(cells))))
    print("\n".join(best_by_domain(means(cells))))
    if options.json is not None:
        options.json.write_text(json.dumps({"about": provenance(), "rows": means(cells)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
