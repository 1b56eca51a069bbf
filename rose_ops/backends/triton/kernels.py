"""The Triton kernels; their arithmetic is that of ``csrc/include/rose/element.h``, one by one.

A launch walks the tiles of the segments (tensors) of one class: equal dtypes, aligned or not. Rows of
int64 describe segments, see :func:`rose_ops.backends.triton.table.make`.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

OPTIONS: dict[str, dict[str, Any]] = {}
"""What each kernel has to be launched with, and what the tests compile it with."""


def kernel(registers: int = 64, num_warps: int = 4) -> Callable[[Callable[..., None]], Any]:
    """A kernel that is compiled once for each set of constants.

    By default, Triton has other code for numbers that are 1 or divisible by 16, and for addresses that
    are: minutes of compiling, for tables of which single words are read.

    Args:
        registers: of a thread, at most. Releases of Triton differ in what they would take.
    """

    def decorate(function: Callable[..., None]) -> Any:
        # Without fusion, every product and sum is rounded.
        OPTIONS[function.__name__] = {
            "num_warps": num_warps, "maxnreg": registers, "enable_fp_fusion": False,
        }  # fmt: skip
        parameters = inspect.signature(function).parameters.values()
        numbers = [p.name for p in parameters if p.annotation != "tl.constexpr"]
        return triton.jit(function, do_not_specialize=numbers)

    return decorate


INACTIVE: tl.constexpr = tl.constexpr(-(1 << 31))  # keys as int32: below every ranked one
NONFINITE: tl.constexpr = tl.constexpr(-(1 << 31) + (1 << 20))
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
ONE: tl.constexpr = tl.constexpr(0x3F800000)
BINS: tl.constexpr = tl.constexpr(256)

# Columns of a row, and words of the state of a selection; the same as in table.py.
N: tl.constexpr = tl.constexpr(0)
FIRST_TILE: tl.constexpr = tl.constexpr(1)
OFFSET: tl.constexpr = tl.constexpr(2)
DATA: tl.constexpr = tl.constexpr(3)
MASK: tl.constexpr = tl.constexpr(7)
MASK_KIND: tl.constexpr = tl.constexpr(9)
BITS: tl.constexpr = tl.constexpr(11)
STEP: tl.constexpr = tl.constexpr(12)
GROUP: tl.constexpr = tl.constexpr(13)
DIMS: tl.constexpr = tl.constexpr(14)
FIRST_DIM: tl.constexpr = tl.constexpr(15)
INDEX: tl.constexpr = tl.constexpr(16)
FIRST_LINE: tl.constexpr = tl.constexpr(17)
COLUMNS: tl.constexpr = tl.constexpr(18)

RANKED: tl.constexpr = tl.constexpr(0)
STATE_INACTIVE: tl.constexpr = tl.constexpr(1)
STATE_NONFINITE: tl.constexpr = tl.constexpr(2)
TICKETS: tl.constexpr = tl.constexpr(3)
TARGETS: tl.constexpr = tl.constexpr(8)  # 4 words each: rank (0: none), below, prefix, inside
HISTOGRAMS: tl.constexpr = tl.constexpr(16)

PREPARED: tl.constexpr = tl.constexpr(16)  # float32 for each segment
KEYS: tl.constexpr = tl.constexpr(3)  # as a dtype: not numbers to rank, but their keys


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(address, at, valid, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
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
        x = _float(tl.load(pointer + at, mask=valid, other=0).to(tl.int32) << 16)
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        x = tl.load(pointer + at, mask=valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def _store(address, at, x, valid, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To nearest, ties to even; bfloat16 on integers."""
    if DTYPE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + at, x, mask=valid)
    elif DTYPE == 1:
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        _store_bits(address, at, tl.where(_bits(x) > INFINITY, 0x7FC0, rounded), valid, ALIGNED)
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + at, x.to(tl.float16), mask=valid)


