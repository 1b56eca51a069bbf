"""How kernels reach elements: rows that describe segments, tiles of these, loads and stores.

A launch walks the tiles of the segments (tensors) of one class: equal dtypes, linear or not, aligned or
not. Arguments that kernels have in common:

    rows: of the segments of one class. See words.py for what is in them.
    tile_rows, tiles: the row of each tile, which is BLOCK elements of one segment; how many there are.
    dims: sizes and strides of all segments that are not linear.
    hyper: float64 ``[groups, 6]``, see :class:`rose_ops.definitions.Hyper`.
    inv_scale, clip: what gradients are multiplied by; ``clip`` is [selective tensors, others].
    rank_inactive: whether elements that cannot move are ranked (1), or selected in any case (0).
    operand: that gradients are; 0 in a ranking and 1 in an update, where parameters come first.
    found_inf: not 0: nothing is to be done.
    record: of a selection, see :class:`rose_ops.definitions.Field`; of an update, with two more counts.
    upper, lower: the fractions kept, in units of 1e-9.
    D0 to D3: dtypes of operands: 0 for float32, 1 for bfloat16, 2 for float16.
    LINEAR, ALIGNED: whether operands are contiguous, and fit for accesses of 16 bytes.
    SECOND: whether keys are second-order ones, for which there are first moments.
    BLOCK: elements of a tile.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.elements import INFINITY_KEY, abs_bits, bits_float, risk_key

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {}
"""Each kernel, and what it has to be launched with, which is what the tests compile it with."""


def kernel(registers: int = 64, num_warps: int = 4) -> Callable[[Callable[..., None]], Any]:
    """A kernel that is compiled once for each set of constants.

    By default, Triton has other code for numbers that are 1 or divisible by 16, and for addresses that
    are: minutes of compiling, for tables of which single words are read.

    Args:
        registers: of a thread, at most. Releases of Triton differ in what they would take.
    """

    def decorate(function: Callable[..., None]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        numbers = [p.name for p in parameters if p.annotation != "tl.constexpr"]
        made = triton.jit(function, do_not_specialize=numbers)
        # Without fusion, every product and sum is rounded.
        options = {"num_warps": num_warps, "maxnreg": registers, "enable_fp_fusion": False}
        KERNELS[function.__name__] = made, options
        return made

    return decorate


@triton.jit
def load(address, at, valid, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 of any of the dtypes; bfloat16 widens on integers."""
    if DTYPE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        x = tl.load(pointer + at, mask=valid, other=0.0)
    elif DTYPE == 1:
        pointer = address.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        x = bits_float(tl.load(pointer + at, mask=valid, other=0).to(tl.int32) << 16)
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        x = tl.load(pointer + at, mask=valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def store(address, at, x, valid, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To nearest, ties to even; bfloat16 on integers."""
    if DTYPE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + at, x, mask=valid)
    elif DTYPE == 1:
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        store_bits(address, at, tl.where(abs_bits(x) > INFINITY_KEY, 0x7FC0, rounded), valid, ALIGNED)
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + at, x.to(tl.float16), mask=valid)


@triton.jit
def store_bits(address, at, bits, valid, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, bits.to(tl.int16), mask=valid)


@triton.jit
def locate(
    row, dims, index, operand, LINEAR: tl.constexpr, ROWS: tl.constexpr = False
):  # fmt: skip
    """Where the elements ``index`` (row-major) of one operand are in its memory. ROWS: a row each."""
    if LINEAR:
        return index
    at = tl.zeros_like(index)
    first = tl.load(row + words.FIRST_DIM)
    count = tl.load(row + words.DIMS)
    most = count
    if ROWS:
        most = tl.max(count)
    for k in range(0, most):
        used = k < count
        dim = dims + (first + count - 1 - k) * words.DIM  # size, strides
        size = tl.load(dim, mask=used, other=1)
        rest = index // size
        at += (index - rest * size) * tl.load(dim + 1 + operand, mask=used, other=0)
        index = rest
    return tl.where(count == 0, index, at)


@triton.jit
def share_of(count, size):
    """What this program has to do of ``count`` things, ``size`` at a time."""
    return tl.program_id(0).to(tl.int64) * size, count.to(tl.int64), tl.num_programs(0) * size


@triton.jit
def tile_of(rows, tile_rows, tile, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Row of a tile's segment, and the elements of the tile."""
    row = rows + tl.load(tile_rows + tile).to(tl.int64) * words.COLUMNS
    start = (tile - tl.load(row + words.FIRST_TILE)) * BLOCK
    index = start + tl.arange(0, BLOCK).to(tl.int64)
    n = tl.load(row + words.N)
    if ALIGNED:  # else the mask would make accesses scalar
        n = tl.multiple_of(n, 16)
    return row, index, index < n


@triton.jit
def keys_of_tile(
    row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, operand,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, ROWS: tl.constexpr = False,
):  # fmt: skip
    """Keys of gradients (this operand, of dtype D0) and first moments (the next, D1)."""
    at = locate(row, dims, index, operand, LINEAR, ROWS)
    g = load(tl.load(row + words.DATA + operand), at, valid, D0, ALIGNED)
    m = g
    alpha = 1.0
    if SECOND:
        at = locate(row, dims, index, operand + 1, LINEAR, ROWS)
        m = load(tl.load(row + words.DATA + operand + 1), at, valid, D1, ALIGNED)
        alpha = (1.0 - tl.load(hyper + tl.load(row + words.GROUP) * words.HYPER)).to(tl.float32)
    return risk_key(g * tl.load(inv_scale) * tl.load(clip), m, alpha, rank_inactive, SECOND)


@triton.jit
def mask_bits(row, index, valid, WHICH: tl.constexpr):
    """The bits of a captured mask; 0 where it is of another kind."""
    some = valid & (index * 0 + tl.load(row + words.MASK_KINDS + WHICH) == words.MASK_OF_BITS)
    pointer = tl.load(row + words.MASKS + WHICH).to(tl.pointer_type(tl.uint8))
    byte = tl.load(pointer + index // 8, mask=some, other=0).to(tl.int32)
    return (byte >> (index % 8).to(tl.int32)) & 1


@triton.jit
def store_mask_bits(row, tile, selected, BLOCK: tl.constexpr):
    """One bit for each element, 8 to a byte, the lowest first."""
    bit = selected.to(tl.int32).reshape([BLOCK // 8, 8])
    byte = tl.sum(bit << tl.arange(0, 8)[None, :], axis=1)
    start = (tile - tl.load(row + words.FIRST_TILE)) * (BLOCK // 8)
    at = start + tl.arange(0, BLOCK // 8).to(tl.int64)
    pointer = tl.load(row + words.BITS).to(tl.pointer_type(tl.uint8))
    tl.store(pointer + at, byte.to(tl.uint8), mask=at * 8 < tl.load(row + words.N))
