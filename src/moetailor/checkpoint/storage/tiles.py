"""Products of bfloat16 in tiles, for loops that numba compiles: those of a CPU (Intel's AMX), or sixteen vectors.

A tile has sixteen rows of 64 bytes: as many numbers of float32, or twice as many of bfloat16, which lie in memory one
behind the other. Of a matrix that stands on the right each row has two inputs of sixteen outputs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from moetailor.checkpoint.devices import HAS_TILES
from moetailor.checkpoint.storage.halves import ARE_HERE, DEPTH
from moetailor.checkpoint.storage.vectors import (
    BFLOAT,
    FLOAT,
    HALF,
    LANES,
    OCTET,
    WORD,
    called,
    has,
    instructions,
    of,
    place,
    read,
    spread,
)

# Outputs that are multiplied at once: the rows of all their weights lie in a second cache, and four tiles hold their
# sums. Inputs of half a tile.
BLOCK, EIGHT = 4 * LANES, LANES // 2
# Linux gives tiles only to who asks.
IN_TILES = ARE_HERE and HAS_TILES and has(cpu_target.target_context, "amx-bf16") and torch.cpu._init_amx()
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
    """Give this thread its tiles, if there are some; `SHAPES` is to be handed over."""

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        if IN_TILES:
            where = place(context, builder, shapes, given[0], ir.IntType(64)(0), OCTET)
            called(builder, "x86.ldtilecfg", VOID, where)
        return context.get_dummy_value()

    return numba.void(shapes), made


@instructions
def end(_typing: Any) -> Any:
    """Take them back: a thread that holds tiles is slower to stop and start."""
    return _of_tiles("tilerelease") if IN_TILES else (numba.void(), lambda context, *_: context.get_dummy_value())


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
def summed(_typing: Any, rows: Any, at: Any, deep: Any, pairs: Any, start: Any, sums: Any, to: Any, some: Any) -> Any:
    """Write the product of a row of tiles with one of inputs into an array, in vectors: each has one output.

    Eight of a tile's sixteen inputs take half as long.
    """
    width = some.literal_value

    def made(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        count, kind, halves = given[1].type, of(FLOAT, width), of(BFLOAT, 2 * width)
        lanes = [cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * width)) for _ in range(LANES)]
        with cgutils.for_range_slice(builder, count(0), given[2], count(LANES * DEPTH), count) as (tile, _):
            with cgutils.for_range(builder, count(LANES)) as loop:
                pair = builder.add(
                    given[4], builder.add(builder.udiv(tile, count(2)), builder.mul(loop.index, count(LANES)))
                )
                right = builder.bitcast(read(context, builder, pairs, given[3], pair, of(WORD, width)), halves)
                first = builder.add(builder.add(given[1], tile), builder.mul(loop.index, count(2)))
                for row, lane in enumerate(lanes):
                    where = place(context, builder, rows, given[0], builder.add(first, count(DEPTH * row)), WORD)
                    left = builder.bitcast(spread(builder, builder.load(where), width), halves)
                    name = f"x86.avx512bf16.dpbf16ps.{32 * width}"
                    found = called(builder, name, kind, builder.load(lane), right, left)
                    builder.store(found, lane)
        for row, lane in enumerate(lanes):
            where = place(context, builder, sums, given[5], builder.add(given[6], count(LANES * row)), kind)
            builder.store(builder.load(lane), where).align = 1
        return context.get_dummy_value()

    return numba.void(rows, at, deep, pairs, start, sums, to, some), made


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
