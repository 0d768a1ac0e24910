"""What moetailor costs on a GPU: one layer of the shapes of known models, a model end to end, and the device tests.

Every stage of the model is the command that a user gives, in a process of its own: the checkpoint has layers with the
shapes of OLMoE-1B-7B and random weights. Speeds are those of the original and of the result, in bfloat16. `--device cpu
--small` runs the same code where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import layer
from make_checkpoint import make_checkpoint
from measure import MOETAILOR, REFERENCE, ROOT, apply_command, plan_command, provenance, run_process

CASES = ("auto", "quantize, 4 bits", "linear, rank 32, chosen", "mergemoe, ridge, gated, best features")


def device_tests(device: str) -> Iterator[str]:
    """Run them; yield how many passed and which did not."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "4", "-k", device.split(":")[0]]
    ran = subprocess.run([*command, "tests/test_device.py"], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stdout[-6000:], ran.stderr[-2000:], flush=True)
    told = (line for line in ran.stdout.splitlines() if re.match(r"FAILED|ERROR|\d+ (passed|failed)", line))
    yield from (f"tests: {line}" for line in told)


def end_to_end(work: Path, options: argparse.Namespace) -> Iterator[str]:
    """Calibrate, plan, apply and evaluate a model by its commands; yield what each took, and how fast the result is."""
    sizes = {"experts": 8, "hidden": 128, "expert_width": 64, "vocab": 4096} if options.small else {}
    model = make_checkpoint(work / "model", layers=options.layers, **sizes)
    calibration, plan, out = work / "calibration", work / "plan.json", work / "out"
    on = ["--device", options.device]
    text = ["--sequences", "64", "--length", "1024" if not options.small else "64"]
    held = ["--data", str(REFERENCE / "heldout.jsonl"), *text]
    known = ["--data", str(REFERENCE / "calibration.jsonl"), *text, "--sample-tokens", str(options.tokens)]
    stages = {
        "calibrate": [
            *MOETAILOR,
            "calibrate",
            str(model),
            "-o",
            str(calibration),
            "--stream",
            "--sensitivity",
            *known,
            *on,
        ],
        "plan": [*plan_command(calibration, plan, "auto", options.remove), *on],
        "apply": [*apply_command(model, plan, out, calibration), *on],
        "evaluate": [*MOETAILOR, "evaluate", str(out), "--against", str(model), *held, *on],
    }
    yield f"{'stage':10} {'seconds':>8} {'peak in memory':>15}"
    for verb, command in stages.items():
        ran = run_process(command)
        yield f"{verb:10} {ran.seconds:7.1f}s {ran.peak_bytes / 1e9:12.2f} GB"
    yield f"{'speed':10} {'prefill':>10} {'decode':>10} {'weights in memory':>20}   tokens a second"
    for name, folder in (("original", model), ("result", out)):
        command = [sys.executable, __file__, "--speed", str(folder), *on]
        found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        yield f"{name:10} {found['prefill']:10.0f} {found['decode']:10.1f} {found['nbytes'] / 1e9:17.2f} GB"


def speed(folder: Path, device: str) -> dict[str, float]:
    """Load a model and return tokens a second and bytes of its weights."""
    from moetailor.checkpoint.models import load_model
    from moetailor.evaluation.speed import measure_speed, resident_nbytes

    model = load_model(folder, dtype=torch.bfloat16, device=device)
    ids = torch.randint(4096, (1, 512), generator=torch.Generator().manual_seed(0))
    return asdict(measure_speed(model, ids)) | {"nbytes": resident_nbytes(model)}


def main() -> None:
    """Measure all parts, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default %(default)s)")
    parser.add_argument("--parts", nargs="+", default=["layers", "model", "tests"], help="(default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", choices=layer.SHAPES, default=["olmoe", "qwen3-30b"])
    parser.add_argument("--only", nargs="+", choices=layer.CASES, default=CASES, help="cases of the first shape")
    parser.add_argument("--tokens", type=int, default=32768, help="sampled tokens (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default %(default)s)")
    parser.add_argument("--remove", default="65%", help="of the experts' bytes (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--speed", type=Path, help="print how fast the model in this folder is, as JSON")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.speed:
        print(json.dumps(speed(options.speed, options.device)))
        return
    if options.small:
        options.shapes, options.tokens = ["tiny"], 1024
    found: list[str] = []

    def say(line: str) -> None:
        found.append(line)
        print(line, flush=True)
        if options.out:
            options.out.write_text("\n".join(found) + "\n")

    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    say(f"{card}, " + " ".join(f"{key} {value}" for key, value in provenance().items()))
    began = time.perf_counter()
    for number, shape in enumerate(options.shapes if "layers" in options.parts else ()):
        say(f"one layer of {shape}, {options.tokens:,} sampled tokens")
        for line in layer.lines(options.only if not number else ["auto"], options.tokens, shape, options.device):
            say(line)
    if "model" in options.parts:
        with tempfile.TemporaryDirectory() as work:
            for line in end_to_end(Path(work), options):
                say(line)
    if "tests" in options.parts:
        for line in device_tests(options.device):
            say(line)
    say(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
