"""Devices: which one a name means, and how much work is best done together there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from typing import Any, TypeVar

import psutil
import torch
from torch.nn import functional

from moetailor.errors import MoetailorError, out_of_memory, reason_of

Item = TypeVar("Item")
Found = TypeVar("Found")

# Builds of torch for CUDA bring it, but for Windows. Known before graphs are traced, which cannot look for it.
HAS_TRITON = find_spec("triton") is not None
# Whether this CPU multiplies bfloat16 in tiles (AMX), and inputs that these take at once; older torch does not say.
HAS_TILES = bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
TILE = 32


def has_gpu() -> bool:
    """Say whether torch finds a GPU here."""
    return torch.cuda.is_available()


def resolve_device(name: str | None) -> str:
    """Return the device to run on: the one named, else ``cuda`` where there is one, else ``cpu``.

    Raises:
        MoetailorError: the device cannot be used here.
    """
    if name is None:
        return "cuda" if has_gpu() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        told = f"cannot be used here ({reason_of(error)}); use another one, such as cpu"
        raise MoetailorError(f"device {name!r} {told}") from None
    if torch.device(name).type == "meta":
        raise MoetailorError(f"device {name!r} holds no numbers; use another one, such as cpu")
    return name


def working_nbytes(device: torch.device) -> int:
    """Return the bytes that work done together may take on a device: 1 GiB, and a quarter of a GPU's free memory."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30


def free_nbytes(device: str) -> int:
    """Return the bytes of memory that are free on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def in_batches(items: Sequence[Item], at_once: int, work: Callable[[Sequence[Item]], Found]) -> Iterator[Found]:
    """Yield what the work gives for some items at a time; where memory does not suffice, for half as many, once.

    Args:
        items: the items.
        at_once: how many of them, at most.
        work: called with some items.

    Raises:
        MoetailorError: memory does not suffice for fewer either.
    """
    start, halved = 0, False
    while start < len(items):
        some = items[start : start + at_once]
        try:
            found = work(some)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error) is None:
                raise
            if halved or len(some) == 1:
                told = f"{len(some)} at once are too many for the device's memory ({reason_of(error)})"
                raise MoetailorError(f"{told}; give less with --batch-memory, or another --device") from None
            at_once, halved = len(some) // 2, True
            continue
        yield found
        start += len(some)


def passing_nbytes(device: torch.device) -> int:
    """Return the bytes of numbers that are made and soon needed no more at which a device is fastest: as many as caches
    hold; on a GPU, where each step costs a launch, more.
    """
    return 2**26 if device.type == "cuda" else 2**20


def formed(device: torch.device) -> int:
    """Return how many weights are best turned into numbers at the same time: on a GPU many, for the launches."""
    return 2**27 if device.type == "cuda" else 2**21


def in_tiles(tensor: torch.Tensor) -> bool:
    """Return whether products of a tensor are those of a CPU's tiles, one by one: of bfloat16, outside graphs."""
    on_cpu = HAS_TILES and tensor.device.type == "cpu"
    return on_cpu and tensor.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def evened(x_PI: torch.Tensor) -> torch.Tensor:
    """Return inputs of a product of bfloat16 in tiles, with as many zeros more as it is best given: torch compiles one
    for each number of inputs, which takes longer than the product, and tiles take 16 or 32 at a time anyway. Few are
    soon all known.
    """
    # 16 and a multiple of 32: 48, 80, 112 and 144 inputs take .50, .68, .88 and 1.15 ms where 64, 96 and 128 take .66,
    # .96 and 1.24 (a matrix of 1024 x 2048, one thread of an Intel with AMX).
    more = (TILE // 2 - len(x_PI)) % TILE if in_tiles(x_PI) and len(x_PI) > TILE else 0
    return functional.pad(x_PI, (0, 0, 0, more)) if more else x_PI


def multiplied(x_PI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Return x W^T, [P, O]; in tiles the matrix stands on the left, where it is read as it lies: what stands on the
    right is first copied into another order. Then outputs lie in columns, as the next product wants its inputs.
    """
    if not in_tiles(x_PI):
        return functional.linear(x_PI, weight_OI)
    return (weight_OI @ evened(x_PI).T).T[: len(x_PI)]


def runs_compiled(tensor: torch.Tensor) -> bool:
    """Return whether loops compiled for a CPU may run on a tensor: neither graphs nor gradients can follow them, and
    traces of `torch.jit` would take what they give for constants.
    """
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tensor.device.type == "cpu" and not in_graph and not tensor.requires_grad


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Return whether kernels written in Triton may run on a tensor, in graphs too; gradients cannot follow them."""
    return HAS_TRITON and tensor.device.type == "cuda" and not tensor.requires_grad


def launching(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels start where a tensor is, as torch's own do, and not on the first of several
    GPUs; graphs see to that themselves.
    """
    if tensor.device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def is_apart(device: str) -> bool:
    """Return whether a device has memory of its own, into which numbers must be moved."""
    return torch.device(device).type != "cpu"


def give_back() -> None:
    """Give memory that was freed back to the system: glibc keeps it, and the next stage's peak would stand on top."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def finish(device: torch.device | str) -> None:
    """Wait until a device has done all that it was asked for; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_own(number: int) -> None:
    """Make ``cuda`` mean another GPU in each process of a machine, where it has GPUs.

    Args:
        number: of the process.
    """
    if has_gpu():
        torch.cuda.set_device(number % torch.cuda.device_count())
