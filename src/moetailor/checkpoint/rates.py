"""How fast this machine is and what a process has taken of it: what estimates are made of, and held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from moetailor.checkpoint.devices import finish

# Seconds that each rate is measured for, after one run that does not count, and the bytes that are read at once.
SECONDS, CHUNK = 0.2, 2**23
# Rows and columns of the matrices, and numbers of the vectors: those of a layer, and what caches do not hold.
SIZE, NUMBERS = 1024, 2**23


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured here, in about a second.

    Attributes:
        products: FLOPs a second of matrix products.
        elements: numbers a second that one operation goes over.
        step: seconds that an operation takes whatever its size.
        reading: bytes a second of the disk, as warm as its cache is; None where there is nothing to read.
    """

    products: float
    elements: float
    step: float
    reading: float | None


def measured_rates(device: str, dtype: torch.dtype, files: Iterable[Path] = ()) -> Rates:
    """Measure this machine.

    Args:
        device: where work is to be done.
        dtype: dtype of the products.
        files: what is to be read; only the beginning of some is.
    """
    return replace(_computing(device, dtype), reading=_reading(files))


@cache
def _computing(device: str, dtype: torch.dtype) -> Rates:
    """Return the same without reading: it is measured once in a process."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(SIZE, SIZE, generator=generator).to(device, dtype)
    vector, other, small = (torch.zeros(numbers, device=device) for numbers in (NUMBERS, NUMBERS, 1))

    def a_second(run: Callable[[], object]) -> float:
        """Return how often something runs in a second, the first time left out."""
        run()
        began, count = time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < SECONDS or not count:
            run()
            finish(device)
            count += 1
        return count / taken

    return Rates(
        products=2 * SIZE**3 * a_second(lambda: matrix @ matrix),
        elements=NUMBERS * a_second(lambda: torch.add(vector, 1, out=other)),
        step=1 / a_second(lambda: small + 1),
        reading=None,
    )


def _reading(files: Iterable[Path]) -> float | None:
    """Return the bytes a second that files are read with, into memory of our own."""
    buffer = memoryview(bytearray(CHUNK))
    began, total = time.perf_counter(), 0
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                total += got
                if time.perf_counter() - began > SECONDS:
                    break
        if time.perf_counter() - began > SECONDS:
            break
    return total / (time.perf_counter() - began) if total else None


def resident_now() -> int:
    """Return the bytes that this process has in memory; 0 where the system does not say."""
    return _said("VmRSS")


def peak_nbytes() -> tuple[int, int]:
    """Return the most bytes that this process had in memory so far, and on its GPU; 0 where nobody says."""
    peak = _said("VmHWM")
    if not peak:
        try:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
        except ImportError:  # where there is no such module nobody says
            peak = 0
    return peak, torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def _said(name: str) -> int:
    """Return bytes that Linux says of this process."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
