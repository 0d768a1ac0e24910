"""What flags say, as the library takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def read_menu(method: str, native: bool, parameters: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return the method that is meant, and its parameters."""
    if native and method.lower() != "auto":
        raise typer.BadParameter(f"--native: narrows what auto may choose; leave it out for {method}")
    if not native:
        return method, parameters
    return "refit", {"neurons": "chosen"} | parameters


def read_format(format: str, native: bool) -> Any:
    """Return the format that is meant."""
    if native and format not in ("auto", "native"):
        raise typer.BadParameter(f"--native: is a format too; leave --format {format} out")
    return "native" if native else format


def read_budget(
    method: str, remove: str | None, keep: int | None, size: str | None, memory: str | None, load_dtype: str | None
) -> Any:
    """Read the flags; a method that is of use without removing experts may go without."""
    import moetailor

    found = moetailor.METHODS.get(method.lower())
    if remove is keep is size is memory is None and found is not None and found.useful_whole:
        remove = "0%"
    return moetailor.Budget.parse(remove=remove, keep=keep, size=size, memory=memory, load_dtype=load_dtype)


def read_bits(bits: str | None, method: str, parameters: dict[str, str]) -> tuple[Any, Any]:
    """Read the width that experts are kept in; return it behind the method's parameters."""
    from moetailor.methods.registry import with_bits

    return (parameters, None) if bits is None else with_bits(method, parameters, bits)


def read_nbytes(text: str | None) -> int | None:
    """Read bytes that work may take."""
    from moetailor.planning.budget import parse_bytes

    found = None if text is None else parse_bytes(text, "--batch-memory")
    if found == 0:
        raise typer.BadParameter(f"--batch-memory {text}: nothing can be computed in no memory; leave it out")
    return found


def read_sample(tokens: int | None, size: str, seed: int | None) -> Any:
    """Read which tokens are kept whole."""
    import moetailor
    from moetailor.planning.budget import parse_bytes

    return moetailor.SampleOptions(tokens=tokens, nbytes=parse_bytes(size, "--sample-size"), seed=seed or 0)


def read_plan(file: Path) -> Any:
    """Read a plan that works for the model that it is for."""
    import moetailor
    from moetailor.planning.checks import check_plan

    plan = moetailor.Plan.load(file)
    check_plan(plan, plan.model)
    return plan


def read_parameters(entries: list[str] | None, uniform_layers: str | None = None) -> dict[str, str]:
    """Read ``name=value``, repeated.

    Args:
        entries: what was given.
        uniform_layers: the method, where it is to give each layer one number of bits.
    """
    if uniform_layers not in (None, "auto"):
        told = f"--uniform-layers: says how auto chooses bits; leave it out for {uniform_layers}"
        raise typer.BadParameter(told)
    pairs = [entry.partition("=") for entry in entries or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(f"--param {name}{equals}{value}: write name=value")
    names = [name for name, _, _ in pairs]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise typer.BadParameter(f"--param {twice[0]}: is given twice; give it once")
    found = {name: value for name, _, value in pairs}
    if uniform_layers is not None and found.setdefault("uniform_layers", "true").lower() not in ("true", "1"):
        raise typer.BadParameter(
            f"--uniform-layers and uniform_layers={found['uniform_layers']}: leave one of them out"
        )
    return found


def read_numbers(text: str | None) -> list[int] | None:
    """Read numbers and ranges."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            span = range(int(low), int(high if dash else low) + 1)
            if not 0 < len(span) < 10_000:
                raise ValueError
            numbers += span
        except ValueError:
            raise typer.BadParameter(f"--layers {text}: write numbers and ranges such as 0-7,12") from None
    return numbers


def read_pairs(entries: list[str] | None) -> list[tuple[int, int]]:
    """Read ``layer:expert``, repeated."""
    try:
        return [(int(layer), int(expert)) for layer, expert in (entry.split(":") for entry in entries or ())]
    except ValueError:
        raise typer.BadParameter(f"--protect {' '.join(entries or ())}: write layer:expert, such as 3:17") from None
