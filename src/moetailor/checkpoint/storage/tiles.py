"""Products of bfloat16 in the tiles of a CPU (Intel's AMX), for loops that numba compiles.

A tile has sixteen rows of 64 bytes: as many numbers of float32, or twice as many of bfloat16, which lie in memory one
behind the other. Of a matrix that stands on the right each row has two inputs of sixteen outputs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core.registry import cpu_target

from moetailor.checkpoint.devices import HAS_TILES
from moetailor.checkpoint.storage.vectors import (
    BFLOAT,
    FLOAT,
    HALF,
    LANES,
    OCTET,
    SIXTEEN,
    WORD,
    called,
    codes_of,
    has,
    instructions,
    of,
    place,
    read,
    spread,
)

# Numbers of bfloat16 in a row of a tile; outputs that are multiplied at once: the rows of all their weights lie in a
# second cache, and four tiles hold their sums.
DEPTH, BLOCK = 2 * LANES, 4 * LANES
# Whether loops may have tiles: numba may compile for another CPU, and Linux gives them only to who asks.
NEEDED = ("amx-bf16", "avx512bw", "avx512bf16")
ARE_HERE = HAS_TILES and all(has(cpu_target.target_context, each) for each in NEEDED) and torch.cpu._init_amx()
ROW, VOID = ir.IntType(64)(64), ir.VoidType()
# What the CPU is told of its eight tiles: the format's number, bytes of a row from byte 16 on, and rows from 48 on.
SHAPES = np.zeros(64, np.uint8)
SHAPES[0], SHAPES[16:32:2], SHAPES[48:56] = 1, 64, LANES


def _of_tiles(name: str, *tiles: Any) -> Any:
    """Return what a function for loops gives that does something with tiles, and nothing else."""

    def made(context: Any, builder: Any, _signature: Any, _given: Any) -> Any:
        called(builder, f"x86.{name}", VOID, *(OCTET(tile.literal_value) for tile in tiles))
        return context.get_dummy_value()

    return numba.void(*tiles), made


def _of_memory(name: str, tile: Any, array: Any, at: Any) -> Any:
    """Return the same for a tile and an array, from one of its numbers on."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        found = place(context, builder, array, given[1], given[2], OCTET)
        called(builder, f"x86.{name}", VOID, OCTET(tile.literal_value), found, ROW)
        return context.get_dummy_value()

    return numba.void(tile, array, at), made


@instructions
def begin(_typing: Any, shapes: Any) -> Any:
    """Give this thread its tiles; `SHAPES` is to be handed over."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        called(builder, "x86.ldtilecfg", VOID, place(context, builder, shapes, given[0], ir.IntType(64)(0), OCTET))
        return context.get_dummy_value()

    return numba.void(shapes), made


@instructions
def end(_typing: Any) -> Any:
    """Take them back: a thread that holds tiles is slower to stop and start."""
    return _of_tiles("tilerelease")


@instructions
def cleared(_typing: Any, tile: Any) -> Any:
    """Fill a tile with zeros."""
    return _of_tiles("tilezero", tile)


@instructions
def taken(_typing: Any, tile: Any, array: Any, at: Any) -> Any:
    """Fill a tile from an array."""
    return _of_memory("tileloadd64", tile, array, at)


@instructions
def multiplied(_typing: Any, sums: Any, left: Any, right: Any) -> Any:
    """Add the product of two tiles to a third one: its rows are those of the left one."""
    return _of_tiles("tdpbf16ps", sums, left, right)


@instructions
def kept(_typing: Any, tile: Any, array: Any, at: Any) -> Any:
    """Write a tile into an array."""
    return _of_memory("tilestored64", tile, array, at)


@instructions
def levels(_typing: Any, bits: Any, less: Any, by: Any) -> Any:
    """Return what all integers of at most five bits stand for, s (q - z), as DEPTH numbers of bfloat16."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        half = 1 << (bits.literal_value - 1)
        units = ir.Constant(of(FLOAT, DEPTH), [float(code % (2 * half) - half) for code in range(DEPTH)])
        less, by = (spread(builder, number, DEPTH) for number in given[1:])
        found = builder.fptrunc(builder.fmul(builder.fsub(units, less), by), of(BFLOAT, DEPTH))
        return builder.bitcast(found, of(FLOAT))

    return SIXTEEN(bits, numba.float32, numba.float32), made


@instructions
def looked_up(_typing: Any, bits: Any, row: Any, at: Any, levels: Any, out: Any, to: Any) -> Any:
    """Write what DEPTH codes stand for into an array: a CPU with tiles looks up so many at once."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        codes, kind = codes_of(context, builder, row, given[1], given[2], bits.literal_value, DEPTH), of(HALF, DEPTH)
        found = called(builder, "x86.avx512.permvar.hi.512", kind, builder.bitcast(given[3], kind), codes)
        builder.store(found, place(context, builder, out, given[4], given[5], kind)).align = 1
        return context.get_dummy_value()

    return numba.void(bits, row, at, levels, out, to), made


@instructions
def turned(_typing: Any, array: Any, at: Any, out: Any, to: Any) -> Any:
    """Write a tile of float32 turned over, in bfloat16: sixteen rows, so many behind each other as `BLOCK` says."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        count, kind = given[1].type, of(FLOAT)
        rows = [
            read(context, builder, array, given[0], builder.add(given[1], count(LANES * row)), kind)
            for row in range(LANES)
        ]
        step = LANES
        while step := step // 2:
            # Of two rows the halves, quarters, ... that stand crosswise change places.
            first = [lane + (LANES - step if lane & step else 0) for lane in range(LANES)]
            masks = [ir.Constant(of(WORD), [lane + more for lane in first]) for more in (0, step)]
            for row in range(LANES):
                if not row & step:
                    both = rows[row], rows[row + step]
                    rows[row], rows[row + step] = (builder.shuffle_vector(*both, mask) for mask in masks)
        for lane, row in enumerate(rows):
            found = builder.bitcast(builder.fptrunc(row, of(BFLOAT)), of(HALF))
            where = place(context, builder, out, given[2], builder.add(given[3], count(BLOCK * lane)), found.type)
            builder.store(found, where).align = 1
        return context.get_dummy_value()

    return numba.void(array, at, out, to), made
