"""How kernels reach elements: rows that describe segments, tiles of these, loads and stores.

Arguments that kernels have in common, and are passed by name:

    rows: of the segments of one class, that is, of equal Access. See words.py for what is in them.
    tile_rows, tiles: the row of each tile, which is BLOCK elements of one segment; how many there are.
    inv_scale, clip: what gradients are multiplied by; ``clip`` is [selective tensors, others].
    rank_inactive: whether elements that cannot move are ranked (1), or selected in any case (0).
    found_inf: not 0: nothing is to be done.
    record: of a selection, see definitions.Field; of an update, with two more counts.
    upper, lower: the fractions kept, in units of 1e-9.
    ACCESS: of the class.
    SECOND_ORDER: whether keys are second-order ones, for which there are first moments.
    BLOCK: elements of a tile.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.elements import (
    NO_KEY,
    bits_float,
    float_to_bf16,
    float_to_bf16_stochastic,
    risk_key,
    rounding_bits,
)

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


@dataclass(frozen=True)
class Access:
    """How a class of segments is accessed; a constant of kernels.

    Attributes:
        dtypes: of the operands; of those that are not there, None.
        dims: that an element's place is found by; 0: every operand is linear.
        aligned: for accesses of 16 bytes, which linear segments of whole vectors can have.
    """

    dtypes: tuple[tl.dtype | None, ...]
    dims: int
    aligned: bool

    @property
    def scattered(self) -> Access:
        """For elements that are not neighbours."""
        return replace(self, aligned=False)


class Tile(NamedTuple):
    """Elements. ``row`` is their segment's, or one for each of them; ``index`` is row-major."""

    row: Any
    index: Any
    valid: Any  # elsewhere, there is none


@triton.jit
def tile_of(rows, tile_rows, tile, ACCESS: tl.constexpr, BLOCK: tl.constexpr):
    row = rows + tl.load(tile_rows + tile).to(tl.int64) * words.COLUMNS
    start = (tile - tl.load(row + words.FIRST_TILE)) * BLOCK
    index = start + tl.arange(0, BLOCK).to(tl.int64)
    n = tl.load(row + words.N)
    if ACCESS.aligned:  # else the mask would make accesses scalar
        n = tl.multiple_of(n, 16)
    return Tile(row, index, index < n)


@triton.jit
def share_of(count, size):
    """Range of this program: of ``count`` things, ``size`` at a time."""
    return tl.program_id(0).to(tl.int64) * size, count.to(tl.int64), tl.num_programs(0) * size


@triton.jit
def pointers(t, OPERAND: tl.constexpr, TYPE: tl.constexpr, ACCESS: tl.constexpr):
    """Where the elements of one operand are."""
    DIMS: tl.constexpr = ACCESS.dims
    at = t.index
    if DIMS > 0:
        dims = t.row + tl.load(t.row + words.TO_DIMS)
        rest = t.index
        at = tl.zeros_like(rest)
        for i in tl.static_range(1, DIMS):  # the innermost one first
            dim = dims + (DIMS - i) * words.DIM
            outer = rest // tl.load(dim)
            at += (rest - outer * tl.load(dim)) * tl.load(dim + 1 + OPERAND)
            rest = outer
        at += rest * tl.load(dims + 1 + OPERAND)
    pointer = tl.load(t.row + words.DATA + OPERAND).to(tl.pointer_type(TYPE))
    if ACCESS.aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + at


@triton.jit
def load(t, OPERAND: tl.constexpr, ACCESS: tl.constexpr):
    """float32 of any of the dtypes; bfloat16 widens on integers."""
    if ACCESS.dtypes[OPERAND] == tl.bfloat16:
        bits = tl.load(pointers(t, OPERAND, tl.int16, ACCESS), mask=t.valid, other=0)
        x = bits_float(bits.to(tl.int32) << 16)
    else:
        x = tl.load(pointers(t, OPERAND, ACCESS.dtypes[OPERAND], ACCESS), mask=t.valid, other=0)
    return x.to(tl.float32)


@triton.jit
def store(t, OPERAND: tl.constexpr, x, random_key, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr):
    """To nearest; bfloat16 that is STOCHASTIC, by random bits of this key and the global index."""
    if ACCESS.dtypes[OPERAND] == tl.bfloat16:
        if STOCHASTIC:
            index = t.index + tl.load(t.row + words.OFFSET)
            random = rounding_bits(random_key, index, 1 if OPERAND == words.PARAM else 0)
            bits = float_to_bf16_stochastic(x, random)
        else:
            bits = float_to_bf16(x)
        tl.store(pointers(t, OPERAND, tl.int16, ACCESS), bits, mask=t.valid)
    else:
        pointer = pointers(t, OPERAND, ACCESS.dtypes[OPERAND], ACCESS)
        tl.store(pointer, x.to(ACCESS.dtypes[OPERAND]), mask=t.valid)


@triton.jit
def is_selective(t):
    return t.valid & (t.index * 0 + tl.load(t.row + words.SELECTIVE) != 0)


@triton.jit
def alpha_of(t):
    return bits_float(tl.load(t.row + words.ALPHA).to(tl.int32))


@triton.jit
def keys_of(
    t, inv_scale, clip, rank_inactive, SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr
):  # fmt: skip
    """Keys of elements; NO_KEY where there is none."""
    g = load(t, words.GRAD, ACCESS) * tl.load(inv_scale) * tl.load(clip)
    m = g
    if SECOND_ORDER:
        m = load(t, words.MOMENT, ACCESS)
    return tl.where(t.valid, risk_key(g, m, alpha_of(t), rank_inactive, SECOND_ORDER), NO_KEY)


@triton.jit
def mask_bits(t, ORDER: tl.constexpr):
    """Of a mask that was captured in bits; 0 where it is of another kind."""
    some = t.valid & (t.index * 0 + tl.load(t.row + words.MASK_KINDS + ORDER) == words.MASK_OF_BITS)
    pointer = tl.load(t.row + words.MASKS + ORDER).to(tl.pointer_type(tl.uint8))
    byte = tl.load(pointer + t.index // 8, mask=some, other=0).to(tl.int32)
    return (byte >> (t.index % 8).to(tl.int32)) & 1


@triton.jit
def store_mask_bits(t, tile, selected, BLOCK: tl.constexpr):
    """One bit for each element of a tile, 8 to a byte, the lowest first."""
    bit = (selected & t.valid).to(tl.int32).reshape([BLOCK // 8, 8])
    byte = tl.sum(bit << tl.arange(0, 8)[None, :], axis=1)
    start = (tile - tl.load(t.row + words.FIRST_TILE)) * (BLOCK // 8)
    at = start + tl.arange(0, BLOCK // 8).to(tl.int64)
    pointer = tl.load(t.row + words.BITS).to(tl.pointer_type(tl.uint8))
    tl.store(pointer + at, byte.to(tl.uint8), mask=at * 8 < tl.load(t.row + words.N))
