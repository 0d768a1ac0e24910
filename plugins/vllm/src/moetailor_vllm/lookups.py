"""Codes of few bits as bytes, and what bytes stand for: rows of tables with 256, which is one read for several weights.

Shapes: C codes, B bytes, m codes of a byte, V numbers of a code, O outputs, n matrices.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional as F

# Weights of a code by bits of a weight, where codes are numbers of rows of a table.
CODE_WEIGHTS = {1: 8, 2: 4, 3: 2, 4: 2}
# Floats as codes: bits, and inputs that share a scale, all of a row where there are 0; blocks have as many outputs.
FLOATS: dict[str, tuple[int, int]] = {"fp8": (8, 0), "fp8b128": (8, 128), "mxfp4": (4, 32), "nvfp4": (4, 16)}
# What floats of 4 bits stand for, e2m1, those with a sign behind the others.
SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# How a code of so many bits is cut into parts of which bytes hold a whole number, from the lowest bit up.
PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
# A row of so many bytes is read as one number.
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def values_of(codes: str, bits: int) -> torch.Tensor:
    """Return what each code stands for before its scale, float32 [codes, weights of a code]."""
    if codes == "vq":
        books = safetensors.torch.load_file(Path(__file__).with_name("codebooks.safetensors"))
        return books[f"vq{bits}"].float()
    if codes in FLOATS and bits == 8:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:, None]
    if codes in FLOATS:
        return torch.tensor([[sign * size] for sign in (1, -1) for size in SIZES], dtype=torch.float32)
    # Codes and zero points are stored with 2^(b-1) added; without zero points this is what is left.
    return torch.arange(2**bits)[:, None].float() - (2 ** (bits - 1) if codes == "int" else 0)


def tables(values_CV: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a table for each part of a code, [256, m V]; what the parts give adds up to what the code stands for.

    Args:
        values_CV: what each code stands for; linear in its bits where a code has several parts.
        dtype: of the tables.
    """
    low, found = 0, []
    for width in PARTS[(len(values_CV) - 1).bit_length()]:
        code = torch.arange(256)[:, None] >> torch.arange(0, 8, width) & 2**width - 1
        part = values_CV[code << low] - (values_CV[0] if low else 0)
        found.append(part.flatten(1).to(dtype))
        low += width
    return found


def nbytes(bits: int, count: int) -> list[int]:
    """Return how many bytes each part of the codes of a row takes."""
    return [-(-count * width // 8) for width in PARTS[bits]]


def cut(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return stored codes part by part: bytes of the first part, then those of the next, uint8 [O, B].

    Args:
        words: codes from the lowest bit up, int32 words or bytes [O, ..].
        bits: of a code.
        count: codes of a row.
    """
    if len(PARTS[bits]) == 1:
        return words.contiguous().view(torch.uint8)[:, : nbytes(bits, count)[0]]
    code, low, found = unpacked(words, bits, count), 0, []
    for width in PARTS[bits]:
        each = F.pad(code >> low & 2**width - 1, (0, -count % (8 // width))).unflatten(-1, (-1, 8 // width))
        found.append((each << torch.arange(0, 8, width, device=code.device)).sum(-1).to(torch.uint8))
        low += width
    return torch.cat(found, -1)


def looked_up(octets: torch.Tensor, found: list[torch.Tensor], bits: int, count: int) -> torch.Tensor:
    """Return what codes stand for, [n, O, C V].

    Args:
        octets: as `cut` leaves them, [n, O, B].
        found: the tables of their parts.
        bits: of a code.
        count: codes of a row.
    """
    parts = octets.split(nbytes(bits, count), -1)
    total = None
    for part, table in zip(parts, found, strict=True):
        numbers = rows_of(table, part)[..., : count * table.shape[1] * PARTS[bits][0] // 8]
        total = numbers if total is None else total.add_(numbers)
    assert total is not None
    return total


def rows_of(table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return rows of a table one behind the other, [.., R numbers of a row]; row is uint8 [.., R]."""
    index, whole = row.flatten().int(), WHOLE.get(table[0].nbytes)
    if whole is None:
        numbers = table.index_select(0, index)
    else:
        numbers = table.view(whole).flatten().index_select(0, index).view(table.dtype)
    return numbers.view(*row.shape[:-1], -1)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first codes of rows of words as they are stored, int64 [..., count].

    Eight codes lie in as many bytes as a code has bits; put into eight bytes, these are one number.

    Args:
        words: int32 [..., W], codes from the lowest bit up.
        bits: of a code.
        count: codes of a row.
    """
    octets, eights = words.contiguous().view(torch.uint8), -(-count // 8)
    octets = F.pad(octets, (0, eights * bits - octets.shape[-1])).unflatten(-1, (eights, bits))
    eight = F.pad(octets, (0, 8 - bits)).view(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    return (eight >> shifts & 2**bits - 1).flatten(-2)[..., :count]