@triton.jit
def _store_bits(address, at, bits, valid, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, bits.to(tl.int16), mask=valid)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _locate(
    row, dims, index, operand, LINEAR: tl.constexpr, ROWS: tl.constexpr = False
):  # fmt: skip
    """Where the elements ``index`` (row-major) of one operand are in its memory. ROWS: a row each."""
    if LINEAR:
        return index
    at = tl.zeros_like(index)
    first = tl.load(row + FIRST_DIM)
    count = tl.load(row + DIMS)
    most = count
    if ROWS:
        most = tl.max(count)
    for k in range(0, most):
        used = k < count
        dim = dims + (first + count - 1 - k) * 5  # size, strides
        size = tl.load(dim, mask=used, other=1)
        rest = index // size
        at += (index - rest * size) * tl.load(dim + 1 + operand, mask=used, other=0)
        index = rest
    return tl.where(count == 0, index, at)


@triton.jit
def _tile(rows, tile_rows, tile, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Row of a tile's segment, and the elements of the tile."""
    row = rows + tl.load(tile_rows + tile).to(tl.int64) * COLUMNS
    start = (tile - tl.load(row + FIRST_TILE)) * BLOCK
    index = start + tl.arange(0, BLOCK).to(tl.int64)
    n = tl.load(row + N)
    if ALIGNED:  # else the mask would make accesses scalar
        n = tl.multiple_of(n, 16)
    return row, index, index < n


@triton.jit
def _key(g, m, alpha, rank_inactive, SECOND: tl.constexpr):
    ag = _bits(g)
    if SECOND:
        am = _bits(m)
        ratio = tl.div_rn(alpha * _float(ag), _float(am))
        ranked = tl.where(ag == 0, ONE, INFINITY)
        key = tl.where(am == 0, tl.where(rank_inactive != 0, ranked, INACTIVE), _bits(ratio - 1.0))
        finite = (ag < INFINITY) & (am < INFINITY)
    else:
        key = tl.where((ag == 0) & (rank_inactive == 0), INACTIVE, ag)
        finite = ag < INFINITY
    return tl.where(finite, key, NONFINITE)


@triton.jit
def _is_selected(key, selection):
    high = tl.load(selection).to(tl.int32)
    low = tl.load(selection + 1).to(tl.int32)
    return ((key <= high) & (key > low)) | (key == INACTIVE)


@triton.jit
def _keys_of_tile(
    row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, operand,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, ROWS: tl.constexpr = False,
):  # fmt: skip
    """Keys of gradients (this operand, of dtype D0) and first moments (the next, D1)."""
    at = _locate(row, dims, index, operand, LINEAR, ROWS)
    g = _load(tl.load(row + DATA + operand), at, valid, D0, ALIGNED)
    m = g
    alpha = 1.0
    if SECOND:
        at = _locate(row, dims, index, operand + 1, LINEAR, ROWS)
        m = _load(tl.load(row + DATA + operand + 1), at, valid, D1, ALIGNED)
        alpha = (1.0 - tl.load(hyper + tl.load(row + GROUP) * 6)).to(tl.float32)
    return _key(g * tl.load(inv_scale) * tl.load(clip), m, alpha, rank_inactive, SECOND)


@triton.jit
def _rank_of(fraction, n):
    return fraction * (n // 1000000000) + fraction * (n % 1000000000) // 1000000000


@kernel(registers=96)
def _select_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, state, selection, upper, lower,
    programs, number,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next bits of both thresholds, from the highest on: launch ``number`` of 4. The last program
    scans. With KEYS, ``tile_rows`` are the keys themselves.

    8 bits at a time: a histogram counts by ballots, in registers, and takes time for every bin.
    """
    shift = tl.maximum(23 - 8 * number, 0)
    digits = tl.minimum(31 - 8 * number, 8)
    bins = tl.arange(0, BINS)
    upper_counts = tl.zeros([BINS], tl.int32)
    lower_counts = tl.zeros([BINS], tl.int32)
    unranked = tl.zeros([BLOCK], tl.int32)  # 16 bits for inactive ones, 16 for others
    high = tl.load(state + TARGETS)
    low = tl.load(state + TARGETS + 4)
    upper_prefix = tl.load(state + TARGETS + 2).to(tl.int32)
    lower_prefix = tl.load(state + TARGETS + 6).to(tl.int32)
    is_first = number == 0
    if is_first | (high + low > 0):  # else there is nothing to look for
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            if D0 == KEYS:
                key = tl.load(tile_rows + tile * BLOCK + tl.arange(0, BLOCK))
                valid = key >= 0
            else:
                row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
                key = _keys_of_tile(
                    row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR,
                    ALIGNED, SECOND,
                )  # fmt: skip
            unranked += (valid & (key == INACTIVE)).to(tl.int32)
            unranked += (valid & (key == NONFINITE)).to(tl.int32) << 16
            ranked = valid & (key >= 0)
            digit = (key >> shift) & ((1 << digits) - 1)
            prefix = (key >> shift) >> digits
            inside = ranked & (prefix == upper_prefix)
            upper_counts += tl.histogram(tl.where(inside, digit, 0), BINS, mask=inside)
            if low > 0:
                inside = ranked & (prefix == lower_prefix)
                lower_counts += tl.histogram(tl.where(inside, digit, 0), BINS, mask=inside)
    histogram = state + HISTOGRAMS + bins
    tl.atomic_add(histogram, upper_counts.to(tl.int64), mask=upper_counts > 0, sem="relaxed")
    tl.atomic_add(histogram + BINS, lower_counts.to(tl.int64), mask=lower_counts > 0, sem="relaxed")
    if is_first:
        inactive = tl.sum((unranked & 0xFFFF).to(tl.int64))
        tl.atomic_add(state + STATE_INACTIVE, inactive, sem="relaxed")
        tl.atomic_add(state + STATE_NONFINITE, tl.sum((unranked >> 16).to(tl.int64)), sem="relaxed")
    tl.debug_barrier()
    # Releases what all programs have added to the last one.
    if tl.atomic_add(state + TICKETS + number, 1, sem="acq_rel") == programs - 1:
        if is_first:
            n = tl.sum(tl.load(histogram, cache_modifier=".cg"))
            tl.store(state + RANKED, n)
            high = _rank_of(upper, n)
            low = _rank_of(lower, n)
        for t in tl.static_range(2):
            rank = high if t == 0 else low
            target = state + TARGETS + 4 * t
            counts = tl.load(histogram + tl.where(is_first, 0, t * BINS), cache_modifier=".cg")
            upto = tl.cumsum(counts, 0)
            below = tl.load(target + 1)
            wanted = rank - below
            here = (upto >= wanted) & (upto - counts < wanted) & (rank > 0)
            digit = tl.sum(tl.where(here, bins.to(tl.int64), 0))
            tl.store(target, rank)
            tl.store(target + 1, below + tl.sum(tl.where(here, upto - counts, 0)))
            tl.store(target + 2, (tl.load(target + 2) << digits) + digit)
            tl.store(target + 3, tl.sum(tl.where(here, counts, 0)))
        tl.debug_barrier()
        tl.store(histogram, tl.zeros([BINS], tl.int64))
        tl.store(histogram + BINS, tl.zeros([BINS], tl.int64))
        if shift == 0:
            for t in tl.static_range(2):
                target = state + TARGETS + 4 * t
                tl.store(selection + t, tl.where(tl.load(target) > 0, tl.load(target + 2), -1))
            upto_high = tl.load(state + TARGETS + 1) + tl.load(state + TARGETS + 3)
            upto_low = tl.load(state + TARGETS + 5) + tl.load(state + TARGETS + 7)
            tl.store(selection + 2, tl.maximum(upto_high - upto_low, 0))
            tl.store(selection + 3, tl.load(state + RANKED))
            tl.store(selection + 4, tl.load(state + STATE_INACTIVE, cache_modifier=".cg"))
            tl.store(selection + 5, tl.load(state + STATE_NONFINITE, cache_modifier=".cg"))


@triton.jit
def _store_mask_bits(row, tile, selected, BLOCK: tl.constexpr):
    """One bit for each element, 8 to a byte, the lowest first."""
    bit = selected.to(tl.int32).reshape([BLOCK // 8, 8])
    byte = tl.sum(bit << tl.arange(0, 8)[None, :], axis=1)
    start = (tile - tl.load(row + FIRST_TILE)) * (BLOCK // 8)
    at = start + tl.arange(0, BLOCK // 8).to(tl.int64)
    pointer = tl.load(row + BITS).to(tl.pointer_type(tl.uint8))
    tl.store(pointer + at, byte.to(tl.uint8), mask=at * 8 < tl.load(row + N))


@kernel()
def _capture_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, selection,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
        key = _keys_of_tile(
            row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR, ALIGNED,
            SECOND,
        )  # fmt: skip
        _store_mask_bits(row, tile, _is_selected(key, selection) & valid, BLOCK)


@kernel()
def _prepare_kernel(
    rows, count, hyper, lr, found_inf, prepared, keys, record, selection, known, gamma, seed,
    first_weight, second_weight, rules_out,
):  # fmt: skip
    """A program for each segment. In ``record``: that of the ``selection``, if it is ``known`` and
    something is updated, or an empty one; and counts of 0."""
    if tl.program_id(0) == 0:
        word = tl.arange(0, 16)
        copied = word < tl.where(tl.load(found_inf) == 0, 8 * known, 0)
        value = tl.load(selection + word, mask=copied, other=0)
        tl.store(record + word, tl.where(copied | (word >= 2), value, -1), mask=word < 10)
    _prepare(
        rows, count, hyper, lr, found_inf, prepared, keys, gamma, seed, first_weight, second_weight,
        rules_out,
    )  # fmt: skip


@triton.jit
def _next_step(step):
    """The number after it, and what that keys random bits by; see ``next_step`` and ``step_word`` in
    reference.py."""
    bits = step.to(tl.int32, bitcast=True)
    next_float = (bits + tl.where(bits < 0, -1, 1)).to(tl.float32, bitcast=True)
    sticks = (step + 1.0 == step) & ((bits & 0x7FFFFFFF) < INFINITY)
    step = tl.where(sticks, next_float, step + 1.0)
    bits = tl.where(step == step, step.to(tl.int32, bitcast=True), 0x7FC00000)
    small = (step >= 0) & (step < 16777216.0)
    return step, tl.where(small, tl.where(small, step, 0.0).to(tl.int32), bits)


@triton.jit
def _prepare(
    rows, count, hyper, lr, found_inf, prepared, keys, gamma, seed, first_weight, second_weight,
    rules_out,
):  # fmt: skip
    """What all elements of a segment have in common in an update, and its step."""
    i = tl.program_id(0).to(tl.int64)
    if (i < count) & (tl.load(found_inf) == 0):
        row = rows + i * COLUMNS
        group = hyper + tl.load(row + GROUP) * 6
        beta1 = tl.load(group)
        beta2 = tl.load(group + 1)
        step_pointer = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        step, word = _next_step(tl.load(step_pointer))
        tl.store(step_pointer, step)
        t = step.to(tl.float64)
        bias1 = 1.0 - tl.exp(t * tl.log(beta1))
        bias2 = 1.0 - tl.exp(t * tl.log(beta2))
        rate = tl.load(lr + tl.load(row + GROUP))
        decay = tl.load(group + 3)
        out = prepared + tl.load(row + INDEX) * PREPARED
        tl.store(out, beta1.to(tl.float32))
        tl.store(out + 1, (1.0 - beta1).to(tl.float32))
        tl.store(out + 2, beta2.to(tl.float32))
        tl.store(out + 3, (1.0 - beta2).to(tl.float32))
        tl.store(out + 4, tl.load(group + 2).to(tl.float32))
        tl.store(out + 5, (1.0 / tl.sqrt(bias2)).to(tl.float32))
        weight = tl.load(gamma)
        tl.store(out + 6, weight.to(tl.float32))
        tl.store(out + 7, (1.0 - weight).to(tl.float32))
        tl.store(out + 8, (rate * weight / bias1).to(tl.float32))
        tl.store(out + 9, (rate * (1.0 - weight) / bias1).to(tl.float32))
        tl.store(out + 10, (rate / bias1).to(tl.float32))
        tl.store(out + 11, (1.0 - rate * weight * decay).to(tl.float32))
        tl.store(out + 12, (1.0 - rate * (1.0 - weight) * decay).to(tl.float32))
        tl.store(out + 13, (1.0 - rate * decay).to(tl.float32))
        selective = tl.load(group + 5) != 0
        kind = tl.where(selective, 0, 3)
        some = tl.zeros_like(kind)
        for k in tl.static_range(2):
            given = tl.load(row + MASK_KIND + k)
            some += (given == 1).to(tl.int32)
            added = first_weight if k == 0 else second_weight
            whole = given == 3
            if given == 2:
                whole = tl.load(tl.load(row + MASK + k).to(tl.pointer_type(tl.uint8))) != 0
            kind += tl.where(whole, added, 0)
        ruled_out = selective & (kind == 0) & (some == 0) & (rules_out != 0)
        kind = tl.where(ruled_out, -1, kind)
        pair = keys + tl.load(row + INDEX) * 2
        scrambled = word.to(tl.uint32, bitcast=True) * 0x9E3779B9
        tl.store(
            pair, _mix(tl.load(seed).to(tl.int64).to(tl.uint32) ^ scrambled).to(tl.int32, bitcast=True)
        )
        tl.store(pair + 1, kind)


@triton.jit
def _gradient(g, row, hyper, inv_scale, clip):
    """Unscaled, clipped, and negated to maximize."""
    group = hyper + tl.load(row + GROUP) * 6
    factor = tl.load(group + 4).to(tl.float32) * tl.load(inv_scale)
    return g * factor * tl.load(clip + tl.where(tl.load(group + 5) != 0, 0, 1))


@triton.jit
def _mask_bit(row, index, valid, WHICH: tl.constexpr):
    """The bits of a captured mask; 0 where it is of another kind."""
    some = valid & (index * 0 + tl.load(row + MASK_KIND + WHICH) == 1)
    pointer = tl.load(row + MASK + WHICH).to(tl.pointer_type(tl.uint8))
    byte = tl.load(pointer + index // 8, mask=some, other=0).to(tl.int32)
    return (byte >> (index % 8).to(tl.int32)) & 1


@triton.jit
def _second_moment(v, g, u):
    return tl.load(u + 2) * v + tl.load(u + 3) * (g * g)


@triton.jit
def _adamw(p, g, m, v, kind, u, FRACTIONAL: tl.constexpr):
    """p, m, v after the step; ``u`` is what their segment's prepared constants are at."""
    off = kind == 0
    gp = tl.where(off, m, g)
    step_size = tl.load(u + 10)
    decay = tl.load(u + 13)
    if FRACTIONAL:
        is_gamma = kind == 1
        is_rest = kind == 2
        w = tl.where(is_gamma, tl.load(u + 6), tl.load(u + 7))
        c = tl.where(is_gamma, tl.load(u + 7), tl.load(u + 6))
        gp = tl.where(is_gamma | is_rest, w * g + c * m, gp)
        rest_size = tl.where(is_rest, tl.load(u + 9), step_size)
        rest_decay = tl.where(is_rest, tl.load(u + 12), decay)
        step_size = tl.where(is_gamma, tl.load(u + 8), rest_size)
        decay = tl.where(is_gamma, tl.load(u + 11), rest_decay)
    m_new = tl.where(off, m, tl.load(u) * m + tl.load(u + 1) * gp)
    v_new = _second_moment(v, gp, u)
    denominator = tl.sqrt_rn(v_new) * tl.load(u + 5) + tl.load(u + 4)
    p_new = tl.where(off, p, p * decay - step_size * tl.div_rn(m_new, denominator))
    return p_new, m_new, v_new


@triton.jit
def _random(row, index, key, WHAT: tl.constexpr):
    """In the lower half: 16 bits for each element's second moment (WHAT = 0) or parameter (1)."""
    position = index + tl.load(row + OFFSET)
    high = (position >> 32).to(tl.uint32) ^ tl.load(key).to(tl.uint32, bitcast=True)
    low = position.to(tl.uint32)
    return _mix((low & 0xFFFFFFFE | WHAT) ^ _mix(high)) >> ((low & 1) * 16)


@triton.jit
def _store_stochastic(address, at, x, random, valid, ALIGNED: tl.constexpr):
    u = x.to(tl.uint32, bitcast=True)
    rounded = tl.where(_bits(x) > INFINITY, u | 0x400000, u + (random & 0xFFFF))
    _store_bits(address, at, rounded >> 16, valid, ALIGNED)


@triton.jit
def _store_parameter(
    row, dims, index, x, key, valid, D0: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr = False,
):  # fmt: skip
    at = _locate(row, dims, index, 0, LINEAR, ROWS)
    if STOCHASTIC and D0 == 1:
        _store_stochastic(tl.load(row + DATA), at, x, _random(row, index, key, 1), valid, ALIGNED)
    else:
        _store(tl.load(row + DATA), at, x, valid, D0, ALIGNED)


@triton.jit
def _store_moments(
    row, dims, index, m, v, key, valid, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr = False,
):  # fmt: skip
    if BOTH:
        at = _locate(row, dims, index, 2, LINEAR, ROWS)
        _store(tl.load(row + DATA + 2), at, m, valid, D2, ALIGNED)
    at = _locate(row, dims, index, 3, LINEAR, ROWS)
    if D3 == 1:
        random = _random(row, index, key, 0)
        _store_stochastic(tl.load(row + DATA + 3), at, v, random, valid, ALIGNED)
    else:
        _store(tl.load(row + DATA + 3), at, v, valid, D3, ALIGNED)


@kernel(registers=72)
def _update_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, found_inf, selection, prepared,
    keys, counts, first_weight, second_weight,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, FRACTIONAL: tl.constexpr, FROM_RISK: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW under the mask, in place. A program for each tile: a loop would take registers."""
    if (tiles > 0) & (tl.load(found_inf) == 0):
        tile = tl.program_id(0).to(tl.int64)
        row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
        segment = tl.load(row + INDEX)
        key = keys + segment * 2
        u = prepared + segment * PREPARED
        at = _locate(row, dims, index, 2, LINEAR)
        m = _load(tl.load(row + DATA + 2), at, valid, D2, ALIGNED)
        at = _locate(row, dims, index, 3, LINEAR)
        v = _load(tl.load(row + DATA + 3), at, valid, D3, ALIGNED)
        if tl.load(key + 1) >= 0:
            at = _locate(row, dims, index, 0, LINEAR)
            p = _load(tl.load(row + DATA), at, valid, D0, ALIGNED)
            at = _locate(row, dims, index, 1, LINEAR)
            g = _load(tl.load(row + DATA + 1), at, valid, D1, ALIGNED)
            g = _gradient(g, row, hyper, inv_scale, clip)
            group = hyper + tl.load(row + GROUP) * 6
            selective = tl.zeros([BLOCK], tl.int32) + tl.load(group + 5).to(tl.int32) != 0
            kind = tl.zeros([BLOCK], tl.int32) + tl.load(key + 1)
            if FRACTIONAL or not FROM_RISK:
                kind += _mask_bit(row, index, valid, 0) * first_weight
            if FROM_RISK:
                alpha = (1.0 - tl.load(group)).to(tl.float32)
                risk = _key(g, m, alpha, rank_inactive, True)
                kind += (selective & _is_selected(risk, selection)).to(tl.int32) * second_weight
            else:
                kind += _mask_bit(row, index, valid, 1) * second_weight
            bad = selective & ((_bits(g) >= INFINITY) | (_bits(m) >= INFINITY))
            kind = tl.where(bad, 0, kind)
            tl.atomic_add(counts, tl.sum((valid & (kind != 0)).to(tl.int64)), sem="relaxed")
            tl.atomic_add(counts + 1, tl.sum((valid & bad).to(tl.int64)), sem="relaxed")
            p, m, v = _adamw(p, g, m, v, kind, u, FRACTIONAL)
            _store_parameter(row, dims, index, p, key, valid, D0, LINEAR, ALIGNED, STOCHASTIC)
            _store_moments(row, dims, index, m, v, key, valid, D2, D3, LINEAR, ALIGNED, True)
        else:  # nothing of the tensor is selected
            v = _second_moment(v, m, u)
            _store_moments(row, dims, index, m, v, key, valid, D2, D3, LINEAR, ALIGNED, False)


@kernel()
def _squares_kernel(
    rows, tile_rows, tiles, dims, inv_scale, partial, base,
    D0: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of squares of each tile, in a fixed order."""
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
        x = _load(tl.load(row + DATA), _locate(row, dims, index, 0, LINEAR), valid, D0, ALIGNED)
        x = tl.where(valid, (x * tl.load(inv_scale)).to(tl.float64), 0.0)
        tl.store(partial + base + tile, tl.sum(x * x))


@kernel()
def _sums_kernel(rows, partial, base, sums, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The sum of each segment from those of its tiles. A program each."""
    row = rows + tl.program_id(0).to(tl.int64) * COLUMNS
    tiles = (tl.load(row + N) + BLOCK - 1) // BLOCK
    tile = partial + base + tl.load(row + FIRST_TILE)
    parts = tl.zeros([PARTS], tl.float64)
    for start in range(0, tiles, PARTS):
        part = start + tl.arange(0, PARTS)
        parts += tl.load(tile + part, mask=part < tiles, other=0.0)
    tl.store(sums + tl.load(row + INDEX), tl.sum(parts))
