"""Rows of codes on a GPU, in one pass: each is looked up, and scaled or multiplied with inputs, where it is read.

What `compiled` is on a CPU. Through torch every step would go over all weights in memory as float32. Shapes: n
matrices, P inputs, O outputs, I inputs of a matrix, B bytes of a row, G groups.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# Triton is where GPUs are, calls its functions as `kernel[grid](...)`, and gives their arguments types of its own.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moetailor.checkpoint.devices import launching
from moetailor.checkpoint.storage.lookup import Lookup

# Outputs and inputs that a program looks up at a time.
BLOCK = {"ROWS": 16, "COLUMNS": 256}


@triton.jit
def _weights(
    row, column, octets, length, table, scale, zero, groups, inputs, SIZE: tl.constexpr,
    BITS: tl.constexpr, EACH: tl.constexpr, STRIDE: tl.constexpr, HALF: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Return s (q - z), float32, of some rows [R, 1] and columns [1, C]; what lies beyond a row counts for nothing."""
    there = column < inputs
    bit = column // EACH * BITS
    first = octets + row * length + (bit >> 3)
    code = tl.load(first, mask=there, other=0).to(tl.int32)
    if 8 % BITS != 0:  # codes lie across bytes
        code |= tl.load(first + 1, mask=there & ((bit >> 3) + 1 < length), other=0).to(tl.int32) << 8
    code = (code >> (bit & 7)) & ((1 << BITS) - 1)
    if HALF:
        number = (code - (1 << (BITS - 1))).to(tl.float32)
    else:
        number = tl.load(table + code * STRIDE + column % EACH)
    group = row * groups + column // SIZE
    if ZEROS:
        number -= tl.load(zero + group, mask=there, other=0).to(tl.float32)
    return number * tl.load(scale + group, mask=there, other=0).to(tl.float32)


@triton.jit
def _numbers(
    out, octets, length, table, scale, zero, groups, rows, inputs, SIZE: tl.constexpr,
    BITS: tl.constexpr, EACH: tl.constexpr, STRIDE: tl.constexpr, HALF: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # What lies before the rows of a program may be more than 32 bits can count, what lies between them is not.
    start = tl.program_id(0).to(tl.int64) * ROWS
    octets, scale, zero = octets + start * length, scale + start * groups, zero + start * groups
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (start + row < rows) & (column < inputs)
    row = tl.where(start + row < rows, row, 0)
    found = _weights(
        row, column, octets, length, table, scale, zero, groups, inputs, SIZE, BITS, EACH, STRIDE, HALF, ZEROS
    )
    tl.store(out + start * inputs + row * inputs + column, found.to(out.dtype.element_ty), mask=there)


@triton.jit
def _products(
    out, x, number, octets, length, table, scale, zero, groups, outputs, inputs: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, EACH: tl.constexpr, STRIDE: tl.constexpr, HALF: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair, output = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix = tl.load(number + pair).to(tl.int64)
    sums = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    if matrix >= 0:
        before = matrix * outputs
        octets, scale, zero = octets + before * length, scale + before * groups, zero + before * groups
        row = tl.minimum(output, outputs - 1)[:, None]
        for start in range(0, inputs, COLUMNS):
            column = (start + tl.arange(0, COLUMNS))[None, :]
            given = tl.load(x + pair * inputs + column, mask=column < inputs, other=0).to(tl.float32)
            sums += given * _weights(
                row, column, octets, length, table, scale, zero, groups, inputs, SIZE, BITS, EACH, STRIDE, HALF, ZEROS
            )
    tl.store(out + pair * outputs + output, tl.sum(sums, 1), mask=output < outputs)


def numbers(
    octets_nOB: torch.Tensor,
    found: Lookup | None,
    scale_nOG: torch.Tensor,
    zero_nOG: torch.Tensor | None,
    size: int,
    inputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return W, s (q - z), [n, O, I]: exact in float32, then rounded once to a dtype.

    Args:
        octets_nOB: codes, as bytes.
        found: what they stand for; None for bytes less 128.
        scale_nOG: scales.
        zero_nOG: zero points; None where there are none.
        size: inputs of a group.
        inputs: of a matrix.
        dtype: of the numbers.
    """
    (count, outputs, _), rows = octets_nOB.shape, octets_nOB.shape[0] * octets_nOB.shape[1]
    out = torch.empty(count, outputs, inputs, dtype=dtype, device=octets_nOB.device)
    grid = (triton.cdiv(rows, BLOCK["ROWS"]), triton.cdiv(inputs, BLOCK["COLUMNS"]))
    codes, constants = _codes(octets_nOB, found, scale_nOG, zero_nOG, size)
    if rows:
        with launching(out):
            _numbers[grid](out, *codes, rows, inputs, **constants)
    return out


def picked(
    x_PI: torch.Tensor,
    number_P: torch.Tensor,
    octets_nOB: torch.Tensor,
    found: Lookup | None,
    scale_nOG: torch.Tensor,
    zero_nOG: torch.Tensor | None,
    size: int,
) -> torch.Tensor:
    """Return x W^T of each input with the matrix of its number, float32 [P, O]; zeros where that is negative.

    Args:
        x_PI: inputs.
        number_P: of the matrices.
        octets_nOB: codes, as bytes.
        found: what they stand for; None for bytes less 128.
        scale_nOG: scales.
        zero_nOG: zero points; None where there are none.
        size: inputs of a group.
    """
    outputs, inputs = octets_nOB.shape[1], x_PI.shape[1]
    out = torch.empty(len(x_PI), outputs, device=x_PI.device)
    grid = (len(x_PI), triton.cdiv(outputs, BLOCK["ROWS"]))
    codes, constants = _codes(octets_nOB, found, scale_nOG, zero_nOG, size)
    with launching(out):
        _products[grid](out, x_PI.contiguous(), number_P.contiguous(), *codes, outputs, inputs, **constants)
    return out


def _codes(
    octets_nOB: torch.Tensor, found: Lookup | None, scale_nOG: torch.Tensor, zero_nOG: torch.Tensor | None, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what both kernels are told of codes: tensors and sizes, and what they are compiled for."""
    bits, scale = found.bits if found else 8, scale_nOG.contiguous()
    half = found is None or found.told == "integers"
    # A code's own row of the table: others that are looked up with it are zero there.
    table = scale if half or found is None else found.table
    stride = 1 if half or found is None else table.shape[1]
    each = 1 if half or found is None else stride // found.codes
    zero = scale if zero_nOG is None else zero_nOG.contiguous()
    codes = (octets_nOB.contiguous(), octets_nOB.shape[2], table, scale, zero, scale.shape[2])
    told = {"SIZE": size, "BITS": bits, "EACH": each, "STRIDE": stride, "HALF": half, "ZEROS": zero_nOG is not None}
    return codes, told | BLOCK
