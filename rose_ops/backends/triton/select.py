"""Thresholds by radix, of elements or of a sample's keys; and masks by thresholds.

``select_kernel`` is longer than other functions here: what programs count stays in registers until it
is added up, and the last program goes on from there in the same launch.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import kernel, keys_of_tile, store_mask_bits, tile_of
from rose_ops.backends.triton.elements import INACTIVE_KEY, NONFINITE_KEY, is_selected, rank_of


@triton.jit
def _next_digits(state, histogram, high, low, digits, number):
    """The next digit of both targets, whose ranks are ``high`` and ``low``, from the keys that all
    programs have counted in ``histogram``."""
    bins = tl.arange(0, words.BINS)
    for t in tl.static_range(2):
        rank = high if t == 0 else low
        target = state + words.SELECT_TARGETS + t * words.SELECT_TARGET
        # In the first launch all keys count for both targets, and are counted once.
        counts = tl.load(histogram + tl.where(number == 0, 0, t * words.BINS), cache_modifier=".cg")
        upto = tl.cumsum(counts, 0)
        below = tl.load(target + words.BELOW)
        wanted = rank - below
        here = (upto >= wanted) & (upto - counts < wanted) & (rank > 0)
        digit = tl.sum(tl.where(here, bins.to(tl.int64), 0))
        tl.store(target + words.RANK, rank)
        tl.store(target + words.BELOW, below + tl.sum(tl.where(here, upto - counts, 0)))
        tl.store(target + words.PREFIX, (tl.load(target + words.PREFIX) << digits) + digit)
        tl.store(target + words.INSIDE, tl.sum(tl.where(here, counts, 0)))


@triton.jit
def _write_record(state, record):
    """Thresholds and counts, when all digits of both targets are known."""
    targets = state + words.SELECT_TARGETS
    LOWER: tl.constexpr = words.SELECT_TARGET
    for t in tl.static_range(2):
        target = targets + t * words.SELECT_TARGET
        tl.store(
            record + t,
            tl.where(tl.load(target + words.RANK) > 0, tl.load(target + words.PREFIX), -1),
        )
    upto_high = tl.load(targets + words.BELOW) + tl.load(targets + words.INSIDE)
    upto_low = tl.load(targets + (LOWER + words.BELOW)) + tl.load(targets + (LOWER + words.INSIDE))
    tl.store(record + words.KEPT, tl.maximum(upto_high - upto_low, 0))
    tl.store(record + words.RANKED, tl.load(state + words.SELECT_RANKED))
    tl.store(record + words.INACTIVE, tl.load(state + words.SELECT_INACTIVE, cache_modifier=".cg"))
    tl.store(record + words.NONFINITE, tl.load(state + words.SELECT_NONFINITE, cache_modifier=".cg"))


@kernel(registers=96)
def select_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, state, record, upper, lower,
    programs, number,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next bits of both thresholds, from the highest on: launch ``number`` of 4. The last program
    scans. Where D0 is KEYS, ``tile_rows`` are the keys themselves.

    8 bits at a time: a histogram counts by ballots, in registers, and takes time for every bin.
    """
    shift = tl.maximum(23 - 8 * number, 0)
    digits = tl.minimum(31 - 8 * number, 8)
    bins = tl.arange(0, words.BINS)
    upper_counts = tl.zeros([words.BINS], tl.int32)
    lower_counts = tl.zeros([words.BINS], tl.int32)
    unranked = tl.zeros([BLOCK], tl.int32)  # 16 bits for inactive ones, 16 for others
    targets = state + words.SELECT_TARGETS
    LOWER: tl.constexpr = words.SELECT_TARGET
    high = tl.load(targets + words.RANK)
    low = tl.load(targets + (LOWER + words.RANK))
    upper_prefix = tl.load(targets + words.PREFIX).to(tl.int32)
    lower_prefix = tl.load(targets + (LOWER + words.PREFIX)).to(tl.int32)
    is_first = number == 0
    if is_first | (high + low > 0):  # else there is nothing to look for
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            if D0 == words.KEYS:
                key = tl.load(tile_rows + tile * BLOCK + tl.arange(0, BLOCK))
                valid = key >= 0
            else:
                row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
                key = keys_of_tile(
                    row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR,
                    ALIGNED, SECOND,
                )  # fmt: skip
            unranked += (valid & (key == INACTIVE_KEY)).to(tl.int32)
            unranked += (valid & (key == NONFINITE_KEY)).to(tl.int32) << 16
            ranked = valid & (key >= 0)
            digit = (key >> shift) & ((1 << digits) - 1)
            prefix = (key >> shift) >> digits
            inside = ranked & (prefix == upper_prefix)
            upper_counts += tl.histogram(tl.where(inside, digit, 0), words.BINS, mask=inside)
            if low > 0:
                inside = ranked & (prefix == lower_prefix)
                lower_counts += tl.histogram(tl.where(inside, digit, 0), words.BINS, mask=inside)
    histogram = state + words.SELECT_HISTOGRAMS + bins
    tl.atomic_add(histogram, upper_counts.to(tl.int64), mask=upper_counts > 0, sem="relaxed")
    tl.atomic_add(
        histogram + words.BINS, lower_counts.to(tl.int64), mask=lower_counts > 0, sem="relaxed"
    )
    if is_first:
        inactive = tl.sum((unranked & 0xFFFF).to(tl.int64))
        tl.atomic_add(state + words.SELECT_INACTIVE, inactive, sem="relaxed")
        tl.atomic_add(
            state + words.SELECT_NONFINITE, tl.sum((unranked >> 16).to(tl.int64)), sem="relaxed"
        )
    tl.debug_barrier()
    # Releases what all programs have added to the last one.
    if tl.atomic_add(state + words.SELECT_TICKETS + number, 1, sem="acq_rel") == programs - 1:
        if is_first:
            n = tl.sum(tl.load(histogram, cache_modifier=".cg"))
            tl.store(state + words.SELECT_RANKED, n)
            high = rank_of(upper, n)
            low = rank_of(lower, n)
        _next_digits(state, histogram, high, low, digits, number)
        tl.debug_barrier()
        tl.store(histogram, tl.zeros([words.BINS], tl.int64))
        tl.store(histogram + words.BINS, tl.zeros([words.BINS], tl.int64))
        if shift == 0:
            _write_record(state, record)


@kernel()
def capture_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, record,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
        key = keys_of_tile(
            row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR, ALIGNED,
            SECOND,
        )  # fmt: skip
        store_mask_bits(row, tile, is_selected(key, record) & valid, BLOCK)
