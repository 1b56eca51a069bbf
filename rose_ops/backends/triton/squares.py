"""Sums of squares, in a fixed order, in double precision."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import kernel, load, locate, tile_of


@kernel()
def squares_kernel(
    rows, tile_rows, tiles, dims, inv_scale, partial, base,
    D0: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of squares of each tile, in a fixed order."""
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
        x = load(tl.load(row + words.DATA), locate(row, dims, index, 0, LINEAR), valid, D0, ALIGNED)
        x = tl.where(valid, (x * tl.load(inv_scale)).to(tl.float64), 0.0)
        tl.store(partial + base + tile, tl.sum(x * x))


@kernel()
def sums_kernel(rows, partial, base, sums, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The sum of each segment from those of its tiles. A program each."""
    row = rows + tl.program_id(0).to(tl.int64) * words.COLUMNS
    tiles = (tl.load(row + words.N) + BLOCK - 1) // BLOCK
    tile = partial + base + tl.load(row + words.FIRST_TILE)
    parts = tl.zeros([PARTS], tl.float64)
    for start in range(0, tiles, PARTS):
        part = start + tl.arange(0, PARTS)
        parts += tl.load(tile + part, mask=part < tiles, other=0.0)
    tl.store(sums + tl.load(row + words.INDEX), tl.sum(parts))
