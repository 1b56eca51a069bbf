"""Thresholds from what a pass has counted and logged; see bracket.py."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import kernel, keys_of_tile, share_of, tile_of
from rose_ops.backends.triton.elements import rank_of
from rose_ops.backends.triton.sample import count_digits

SCANNED = tl.constexpr(512)  # bins at a time


@triton.jit
def _find(bins, count, rank):
    """The bin that holds the ``rank``-th smallest, from 1; how many are before it and in it."""
    total = tl.full([], 0, tl.int64)
    index = tl.full([], 0, tl.int64)
    before = tl.full([], 0, tl.int64)
    inside = tl.full([], 0, tl.int64)
    for start in range(0, count, SCANNED):
        at = start + tl.arange(0, SCANNED).to(tl.int64)
        counts = tl.load(bins + at, mask=at < count, other=0, cache_modifier=".cg")
        upto = total + tl.cumsum(counts, 0)
        here = (upto >= rank) & (upto - counts < rank)
        index += tl.sum(tl.where(here, at, 0))
        before += tl.sum(tl.where(here, upto - counts, 0))
        inside += tl.sum(tl.where(here, counts, 0))
        total += tl.sum(counts)
    return index, before, inside


@triton.jit
def _total(state, field):
    at = tl.arange(0, words.SLOTS)
    return tl.sum(tl.load(state + words.COUNTERS + at * words.COUNTS + field))


@triton.jit
def _narrow(state, t, fraction, elements):
    """What the counts of the pass say about a threshold: its rank inside the bracket (0: it is not
    there), how many are below and in the bracket, its bin's first key, its rank in the bin, and how
    many the bin has."""
    target = state + words.TARGETS + t * words.TARGET
    ranked = elements - _total(state, words.COUNT_INACTIVE) - _total(state, words.COUNT_NONFINITE)
    rank = rank_of(fraction.to(tl.int64), ranked)
    field = tl.where(t == 0, words.COUNT_BELOW, words.COUNT_BELOW_LOWER)
    below = _total(state, field)
    inside = _total(state, field + 1)
    rank -= below
    found = (rank > 0) & (rank <= inside)
    low = tl.load(target + words.BRACKET_LOW)
    shift = tl.load(target + words.SHIFT)
    count = ((tl.load(target + words.BRACKET_END) - 1 - low) >> shift) + 1
    searches = found & (tl.load(target + words.COLLAPSED) == 0)
    count = tl.where(searches, count, 0)
    index, before, in_bin = _find(state + words.FIRST_DIGITS + t * words.FIRST_BINS, count, rank)
    return rank, below, inside, searches, low + (index << shift), before, in_bin


@triton.jit
def _threshold(state, t, fraction, elements):
    """Key of a threshold, how many are at or below it, and whether it was missed."""
    target = state + words.TARGETS + t * words.TARGET
    rank, below, inside, searches, start, before, in_bin = _narrow(state, t, fraction, elements)
    shift = tl.load(target + words.SHIFT)
    count = tl.where(searches & (shift > 0), tl.full([], 1, tl.int64) << shift, 0)
    digits = state + words.SECOND_DIGITS + t * words.SECOND_BINS
    index, before_key, of_key = _find(digits, count, rank - before)
    found = start + index
    upto = below + before + tl.where(shift > 0, before_key + of_key, in_bin)
    # Outside: the nearest end of the bracket. There is nothing to miss if the rank is 0.
    low = tl.load(target + words.BRACKET_LOW)
    high = tl.load(target + words.BRACKET_END) - 1
    collapsed = tl.load(target + words.COLLAPSED) != 0
    some = (rank != 0) | (below != 0)
    key = tl.where(searches, found, tl.where(rank > 0, high, low - 1))
    upto = tl.where(searches, upto, tl.where(rank > 0, below + inside, below))
    key = tl.where(collapsed, low, tl.where(some, key, -1))
    upto = tl.where(collapsed, below + inside, tl.where(some, upto, 0))
    missed = (rank <= 0) | (rank > inside)
    return key, upto, missed & (collapsed | some)


@triton.jit
def _count_second(state, t, key, start, searches, BLOCK: tl.constexpr):
    target = state + words.TARGETS + t * words.TARGET
    shift = tl.load(target + words.SHIFT)
    size = tl.where(searches & (shift > 0), tl.full([], 1, tl.int64) << shift, 0)
    above = key.to(tl.int64) - start
    inside = (above >= 0) & (above < size)
    if tl.sum(inside.to(tl.int32)) > 0:
        digit = tl.where(inside, above, 0).to(tl.int32)
        count_digits(state + words.SECOND_DIGITS + t * words.SECOND_BINS, digit, inside, BLOCK)


@kernel(registers=128)
def resolve_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, operand, found_inf, state,
    record, log_keys, capacity, elements, upper, lower, programs, first, updates, approx,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second digits of the log (by the ``first`` launch) or of all keys; the last program scans."""
    if (programs > 0) & (tl.load(found_inf) == 0):
        speculated = tl.load(state + words.MODE) == words.SPECULATE
        logged = tl.load(state + words.LOGGED)
        targets = 1 + (lower > 0).to(tl.int32)
        for t in range(0, targets):
            fraction = tl.where(t == 0, upper, lower)
            _, _, _, searches, start, _, _ = _narrow(state, t, fraction, elements)
            if speculated:
                count = tl.where(first != 0, tl.minimum(logged, capacity), 0)
                begin, end, stride = share_of(count, BLOCK)
                for entry in range(begin, end, stride):
                    at = entry + tl.arange(0, BLOCK)
                    key = tl.load(log_keys + at, mask=at < count, other=0) & 0x7FFFFFFF
                    key = tl.where(at < count, key, -1)
                    _count_second(state, t, key, start, searches, BLOCK)
            else:
                begin, end, stride = share_of(tiles, 1)
                for tile in range(begin, end, stride):
                    row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
                    key = keys_of_tile(
                        row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, operand, D0, D1,
                        LINEAR, ALIGNED, SECOND,
                    )  # fmt: skip
                    _count_second(state, t, tl.where(valid, key, -1), start, searches, BLOCK)
        tl.debug_barrier()
        # Releases what all programs have added to the last one.
        if tl.atomic_add(state + words.RESOLVE_TICKET, 1, sem="acq_rel") == programs - 1:
            # More was logged than the log takes: the estimate has to do.
            missed = speculated & (logged > capacity)
            estimated = missed | (approx != 0)
            kept = tl.full([], 0, tl.int64)
            for t in range(0, targets):
                fraction = tl.where(t == 0, upper, lower)
                key, upto, is_missed = _threshold(state, t, fraction, elements)
                missed = missed | is_missed
                kept += tl.where(t == 0, upto, -upto)
                tl.store(record + t, tl.where(estimated, tl.load(state + words.ESTIMATE + t), key))
            inactive = _total(state, words.COUNT_INACTIVE)
            bad = _total(state, words.COUNT_NONFINITE)
            tl.store(
                record + words.KEPT,
                tl.where(estimated, _total(state, words.COUNT_KEPT), tl.maximum(kept, 0)),
            )
            tl.store(record + words.RANKED, elements - inactive - bad)
            tl.store(record + words.INACTIVE, inactive)
            tl.store(record + words.NONFINITE, bad)
            tl.store(record + words.MISSES, (missed & (approx == 0)).to(tl.int64))
            if updates != 0:
                tl.store(record + words.UPDATED, _total(state, words.COUNT_UPDATED))
                tl.store(record + words.UPDATE_NONFINITE, bad)
