"""Sums of squares, in a fixed order, in double precision."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import kernel, load, tile_of


@kernel()
def squares_kernel(
    rows, tile_rows, tiles, inv_scale, partial, ACCESS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of each tile, to ``partial``."""
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
        x = (load(t, words.GRAD, ACCESS) * tl.load(inv_scale)).to(tl.float64)
        x = tl.where(t.valid, x, 0.0)
        tl.store(partial + tile, tl.sum(x * x))


PARTS = tl.constexpr(256)  # sums of tiles at a time


@kernel()
def sums_kernel(rows, partial, sums, BLOCK: tl.constexpr):
    """The sum of each segment from those of its tiles. A program for each."""
    row = rows + tl.program_id(0).to(tl.int64) * words.COLUMNS
    tiles = (tl.load(row + words.N) + BLOCK - 1) // BLOCK
    tile = partial + tl.load(row + words.FIRST_TILE)
    parts = tl.zeros([PARTS], tl.float64)
    for start in range(0, tiles, PARTS):
        part = start + tl.arange(0, PARTS)
        parts += tl.load(tile + part, mask=part < tiles, other=0.0)
    tl.store(sums + tl.load(row + words.INDEX), tl.sum(parts))
