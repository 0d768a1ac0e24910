"""What the benchmarks share: processes watched from outside, and where and on what a number was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "examples" / "reference-moe"
MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]


@dataclass(frozen=True)
class Ran:
    """What became of a process: wall time, the most memory it held (VmHWM), and its exit status."""

    seconds: float
    peak_bytes: int
    status: int


def run_process(command: list[str]) -> Ran:
    """Run a command to its end.

    VmHWM is the kernel's high-water mark of resident memory since exec. It is read from /proc while the process lives,
    so only a peak in its last 20 ms could be missed. (ru_maxrss would do, but it also counts the parent it was forked
    from.) Page cache is not part of it.

    Args:
        command: the command; when it fails by itself, its output is shown and the benchmark ends.
    """
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, resident_peak(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')}")
    return Ran(seconds, peak, process.returncode)


def resident_peak(pid: int) -> int:
    """Return VmHWM of a process in bytes, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def calibrate_command(model: Path, out: Path, *, tokens: int, batch_tokens: int, length: int) -> list[str]:
    """Return the command that calibrates a streamed checkpoint in float32 on the reference model's text."""
    sizes = {"--sequences": tokens // length, "--length": length, "--batch-size": max(batch_tokens // length, 1)}
    options = [text for name, value in sizes.items() for text in (name, str(value))]
    data = ["--data", str(REFERENCE / "calibration.jsonl"), "--stream", "--device", "cpu", "--dtype", "float32"]
    return [*MOETAILOR, "calibrate", str(model), "-o", str(out), *data, *options]


def plan_command(calibration: Path, out: Path, method: str, remove: str) -> list[str]:
    """Return the command that makes a plan."""
    return [*MOETAILOR, "plan", str(calibration), "-o", str(out), "--method", method, "--remove", remove]


def apply_command(model: Path, plan: Path, out: Path, calibration: Path) -> list[str]:
    """Return the command that carries a plan out."""
    return [*MOETAILOR, "apply", str(model), str(plan), "-o", str(out), "--calibration", str(calibration)]


def drop_cache(folder: Path) -> None:
    """Let the kernel forget the cached pages of a folder's files, so that the next read comes from the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # only clean pages can be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def provenance() -> dict[str, str | int]:
    """Say which commit was measured on what."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else ""),
        "machine": f"{os.cpu_count()} CPUs, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
