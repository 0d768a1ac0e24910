"""Experts in few bits as they run: memory and tokens a second beside those of the original and of the bytes read.

The checkpoint has layers with the shapes of OLMoE-1B-7B and random weights; experts are rounded to the nearest codes,
which lie and run as those of GPTQ do. Speeds are those of the decoder without its head, each measured in turns with the
original in the same dtype (A B A B), one thread; a ratio is the median of the turns, above 1 when the result is
faster. Bytes read are those of the weights that one token needs: what decoding is bound by where memory is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import moetailor
from make_checkpoint import make_checkpoint
from measure import REFERENCE, provenance
from moetailor.answers import Width
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.models import load_model
from run import decode_seconds, in_turns, prefill_seconds, random_ids

# Bits of the first experts of each layer; the others have them in turn.
CASES = {f"{bits} bits": (bits,) for bits in ("8", "4", "2")} | {f"{bits} bits, vq": (f"vq{bits}",) for bits in "421"}
CASES |= {"8 bits, floats": ("fp8",), "8, 4 and 2 bits": ("8", "vq4", "vq2")}
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def rounded(checkpoint: Path, calibration: moetailor.Calibration, bits: tuple[str, ...], out: Path) -> Path:
    """Write a result with such experts and return its folder."""
    whole, given = moetailor.Budget.parse(remove=0), {"rounding": "nearest"}
    plan = moetailor.make_plan(calibration, "quantize", whole, parameters=given)
    widths = [Width.parse(each) for each in bits]
    layers = {
        prefix: replace(layer, widths={expert: widths[expert % len(widths)] for expert in layer.pool})
        for prefix, layer in plan.layers.items()
    }
    return moetailor.apply(replace(plan, layers=layers), checkpoint, out, calibration=calibration, verify=False)


def bytes_read(folder: Path, share: float) -> float:
    """Return the bytes of the layers' weights that one token needs.

    Args:
        folder: the checkpoint.
        share: of the experts that a token runs.
    """
    tensors = ((name, info.nbytes) for name, info in open_checkpoint(folder).tensors.items() if ".layers." in name)
    return sum(nbytes * (share if ".experts." in name else 1) for name, nbytes in tensors)


def held(folder: Path) -> tuple[int, int]:
    """Return bytes of parameters and buffers of a loaded model, and by how much this process grew until all of them had
    been read: files are mapped, and pages that nobody read are not there.
    """
    load_model(REFERENCE, dtype=torch.bfloat16, device="cpu")  # what is imported on the way is there before
    before = resident()
    model = load_model(folder, dtype=torch.bfloat16, device="cpu")
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.count_nonzero()
    return sum(tensor.nbytes for tensor in tensors), resident() - before


def resident() -> int:
    """Return VmRSS of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def measure(work: Path, options: argparse.Namespace) -> None:
    """Measure and print a line for each case."""
    checkpoint = make_checkpoint(work / "original", layers=options.layers, vocab=4096)
    batches = [moetailor.Batch.of(random_ids(1, 64, 4096))]
    moetailor.calibrate(checkpoint, work / "calibration", text=batches, stream=True, dtype="bfloat16")
    calibration = moetailor.Calibration.open(work / "calibration")
    folders = {"original": checkpoint}
    folders |= {name: rounded(checkpoint, calibration, CASES[name], work / name) for name in options.only}
    ids, share = random_ids(1, options.length, 4096), 8 / 64
    print(f"{'':16} {'on disk':>8} {'held':>6} {'grown':>6}  {'read':>5}", end="")
    print("".join(f"  {phase + ', ' + dtype:>20}" for dtype in DTYPES for phase in ("prefill", "decode")))
    for name, folder in folders.items():
        command = [sys.executable, __file__, "--held", str(folder)]
        stored = open_checkpoint(folder).nbytes
        shares = [
            nbytes / stored for nbytes in json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        ]
        ratio = bytes_read(checkpoint, share) / bytes_read(folder, share)
        print(f"{name:16} {stored / 1e9:5.2f} GB {shares[0]:6.3f} {shares[1]:6.3f}  {ratio:5.2f}", end="", flush=True)
        for dtype in DTYPES.values() if folder != checkpoint else ():
            models: list[Any] = [load_model(each, dtype=dtype, device="cpu") for each in (checkpoint, folder)]
            for run in (prefill_seconds, decode_seconds):
                first, second = (lambda model=model, run=run: run(model, ids, options.new_tokens) for model in models)
                found = in_turns(name, first, second, options.turns)
                print(f"  {found.median:5.2f} [{found.low:.2f}, {found.high:.2f}]", end="", flush=True)
        print(flush=True)


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to decode (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each ratio (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the cases to measure")
    parser.add_argument("--workdir", type=Path, help="where a temporary folder of 5 GB goes (default: the system's)")
    parser.add_argument("--held", type=Path, help="print what the model in this folder holds in this process, as JSON")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    if options.held is not None:
        print(json.dumps(held(options.held)))
        return
    print(" ".join(f"{name} {value}" for name, value in provenance().items()), flush=True)
    with tempfile.TemporaryDirectory(dir=options.workdir) as work:
        measure(Path(work), options)


if __name__ == "__main__":
    main()
