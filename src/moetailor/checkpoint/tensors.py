"""Safetensors files of our own: read whole or refused, and known by a hash of what is in them.

The hash is over the tensors, not over the file: what is read is what is hashed, without a second pass over the disk,
and a part of a large file can be read and checked alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from moetailor.errors import CheckpointError, MoetailorError, out_of_memory


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of tensors: of their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return found.hexdigest()[:32]


def is_finite(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is finite: where its least and greatest numbers are, as NaN would be both.

    In bfloat16 that takes a fortieth of the time of looking at each number, and no memory.
    """
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_stored(tensor: torch.Tensor, what: str) -> None:
    """Refuse numbers that became infinite when they were rounded to the dtype that they are stored in.

    Args:
        tensor: as it is stored.
        what: its name in the message.

    Raises:
        CheckpointError: see above.
    """
    if tensor.is_floating_point() and not is_finite(tensor):
        most, dtype = torch.finfo(tensor.dtype).max, str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{what} has numbers beyond {most:,.0f}, the most that {dtype} holds; store the original in bfloat16 or "
            "float32 first, and use that"
        )


def read_tensors(
    file: Path,
    prefix: str = "",
    *,
    names: Collection[str] = (),
    known: str | None = None,
    error: type[MoetailorError],
    cure: str,
) -> dict[str, torch.Tensor]:
    """Read the tensors of a file whose names begin with a prefix, by the rest of their names.

    Args:
        file: a safetensors file that moetailor wrote.
        prefix: which tensors.
        names: those that must be there, without the prefix.
        known: their hash when they were written, where that is known.
        error: what is raised.
        cure: what to do about a file that cannot be used: the end of the message.

    Raises:
        MoetailorError: of the given class: the file cannot be read, or holds other values than were written.
    """
    if not file.is_file():
        raise error(f"{file}: {'no ordinary file' if file.exists() else 'missing'}; {cure}")
    try:
        file.open("rb").close()  # safetensors calls whatever it cannot open missing
        with safe_open(file, "pt") as tensors:
            there = [name for name in tensors.keys() if name.startswith(prefix)]
            found = {name.removeprefix(prefix): tensors.get_tensor(name) for name in there}
    except Exception as reason:  # whatever damage makes safetensors and torch raise
        if out_of_memory(reason):
            raise
        raise error(f"{file}: cannot be read ({reason}); {cure}") from None
    if lost := set(names) - found.keys():
        raise error(f"{file}: lacks {', '.join(prefix + name for name in sorted(lost))}; {cure}")
    if known is not None and digest(found) != known:
        raise error(f"{file}: holds other values than were written, it is damaged or of another run; {cure}")
    return found
