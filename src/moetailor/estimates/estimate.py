"""An estimate: seconds, memory, and what is read and written; and the machine that it is for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from moetailor.checkpoint.devices import is_apart, resolve_device
from moetailor.checkpoint.models import resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.rates import Rates, measured_rates, resident_now
from moetailor.estimates.sizes import files_of
from moetailor.planning.work import Work
from moetailor.words import nbytes

# Shares of the rate of products of large matrices that kinds of work reach, as measured, see docs/estimates.md.
PRODUCTS, DOUBLES, SPECTRA = 0.7, 0.35, 0.3
# Bytes of libraries' code that is read into memory once a process computes, and not before: 25 to 31 MB were seen.
LIBRARIES = 30 * 10**6
# Stages of one process that each bring as much more: 60 MB were seen after two, 90 to 130 after three.
BROUGHT = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a stage will take.

    Attributes:
        verb: which.
        seconds: how long; None where nobody could say.
        why: why not, else empty.
        memory: bytes of the process's memory, at most.
        device_memory: bytes on its GPU, at most; None without one.
        reads: bytes that it reads.
        writes: bytes that are there at the end.
        meanwhile: bytes on the disk while it runs, beside these.
        downloads: bytes that the hub would give first.
        notes: what else there is to say.
    """

    verb: str
    seconds: float | None
    why: str = ""
    memory: int
    device_memory: int | None = None
    reads: int
    writes: int
    meanwhile: int = 0
    downloads: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """Return the numbers as JSON values."""
        return {"format": "moetailor-estimate", "version": 1, **asdict(self)}

    def lines(self) -> list[str]:
        """Return it in a few short lines."""
        told = f"not foretold: {self.why}" if self.seconds is None else f"about {duration(self.seconds)}"
        device = "" if self.device_memory is None else f", {nbytes(self.device_memory)} on the device"
        meanwhile = f", {nbytes(self.meanwhile)} more on the way" if self.meanwhile else ""
        downloads = f", after a download of {nbytes(self.downloads)}" if self.downloads else ""
        return [
            f"time:   {told}{downloads}",
            f"memory: {nbytes(self.memory)}{device}",
            f"disk:   reads {nbytes(self.reads)}, writes {nbytes(self.writes)}{meanwhile}",
            *self.notes,
        ]


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine, as a process finds it that has opened what it works on and read nothing of it.

    Attributes:
        device: where work is done.
        startup: seconds that it took to come here: so many it takes another time, too.
        rates: what was measured.
        resident: bytes of memory that the process has.
    """

    device: str
    startup: float
    rates: Rates
    resident: int

    @classmethod
    def measured(cls, began: float, original: Original | None, *, device: str | None, dtype: str | None = None) -> Self:
        """Measure it.

        Args:
            began: when the process did, by `time.perf_counter`.
            original: what will be read; None where no checkpoint is.
            device: where work is done; CUDA when there is one.
            dtype: dtype of the run; as `resolve_dtype` has it.
        """
        device, startup = resolve_device(device), time.perf_counter() - began
        run = torch.float32 if original is None else resolve_dtype(dtype, device, original.checkpoint)
        found = measured_rates(device, run, files_of(original) if original else ())
        return cls(device=device, startup=startup, rates=found, resident=resident_now())

    def seconds(self, work: Work, *, moved: int = 0) -> float:
        """Return the seconds that work takes, with those to start.

        Args:
            work: the work.
            moved: bytes that are read or written.
        """
        rates = self.rates
        flops = work.products / PRODUCTS + work.doubles / DOUBLES + work.spectra / SPECTRA
        reading = moved / rates.reading if rates.reading else 0.0
        return (
            self.startup + flops / rates.products + work.elements / rates.elements + work.steps * rates.step + reading
        )

    def memory(self, taken: int, mapped: int = 0) -> dict[str, Any]:
        """Return where memory is taken, as `Estimate` has it.

        Args:
            taken: bytes that work takes where it is done.
            mapped: bytes of files that pass through memory on the way to a device.
        """
        if is_apart(self.device):
            return {"memory": self.resident + mapped, "device_memory": taken}
        return {"memory": self.resident + taken}


def nothing(verb: str, host: Host) -> Estimate:
    """Return what a verb takes that finds all of its work done."""
    return Estimate(verb=verb, seconds=host.startup, **host.memory(0), reads=0, writes=0)


def in_turn(verb: str, parts: Sequence[Estimate], startup: float) -> Estimate:
    """Return what stages take that one process runs one after the other, each with the code that those before it read.

    Args:
        verb: what does.
        parts: their estimates, each with the seconds that a process takes to start.
        startup: these.
    """
    times = [part.seconds - startup for part in parts if part.seconds is not None]
    devices = [part.device_memory for part in parts if part.device_memory is not None]
    return Estimate(
        verb=verb,
        seconds=startup + sum(times) if len(times) == len(parts) else None,
        why="; ".join(dict.fromkeys(part.why for part in parts if part.why)),
        memory=max(part.memory + LIBRARIES * min(before, BROUGHT) for before, part in enumerate(parts)),
        device_memory=max(devices) if devices else None,
        reads=sum(part.reads for part in parts),
        writes=sum(part.writes for part in parts),
        meanwhile=max(part.meanwhile for part in parts),
        downloads=max(part.downloads for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def duration(seconds: float) -> str:
    """Return a time as people say it, with as many digits as an estimate has."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 10 * 3600 else f"{seconds / 3600:,.0f} h"
