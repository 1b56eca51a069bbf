"""Thresholds by radix: of elements, of a sample, or of the log of a pass; and masks by thresholds."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import kernel, keys_of, store_mask_bits, tile_of
from rose_ops.backends.triton.elements import (
    INACTIVE_KEY,
    INFINITY_KEY,
    NO_KEY,
    NONFINITE_KEY,
    is_selected,
    rank_of,
)


@triton.jit
def fresh(pointer):
    """What other programs have written."""
    return tl.load(pointer, cache_modifier=".cg")


@triton.jit
def add(word, numbers):
    tl.atomic_add(word, tl.sum(numbers.to(tl.int64)), sem="relaxed")


@triton.jit
def is_last(ticket, programs):
    """Whether all others of so many programs have been here; what they have added is there then."""
    tl.debug_barrier()
    return tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1


@triton.jit
def _total(state, counter):
    at = tl.arange(0, words.SLOTS)
    return tl.sum(tl.load(state + words.COUNTS + at * words.COUNTERS + counter))


@triton.jit
def _next_digit(target, histogram, digits):
    """Adds the next bits to the prefix of a target."""
    counts = fresh(histogram)
    upto = tl.cumsum(counts, 0)
    rank = tl.load(target + words.RANK)
    below = tl.load(target + words.BELOW)
    here = (upto >= rank - below) & (upto - counts < rank - below) & (rank > 0)
    digit = tl.sum(tl.where(here, tl.arange(0, words.BINS).to(tl.int64), 0))
    tl.store(target + words.BELOW, below + tl.sum(tl.where(here, upto - counts, 0)))
    tl.store(target + words.PREFIX, (tl.load(target + words.PREFIX) << digits) + digit)
    tl.store(target + words.INSIDE, tl.sum(tl.where(here, counts, 0)))


@triton.jit
def _threshold(state, t, fraction, ranked, speculative):
    """The key of a target, how many are at or below it, and whether its bracket missed it."""
    target = state + words.TARGETS + t * words.TARGET
    searched = tl.load(target + words.RANK) > 0
    key = tl.where(searched, tl.load(target + words.PREFIX), -1)
    upto = tl.load(target + words.BELOW) + tl.load(target + words.INSIDE)
    missed = fraction < 0
    if speculative:
        rank = rank_of(fraction.to(tl.int64), ranked)
        below = _total(state, words.COUNT_BELOW + 2 * t)
        inside = _total(state, words.COUNT_INSIDE + 2 * t)
        collapsed = tl.load(target + words.COLLAPSED) != 0
        # There is nothing to miss if the rank is 0. Outside: the nearest end of the bracket.
        some = (rank > 0) | (below > 0) | collapsed
        missed = some & ((rank <= below) | (rank > below + inside))
        is_upto_end = (rank > below) | collapsed
        end = tl.load(target + tl.where(is_upto_end, words.BRACKET_END, words.BRACKET_LOW)) - 1
        key = tl.where(searched, key, tl.where(some, end, -1))
        upto = below + tl.where(searched, upto, tl.where(is_upto_end, inside, 0))
    return key, upto, missed


@triton.jit
def _rank_to_search(state, t, fraction, ranked, speculative):
    """Among the keys that are looked at: of a bracket, those in it. 0: the threshold is not there."""
    rank = rank_of(fraction.to(tl.int64), ranked)
    if speculative:
        rank -= _total(state, words.COUNT_BELOW + 2 * t)
        collapsed = tl.load(state + words.TARGETS + t * words.TARGET + words.COLLAPSED) != 0
        outside = (rank <= 0) | (rank > _total(state, words.COUNT_INSIDE + 2 * t))
        rank = tl.where(outside | collapsed, 0, rank)
    return rank


@triton.jit
def write_counts(state, record, elements):
    """Of a pass, by its estimates."""
    inactive = _total(state, words.COUNT_INACTIVE)
    nonfinite = _total(state, words.COUNT_NONFINITE)
    tl.store(record + words.KEPT, _total(state, words.COUNT_KEPT))
    tl.store(record + words.RANKED, elements - inactive - nonfinite)
    tl.store(record + words.INACTIVE, inactive)
    tl.store(record + words.NONFINITE, nonfinite)
    tl.store(record + words.UPDATED, _total(state, words.COUNT_UPDATED))
    tl.store(record + words.UPDATE_NONFINITE, nonfinite)


@triton.jit
def _write_thresholds(state, record, upper, lower, speculative, overflowed):
    """If the log overflowed, the estimates have to do."""
    n = tl.load(record + words.RANKED)
    high, upto_high, high_missed = _threshold(state, 0, upper, n, speculative)
    low, upto_low, low_missed = _threshold(state, 1, lower, n, speculative)
    kept = tl.maximum(upto_high - upto_low, 0)
    if overflowed:
        high = tl.load(state + words.ESTIMATE + words.HIGH)
        low = tl.load(state + words.ESTIMATE + words.LOW)
        kept = tl.load(record + words.KEPT)
    tl.store(record + words.HIGH, high)
    tl.store(record + words.LOW, low)
    tl.store(record + words.KEPT, kept)
    tl.store(record + words.MISSES, (high_missed | low_missed | overflowed).to(tl.int64))


@triton.jit
def _scan(state, record, upper, lower, elements, round, digits, speculative, overflowed):
    """By the last program of a round: the next bits of both thresholds; at last, the record."""
    histogram = state + words.HISTOGRAMS + tl.arange(0, words.BINS)
    if round == 0:
        if speculative:
            write_counts(state, record, elements)
        else:
            tl.store(record + words.RANKED, tl.sum(fresh(histogram)))
        tl.debug_barrier()
    for t in tl.static_range(2):
        target = state + words.TARGETS + t * words.TARGET
        if round == 0:
            fraction = upper if t == 0 else lower
            rank = _rank_to_search(state, t, fraction, tl.load(record + words.RANKED), speculative)
            tl.store(target + words.RANK, rank)
            tl.debug_barrier()
        _next_digit(target, histogram + t * words.BINS, digits)
    tl.debug_barrier()
    tl.store(histogram, tl.zeros([words.BINS], tl.int64))
    tl.store(histogram + words.BINS, tl.zeros([words.BINS], tl.int64))
    if round == words.ROUNDS - 1:
        _write_thresholds(state, record, upper, lower, speculative, overflowed)


@triton.jit
def _count(counts, key, target, shift, digits, speculative):
    """Adds the digits of those keys to a histogram that a target is still among."""
    low = tl.where(speculative, tl.load(target + words.BRACKET_LOW), 0)
    end = tl.where(speculative, tl.load(target + words.BRACKET_END), INFINITY_KEY + 1)
    prefix = tl.load(target + words.PREFIX)
    inside = (key >= low) & (key < end) & (((key >> shift) >> digits) == prefix)
    digit = (key >> shift) & ((1 << digits) - 1)
    return counts + tl.histogram(tl.where(inside, digit, 0), words.BINS, mask=inside)


@kernel(registers=128)
def select_kernel(
    rows, tile_rows, ranked_tiles, inv_scale, clip, rank_inactive, found_inf, state, record, log_keys,
    capacity, upper, lower, elements, programs, round, first,
    SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next bits of both thresholds, from the highest on: of all elements, or in the SPECULATIVE
    course of the log's keys in the brackets, or in that of APPROX of all ``log_keys``; these by the
    ``first`` launch. A histogram counts by ballots, in registers, and takes time for every bin: hence
    8 bits at a time.

    Args:
        programs: of all launches of this ``round`` (0 to 3).
    """
    if (programs > 0) & (tl.load(found_inf) == 0):
        shift = tl.maximum(23 - 8 * round, 0)
        digits = tl.minimum(31 - 8 * round, 8)
        upper_counts = tl.zeros([words.BINS], tl.int32)
        lower_counts = tl.zeros([words.BINS], tl.int32)
        unranked = tl.zeros([BLOCK], tl.int32)  # 16 bits for inactive ones, 16 for others
        high = state + words.TARGETS
        low = high + words.TARGET
        logged = tl.load(state + words.LOGGED)
        course = tl.load(state + words.COURSE)
        speculative = course == words.SPECULATIVE
        keys = tl.where(speculative, tl.minimum(logged, capacity), capacity)
        keys = tl.where(first != 0, keys, 0)
        from_keys = course != words.EXACT
        count = tl.where(from_keys, tl.cdiv(keys, BLOCK), ranked_tiles)
        if (round != 0) & (tl.load(high + words.RANK) + tl.load(low + words.RANK) == 0):
            count = count * 0  # there is nothing to look for
        for tile in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):
            if from_keys:
                at = tile * BLOCK + tl.arange(0, BLOCK)
                key = tl.load(log_keys + at, mask=at < keys, other=NO_KEY)
                key = tl.where(speculative & (at < keys), key & 0x7FFFFFFF, key)
            else:
                t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
                key = keys_of(t, inv_scale, clip, rank_inactive, SECOND_ORDER, ACCESS)
            unranked += (key == INACTIVE_KEY).to(tl.int32)
            unranked += (key == NONFINITE_KEY).to(tl.int32) << 16
            upper_counts = _count(upper_counts, key, high, shift, digits, speculative)
            if lower > 0:
                lower_counts = _count(lower_counts, key, low, shift, digits, speculative)
        histogram = state + words.HISTOGRAMS + tl.arange(0, words.BINS)
        tl.atomic_add(histogram, upper_counts.to(tl.int64), mask=upper_counts > 0, sem="relaxed")
        tl.atomic_add(
            histogram + words.BINS, lower_counts.to(tl.int64), mask=lower_counts > 0, sem="relaxed"
        )
        if (round == 0) & (speculative == 0):
            add(record + words.INACTIVE, unranked & 0xFFFF)
            add(record + words.NONFINITE, unranked >> 16)
        if is_last(state + words.TICKETS + round, programs):
            overflowed = speculative & (logged > capacity)
            _scan(state, record, upper, lower, elements, round, digits, speculative, overflowed)


@kernel()
def estimated_record_kernel(state, record, elements, found_inf):
    """The record of a pass by estimates that stand."""
    if tl.load(found_inf) == 0:
        write_counts(state, record, elements)
        tl.store(record + words.HIGH, tl.load(state + words.ESTIMATE + words.HIGH))
        tl.store(record + words.LOW, tl.load(state + words.ESTIMATE + words.LOW))


@triton.jit
def capture_tile(
    t, tile, inv_scale, clip, rank_inactive, record,
    SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A mask by the thresholds of a record."""
    key = keys_of(t, inv_scale, clip, rank_inactive, SECOND_ORDER, ACCESS)
    store_mask_bits(t, tile, is_selected(key, record), BLOCK)


@kernel()
def capture_kernel(
    rows, tile_rows, tiles, inv_scale, clip, rank_inactive, record,
    SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masks by the thresholds of a record."""
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
        capture_tile(t, tile, inv_scale, clip, rank_inactive, record, SECOND_ORDER, ACCESS, BLOCK)
