"""The most memory that calibrating by stream and applying take on a checkpoint larger than the limit.

Runs the stages on a checkpoint of make_checkpoint.py as processes of their own, prints VmHWM and wall time of each, and
fails when one of them held more than the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measure import Ran, apply_command, calibrate_command, plan_command, provenance, run_process

PLANS = (("mone", "25%"), ("reap", "25%"))


def measure(checkpoint: Path, work: Path, *, tokens: int, batch_tokens: int, length: int) -> dict[str, Ran]:
    """Run every stage once and return what each took."""
    calibration = work / "calibration"
    command = calibrate_command(checkpoint, calibration, tokens=tokens, batch_tokens=batch_tokens, length=length)
    stages = {"calibrate --stream": run_process(command)}
    for method, remove in PLANS:
        plan, out = work / f"{method}.json", work / method
        stages[f"plan {method} {remove}"] = run_process(plan_command(calibration, plan, method, remove))
        stages[f"apply {method} {remove}"] = run_process(apply_command(checkpoint, plan, out, calibration))
        shutil.rmtree(out)
    return stages


def main() -> int:
    """Parse the arguments, measure, print, and say by the exit status whether the limit held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="from make_checkpoint.py")
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="for results; needs the checkpoint's size free")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of calibration (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a batch (default %(default)s)")
    parser.add_argument("--limit", type=float, default=4.0, help="GB (10^9) a stage may hold (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    sizes = {"tokens": options.tokens, "batch_tokens": options.batch_tokens, "length": options.length}
    with tempfile.TemporaryDirectory(dir=options.workdir) as work:
        stages = measure(options.checkpoint, Path(work), **sizes)
    for name, ran in stages.items():
        verdict = "ok" if ran.peak_bytes < options.limit * 1e9 else f"MORE THAN {options.limit} GB"
        print(f"{name:22} peak {ran.peak_bytes / 1e9:5.2f} GB  wall {ran.seconds:6.1f} s  {verdict}")
    if options.json is not None:
        content = provenance() | {name: vars(ran) for name, ran in stages.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(ran.peak_bytes >= options.limit * 1e9 for ran in stages.values()))


if __name__ == "__main__":
    sys.exit(main())
