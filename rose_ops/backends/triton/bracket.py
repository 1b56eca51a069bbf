"""Selection and its use in one pass, as Triton kernels; see :func:`rose_ops.reference.step_`.

Five launches, whatever the data: the device decides what each has to do.

1. ``sample``: the keys of one line of 16 elements in each of many equal strata.
2. ``bracket``: a window around the threshold from some of the sample, bins of all of the sample in that
   window, and from those the bracket. Where a class of ties surely is the threshold, the bracket is
   that one key ("collapsed"). Where more could be inside than the log takes, the mode is EXACT.
3. ``pass``: treats every element by the estimated threshold, counts, and logs what is inside the
   bracket. In the mode EXACT it counts only.
4. ``resolve``: the threshold, from the counts and a second digit of the log's keys (EXACT: of all).
5. ``fix``: treats again what was treated wrongly (EXACT: everything, for the first time).

With ``approx``, the quantiles of the sample (by ``_select_kernel``) are the estimates and there is no
bracket: the pass logs nothing, ``resolve`` writes down what it counted, and nothing is to be fixed.

A key inside a bracket has two digits: its bin, of at least 2048, and what is left, at most 16 bits.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import math

import triton
import triton.language as tl

from rose_ops import definitions
from rose_ops.backends.triton.kernels import (
    BITS,
    COLUMNS,
    DATA,
    FIRST_LINE,
    FIRST_TILE,
    GROUP,
    INACTIVE,
    INDEX,
    INFINITY,
    NONFINITE,
    PREPARED,
    N,
    _adamw,
    _gradient,
    _is_selected,
    _key,
    _keys_of_tile,
    _load,
    _locate,
    _mask_bit,
    _mix,
    _prepare,
    _rank_of,
    _store_mask_bits,
    _store_moments,
    _store_parameter,
    _tile,
    kernel,
)
from rose_ops.definitions import LOG_OF_FAILURE

LINE: tl.constexpr = tl.constexpr(definitions.LINE)
SAMPLE_WORD: tl.constexpr = tl.constexpr(definitions.SAMPLE_KEY * 0x9E3779B9 % 2**32)
# The statistics of csrc/include/rose/threshold.h, with r of half_width().
LOG: tl.constexpr = tl.constexpr(LOG_OF_FAILURE)
ROOT: tl.constexpr = tl.constexpr(math.sqrt(8.0 * LOG_OF_FAILURE))  # of at_most()
ERRORS: tl.constexpr = tl.constexpr(math.sqrt(2.0 * LOG_OF_FAILURE))
HALF_R: tl.constexpr = tl.constexpr(definitions.LINE * math.sqrt(2.0 * LOG_OF_FAILURE) / 2.0)
OF_RANGE: tl.constexpr = tl.constexpr(2.0 / 3.0 * definitions.LINE * LOG_OF_FAILURE)
FEW: tl.constexpr = tl.constexpr(512)  # lines that give the window
WINDOW_BINS: tl.constexpr = tl.constexpr(2048)
SCANNED: tl.constexpr = tl.constexpr(512)  # bins at a time
FIRST_BINS: tl.constexpr = tl.constexpr(1 << 15)
SECOND_BINS: tl.constexpr = tl.constexpr(1 << 16)
SECOND_DIGIT: tl.constexpr = tl.constexpr(16)
SLOTS: tl.constexpr = tl.constexpr(64)  # copies of the counters: atomics on one word would queue

SPECULATE: tl.constexpr = tl.constexpr(0)
EXACT: tl.constexpr = tl.constexpr(1)

# Words of the state; the same as in __init__.py. The first ZEROED ones start as 0.
BRACKET_TICKET: tl.constexpr = tl.constexpr(0)
RESOLVE_TICKET: tl.constexpr = tl.constexpr(1)
LOGGED: tl.constexpr = tl.constexpr(2)
MODE: tl.constexpr = tl.constexpr(3)
SAMPLED: tl.constexpr = tl.constexpr(4)
ESTIMATE: tl.constexpr = tl.constexpr(8)  # of each threshold: the first words of a record
TARGETS: tl.constexpr = tl.constexpr(16)  # TARGET words for each of two thresholds
TARGET: tl.constexpr = tl.constexpr(16)
COUNTERS: tl.constexpr = tl.constexpr(48)  # of the pass: COUNTS in each slot
COUNTS: tl.constexpr = tl.constexpr(8)
WINDOWS: tl.constexpr = tl.constexpr(48 + 64 * 8)
ZEROED: tl.constexpr = tl.constexpr(48 + 64 * 8 + 2 * 2048)
FIRST_DIGITS: tl.constexpr = tl.constexpr(48 + 64 * 8 + 2 * 2048)
SECOND_DIGITS: tl.constexpr = tl.constexpr(48 + 64 * 8 + 2 * 2048 + 2 * (1 << 15))

# Words of a target.
LOW: tl.constexpr = tl.constexpr(0)  # the bracket; both 0: there is none
END: tl.constexpr = tl.constexpr(1)
SHIFT: tl.constexpr = tl.constexpr(3)  # from a key in the bracket to its bin
COLLAPSED: tl.constexpr = tl.constexpr(4)
WINDOW_LOW: tl.constexpr = tl.constexpr(5)
WINDOW_HIGH: tl.constexpr = tl.constexpr(6)
MIDDLE: tl.constexpr = tl.constexpr(7)
# Of the sample: keys below the window, at or below the middle, and at it.
BELOW_WINDOW: tl.constexpr = tl.constexpr(8)
UPTO_MIDDLE: tl.constexpr = tl.constexpr(9)
AT_MIDDLE: tl.constexpr = tl.constexpr(10)
# Sums of products of the differences between neighbouring lines, of their elements that are ranked (r)
# and of those that are at or below the middle (c), too.
CC: tl.constexpr = tl.constexpr(11)
CR: tl.constexpr = tl.constexpr(12)
RR: tl.constexpr = tl.constexpr(13)

# Counters of the pass; two more of each target from BELOW and BELOW_LOWER on.
UPDATED: tl.constexpr = tl.constexpr(0)
BAD: tl.constexpr = tl.constexpr(1)
BELOW: tl.constexpr = tl.constexpr(2)  # and INSIDE
KEPT: tl.constexpr = tl.constexpr(4)  # by the estimate
PASS_INACTIVE: tl.constexpr = tl.constexpr(5)
BELOW_LOWER: tl.constexpr = tl.constexpr(6)


@triton.jit
def _programs_of(count, size):
    """What this program has to do of ``count`` things, ``size`` at a time."""
    return tl.program_id(0).to(tl.int64) * size, count.to(tl.int64), tl.num_programs(0) * size


@triton.jit
def _add(word, numbers):
    tl.atomic_add(word, tl.sum(numbers.to(tl.int64)), sem="relaxed")


@triton.jit
def _zero(words, count):
    for start in range(0, count, WINDOW_BINS):
        at = start + tl.arange(0, WINDOW_BINS)
        tl.store(words + at, tl.zeros([WINDOW_BINS], tl.int64), mask=at < count)


# --------------------------------------------------------------------------------------------- sample


@kernel(registers=128)
def _sample_kernel(
    rows, ranked, dims, hyper, inv_scale, clip, rank_inactive, operand, found_inf, state, record, words,
    sample, draw, strata, stratum, lines,
    all_rows, count, lr, prepared, keys, gamma, seed, first_weight, second_weight,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, SECOND: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """The keys of those of the sample's lines that are in one of these ``ranked`` segments; -1 where
    there is no element. See ``sampled`` in reference.py, with any number of strata. Prepares the update
    of ``count`` segments."""
    _prepare(
        all_rows, count, hyper, lr, found_inf, prepared, keys, gamma, seed, first_weight, second_weight,
        0,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for start in range(program * 1024, ZEROED, tl.num_programs(0) * 1024):
        at = start + tl.arange(0, 1024)
        tl.store(state + at, tl.zeros([1024], tl.int64), mask=at < ZEROED)
    if program == 0:
        word = tl.arange(0, 16)
        tl.store(record + word, tl.where(word < 2, -1, 0).to(tl.int64), mask=word < words)
    number = program * LINES + tl.arange(0, LINES).to(tl.int64)
    key = _mix((tl.zeros_like(number) + draw).to(tl.uint32) ^ SAMPLE_WORD)
    random = _mix(number.to(tl.uint32) ^ _mix(key))  # numbers have 32 bits
    line = number * stratum + ((random.to(tl.int64) * stratum) >> 32)
    # The last segment that starts at or before it.
    row = rows + tl.zeros_like(number)
    size = ranked
    while size > 1:
        middle = row + (size // 2) * COLUMNS
        row = tl.where(tl.load(middle + FIRST_LINE) <= line, middle, row)
        size -= size // 2
    start = (line - tl.load(row + FIRST_LINE)) * LINE
    n = tl.load(row + N)
    there = (number < strata) & (start >= 0) & (start < n)
    index = start[:, None] + tl.arange(0, LINE)[None, :].to(tl.int64)
    valid = there[:, None] & (index < n[:, None])
    key = _keys_of_tile(
        row[:, None], dims, index, valid, hyper, inv_scale, clip, rank_inactive, operand, D0, D1,
        LINEAR, False, SECOND, True,
    )  # fmt: skip
    to = number[:, None] * LINE + tl.arange(0, LINE)[None, :]
    mine = there | ((number < strata) & (line >= lines))
    tl.store(sample + to, tl.where(valid, key, -1), mask=mine[:, None])


# -------------------------------------------------------------------------------------------- bracket


@triton.jit
def _window(key, fraction, lines):
    """Keys at the ``fraction`` of the ranked ones of ``key``, and on each side 5 standard errors (if
    elements of a line are as alike as 2 in 3) and what a bracket from ``lines`` has at least. A window
    that does not hold the bracket costs time only."""
    ranked = key >= 0
    size = tl.sum(ranked.to(tl.int32)).to(tl.float64)
    q = fraction.to(tl.float64) * 1e-9
    position = q * size
    margin = 5.0 * tl.sqrt(2.0 * size * q * (1.0 - q)) + 2 * LINE
    margin += size * (8.0 / 3.0 * LOG) / lines.to(tl.float64)
    last = tl.maximum(size - 1.0, 0.0)
    wanted0 = tl.maximum(position - margin, 0.0).to(tl.int64)
    wanted1 = tl.minimum(position, last).to(tl.int64)
    wanted2 = tl.minimum(position + margin, last).to(tl.int64)
    key0 = tl.full([], 0, tl.int32)
    key1 = key0
    key2 = key0
    for i in range(31):  # the largest keys with no more than `wanted` below them
        bit = 1 << (30 - i)
        below = (ranked & (key < key0 + bit)).to(tl.int64)
        below += (ranked & (key < key1 + bit)).to(tl.int64) << 20
        below += (ranked & (key < key2 + bit)).to(tl.int64) << 40
        counts = tl.sum(below)
        key0 += tl.where((counts & 0xFFFFF) <= wanted0, bit, 0)
        key1 += tl.where(((counts >> 20) & 0xFFFFF) <= wanted1, bit, 0)
        key2 += tl.where((counts >> 40) <= wanted2, bit, 0)
    low = tl.where(position > margin, key0, 0)
    high = tl.where(position + margin < size, key2, INFINITY)
    return low, high, tl.minimum(key1, INFINITY)


@triton.jit
def _shift_for(span, bins):
    """The smallest shift that makes of ``span`` less than ``bins``."""
    shift = span * 0
    for _ in range(31):
        shift += ((span >> shift) >= bins).to(tl.int32)
    return shift


@triton.jit
def _decide(state, t, fraction, stratum, width):
    """The bracket of a target; returns how much the log has to take."""
    target = state + TARGETS + t * TARGET
    low = tl.load(target + WINDOW_LOW, cache_modifier=".cg")
    high = tl.load(target + WINDOW_HIGH, cache_modifier=".cg")
    middle = tl.load(target + MIDDLE, cache_modifier=".cg")
    shift = _shift_for((high - low).to(tl.int32), WINDOW_BINS)
    at = tl.arange(0, WINDOW_BINS)
    bins = tl.load(state + WINDOWS + t * WINDOW_BINS + at, cache_modifier=".cg")
    weight = stratum.to(tl.float64)
    q = fraction.to(tl.float64) * 1e-9
    sampled = tl.load(state + SAMPLED, cache_modifier=".cg")

    cc = tl.load(target + CC, cache_modifier=".cg").to(tl.float64)
    cr = tl.load(target + CR, cache_modifier=".cg").to(tl.float64)
    rr = tl.load(target + RR, cache_modifier=".cg").to(tl.float64)
    u = tl.maximum(cc - 2.0 * q * cr + q * q * rr, 0.0)
    deviation = tl.sqrt(u + HALF_R * HALF_R) + HALF_R
    margin = weight * width * (deviation * ERRORS + OF_RANGE)
    # Estimated numbers of elements less the fraction of all that are ranked: below the window, up to
    # each bin, up to the middle.
    all_ranked = q * weight * sampled.to(tl.float64)
    start = weight * tl.load(target + BELOW_WINDOW, cache_modifier=".cg").to(tl.float64) - all_ranked
    upto = start + weight * tl.cumsum(bins, 0).to(tl.float64)
    upto_middle = tl.load(target + UPTO_MIDDLE, cache_modifier=".cg")
    below_middle = upto_middle - tl.load(target + AT_MIDDLE, cache_modifier=".cg")

    first = tl.sum((upto < -1.0 - margin).to(tl.int32))
    estimate = tl.sum((upto < 0.0).to(tl.int32))
    last = tl.sum((upto <= margin).to(tl.int32))
    last_bin = ((high - low) >> shift).to(tl.int32)
    fails = ((low > 0) & (start >= -1.0 - margin)) | ((high < INFINITY) & (last > last_bin))
    last = tl.minimum(last, last_bin)
    first = tl.minimum(first, last)
    inside = tl.where(fails, sampled, tl.sum(tl.where((at >= first) & (at <= last), bins, 0)))
    to = tl.minimum(low + ((last + 1).to(tl.int64) << shift) - 1, high)
    guess = tl.minimum(low + ((tl.minimum(estimate, last) + 1).to(tl.int64) << shift) - 1, high)
    low = tl.where(fails, 0, low + (first.to(tl.int64) << shift))
    high = tl.where(fails, INFINITY, to)
    guess = tl.where(fails, middle, guess)

    collapsed = (weight * below_middle.to(tl.float64) - all_ranked < -1.0 - margin) & (
        weight * upto_middle.to(tl.float64) - all_ranked > margin
    )
    low = tl.where(collapsed, middle, low)
    high = tl.where(collapsed, middle, high)
    tl.store(target + LOW, low)
    tl.store(target + END, high + 1)
    tl.store(state + ESTIMATE + t, tl.where(collapsed, middle, guess))
    tl.store(target + COLLAPSED, collapsed.to(tl.int64))
    shift = tl.minimum(_shift_for((high - low).to(tl.int32), WINDOW_BINS), SECOND_DIGIT)
    tl.store(target + SHIFT, shift.to(tl.int64))
    _zero(state + FIRST_DIGITS + t * FIRST_BINS, ((high - low) >> shift) + 1)
    _zero(state + SECOND_DIGITS + t * SECOND_BINS, 1 << shift)
    # At most, but for a probability of exp(-l): the lower tail of a sum of independent terms between 0
    # and 16, whose squares are at most 16 times as large.
    root = tl.sqrt(inside.to(tl.float64) + 8.0 * LOG) + ROOT
    most = tl.where(stratum == 1, inside.to(tl.float64), weight * root * root)
    return tl.where(collapsed, 0.0, most)


@triton.jit
def _count_digits(bins, digit, inside, BLOCK: tl.constexpr):
    """Adds to bins; those of the first digit together, as atomics would queue in a class of ties."""
    lane = tl.arange(0, BLOCK)
    first = tl.min(tl.where(inside, (lane.to(tl.int64) << 32) | digit.to(tl.int64), 1 << 62))
    common = (first & 0xFFFFFFFF).to(tl.int32)
    same = inside & (digit == common)
    count = tl.sum(same.to(tl.int32)).to(tl.int64)
    tl.atomic_add(bins + common, count, mask=count > 0, sem="relaxed")
    tl.atomic_add(
        bins + tl.where(inside, digit, 0), tl.full([BLOCK], 1, tl.int64),
        mask=inside & (digit != common), sem="relaxed",
    )  # fmt: skip


@kernel(registers=128, num_warps=16)
def _bracket_kernel(
    found_inf, state, sample, lines, stratum, upper, lower, width, elements, capacity,
    LINES: tl.constexpr,
):  # fmt: skip
    """Each program finds the windows, which are the same; the last one the brackets."""
    if (lines > 0) & (tl.load(found_inf) == 0):
        few = tl.minimum(lines, FEW)
        element = tl.arange(0, FEW * LINE)
        there = element // LINE < few
        line = (element // LINE).to(tl.int64) * (lines // few)
        some = tl.load(sample + line * LINE + element % LINE, mask=there, other=NONFINITE)
        targets = 1 + (lower > 0).to(tl.int32)
        for t in range(0, targets):
            target = state + TARGETS + t * TARGET
            low, high, middle = _window(some, tl.where(t == 0, upper, lower), lines)
            shift = _shift_for(high - low, WINDOW_BINS)
            tl.store(target + WINDOW_LOW, low.to(tl.int64))
            tl.store(target + WINDOW_HIGH, high.to(tl.int64))
            tl.store(target + MIDDLE, middle.to(tl.int64))
            # Of each line, 8 bits for each of four numbers, which are 16 at most.
            sampled = tl.zeros([LINES], tl.int32)
            upto_middle = tl.zeros([LINES], tl.int32)
            at_middle = tl.zeros([LINES], tl.int32)
            below = tl.zeros([LINES], tl.int32)
            cc = tl.zeros([LINES // 2], tl.int32)
            cr = tl.zeros([LINES // 2], tl.int32)
            rr = tl.zeros([LINES // 2], tl.int32)
            begin, end, stride = _programs_of(lines, LINES)
            for start in range(begin, end, stride):
                number = start + tl.arange(0, LINES).to(tl.int64)
                at = number[:, None] * LINE + tl.arange(0, LINE)[None, :]
                key = tl.load(sample + at, mask=(number < lines)[:, None], other=NONFINITE)
                ranked = key >= 0
                four = (
                    ranked.to(tl.int32)
                    + ((ranked & (key <= middle)).to(tl.int32) << 8)
                    + ((key == middle).to(tl.int32) << 16)
                    + ((ranked & (key < low)).to(tl.int32) << 24)
                )
                four = tl.sum(four, axis=1)
                r = four & 0xFF
                c = (four >> 8) & 0xFF
                sampled += r
                upto_middle += c
                at_middle += (four >> 16) & 0xFF
                below += four >> 24
                even_r, odd_r = tl.split(r.reshape([LINES // 2, 2]))
                even_c, odd_c = tl.split(c.reshape([LINES // 2, 2]))
                rr += (even_r - odd_r) * (even_r - odd_r)
                cr += (even_c - odd_c) * (even_r - odd_r)
                cc += (even_c - odd_c) * (even_c - odd_c)
                flat = key.reshape([LINES * LINE])
                inside = (flat >= low) & (flat <= high)
                digit = tl.where(inside, (flat - low) >> shift, 0)
                _count_digits(state + WINDOWS + t * WINDOW_BINS, digit, inside, LINES * LINE)
            _add(target + BELOW_WINDOW, below)
            _add(target + UPTO_MIDDLE, upto_middle)
            _add(target + AT_MIDDLE, at_middle)
            _add(target + CC, cc)
            _add(target + CR, cr)
            _add(target + RR, rr)
            if t == 0:
                _add(state + SAMPLED, sampled)
        tl.debug_barrier()
        # Releases what all programs have added to the last one.
        if tl.atomic_add(state + BRACKET_TICKET, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            most = tl.full([], 0.0, tl.float64)
            for t in range(0, targets):
                most += _decide(state, t, tl.where(t == 0, upper, lower), stratum, width)
            most = tl.minimum(most, elements.to(tl.float64))
            tl.store(state + MODE, tl.where(most <= capacity, SPECULATE, EXACT).to(tl.int64))


# ----------------------------------------------------------------------------------------------- pass


@triton.jit
def _inside(state, t, key):
    """Of a target: whether keys are below its bracket, inside it, and inside it and to be counted."""
    target = state + TARGETS + t * TARGET
    low = tl.load(target + LOW).to(tl.int32)
    end = tl.load(target + END).to(tl.int32)
    above = key >= low
    counted = above & (key < tl.where(tl.load(target + COLLAPSED) != 0, 0, end))
    return (key >= 0) & (key < low), above & (key < end), counted


@triton.jit
def _count_first(state, t, key, counted, BLOCK: tl.constexpr):
    """The first digits of keys in the bracket."""
    target = state + TARGETS + t * TARGET
    low = tl.load(target + LOW).to(tl.int32)
    digit = tl.where(counted, (key - low) >> tl.load(target + SHIFT).to(tl.int32), 0)
    _count_digits(state + FIRST_DIGITS + t * FIRST_BINS, digit, counted, BLOCK)


@triton.jit
def _by_estimate(state, key, TWO: tl.constexpr):
    kept = (key >= 0) & (key <= tl.load(state + ESTIMATE).to(tl.int32))
    if TWO:
        kept = kept & (key > tl.load(state + ESTIMATE + 1).to(tl.int32))
    return kept


@triton.jit
def _count(state, tile, key, updated, kept, TWO: tl.constexpr, BLOCK: tl.constexpr):
    """Counters of a tile, 16 bits for each, and first digits; returns which elements are to be
    logged, and how many. Elements that are not to be counted have keys of -1."""
    below, inside, counted = _inside(state, 0, key)
    four = (
        updated.to(tl.int64)
        + ((key == NONFINITE).to(tl.int64) << (16 * BAD))
        + (below.to(tl.int64) << (16 * BELOW))
        + (inside.to(tl.int64) << (16 * (BELOW + 1)))
    )
    more = kept.to(tl.int64) + ((key == INACTIVE).to(tl.int64) << 16)
    logged = counted
    if TWO:
        below, inside, counted_lower = _inside(state, 1, key)
        more += (below.to(tl.int64) << 32) + (inside.to(tl.int64) << 48)
        logged = logged | counted_lower
    four_sum = tl.sum(four)
    more_sum = tl.sum(more)
    field = tl.arange(0, COUNTS)
    both = tl.where(field < 4, four_sum, more_sum)
    value = (both >> (field % 4 * 16).to(tl.int64)) & 0xFFFF
    slot = state + COUNTERS + tile % SLOTS * COUNTS
    tl.atomic_add(slot + field, value, mask=value > 0, sem="relaxed")
    count = tl.sum(logged.to(tl.int32))
    if count > 0:
        _count_first(state, 0, key, counted, BLOCK)
        if TWO:
            _count_first(state, 1, key, counted_lower, BLOCK)
    return logged, count


@triton.jit
def _append(
    state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK: tl.constexpr
):  # fmt: skip
    """Logs keys, with their signs set where ``kept``, and places, for which there are ``count``;
    returns the first entry and the others' distances from it."""
    first = tl.atomic_add(state + LOGGED, count.to(tl.int64), sem="relaxed")
    after = tl.cumsum(logged.to(tl.int32), 0) - 1
    room = tl.maximum(tl.minimum(capacity - first, BLOCK), 0).to(tl.int32)
    fits = logged & (after < room)
    tl.store(log_keys + first + after, tl.where(kept, key | INACTIVE, key), mask=fits)
    tl.store(log_places + first + after, place + tl.arange(0, BLOCK), mask=fits)
    return first, after, fits


@kernel()
def _capture_pass_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, state, log_keys, log_places,
    capacity, first_place,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pass of a capture: bits by the estimate, where there is memory for them."""
    if tiles > 0:
        tile = tl.program_id(0).to(tl.int64)
        row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
        key = _keys_of_tile(
            row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR, ALIGNED,
            SECOND,
        )  # fmt: skip
        key = tl.where(valid, key, -1)
        kept = _by_estimate(state, key, TWO)
        logged, count = _count(state, tile, key, kept, kept, TWO, BLOCK)
        if tl.load(state + MODE) == SPECULATE:
            if tl.load(row + BITS) != 0:
                _store_mask_bits(row, tile, kept | (key == INACTIVE), BLOCK)
            if count > 0:
                place = first_place + tile * BLOCK
                _append(state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK)


@triton.jit
def _gradient_and_moment(
    row, dims, index, valid, hyper, inv_scale, clip, D1: tl.constexpr, D2: tl.constexpr,
    LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    at = _locate(row, dims, index, 1, LINEAR)
    g = _load(tl.load(row + DATA + 1), at, valid, D1, ALIGNED)
    at = _locate(row, dims, index, 2, LINEAR)
    m = _load(tl.load(row + DATA + 2), at, valid, D2, ALIGNED)
    return _gradient(g, row, hyper, inv_scale, clip), m


@triton.jit
def _parameter_and_square(
    row, dims, index, valid, D0: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    at = _locate(row, dims, index, 0, LINEAR)
    p = _load(tl.load(row + DATA), at, valid, D0, ALIGNED)
    at = _locate(row, dims, index, 3, LINEAR)
    return p, _load(tl.load(row + DATA + 3), at, valid, D3, ALIGNED)


@triton.jit
def _kind(row, index, valid, base, selected, first_weight, second_weight, FRACTIONAL: tl.constexpr):
    """Of a selective segment's masks, for elements that are finite."""
    kind = base + selected.to(tl.int32) * second_weight
    if FRACTIONAL:  # there are first-order masks
        kind += _mask_bit(row, index, valid, 0) * first_weight
    return kind


@kernel(registers=80)
def _update_pass_kernel(
    rows, tile_rows, tiles, ranked_tiles, dims, hyper, inv_scale, clip, rank_inactive, found_inf, state,
    log_keys, log_places, log_old, capacity, first_place, prepared, keys, first_weight, second_weight,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The pass of an update. Segments from ``ranked_tiles`` on are not selective."""
    if (tiles > 0) & (tl.load(found_inf) == 0):
        tile = tl.program_id(0).to(tl.int64)
        row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
        speculate = tl.load(state + MODE) == SPECULATE
        is_ranked = valid & (tl.zeros([BLOCK], tl.int64) + tile < ranked_tiles)
        if speculate:
            g, m = _gradient_and_moment(
                row, dims, index, valid, hyper, inv_scale, clip, D1, D2, LINEAR, ALIGNED
            )
            segment = tl.load(row + INDEX)
            alpha = (1.0 - tl.load(hyper + tl.load(row + GROUP) * 6)).to(tl.float32)
            key = tl.where(is_ranked, _key(g, m, alpha, rank_inactive, True), -1)
            kept = _by_estimate(state, key, TWO)
            base = tl.zeros([BLOCK], tl.int32) + tl.load(keys + segment * 2 + 1)
            kind = _kind(
                row, index, valid, base, kept | (key == INACTIVE), first_weight, second_weight,
                FRACTIONAL,
            )  # fmt: skip
            kind = tl.where(key == NONFINITE, 0, kind)
            logged, count = _count(state, tile, key, valid & (kind != 0), kept, TWO, BLOCK)
            # Not earlier: registers would not do for these and for counting.
            p, v = _parameter_and_square(row, dims, index, valid, D0, D3, LINEAR, ALIGNED)
            if count > 0:
                place = first_place + tile * BLOCK
                first, after, fits = _append(
                    state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK
                )
                tl.store(log_old + first + after, p, mask=fits)
                tl.store(log_old + capacity + first + after, m, mask=fits)
                tl.store(log_old + 2 * capacity + first + after, v, mask=fits)
            u = prepared + segment * PREPARED
            pair = keys + segment * 2
            p, m, v = _adamw(p, g, m, v, kind, u, FRACTIONAL)
            _store_parameter(row, dims, index, p, pair, valid, D0, LINEAR, ALIGNED, STOCHASTIC)
            _store_moments(row, dims, index, m, v, pair, valid, D2, D3, LINEAR, ALIGNED, True)
        else:
            key = _keys_of_tile(
                row, dims, index, is_ranked, hyper, inv_scale, clip, rank_inactive, 1, D1, D2, LINEAR,
                ALIGNED, True,
            )  # fmt: skip
            key = tl.where(is_ranked, key, -1)
            none = key != key
            _count(state, tile, key, none, none, TWO, BLOCK)


# -------------------------------------------------------------------------------------------- resolve


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
    at = tl.arange(0, SLOTS)
    return tl.sum(tl.load(state + COUNTERS + at * COUNTS + field))


@triton.jit
def _narrow(state, t, fraction, elements):
    """What the counts of the pass say about a threshold: its rank inside the bracket (0: it is not
    there), how many are below and in the bracket, its bin's first key, its rank in the bin, and how
    many the bin has."""
    target = state + TARGETS + t * TARGET
    ranked = elements - _total(state, PASS_INACTIVE) - _total(state, BAD)
    rank = _rank_of(fraction.to(tl.int64), ranked)
    field = tl.where(t == 0, BELOW, BELOW_LOWER)
    below = _total(state, field)
    inside = _total(state, field + 1)
    rank -= below
    found = (rank > 0) & (rank <= inside)
    low = tl.load(target + LOW)
    shift = tl.load(target + SHIFT)
    count = ((tl.load(target + END) - 1 - low) >> shift) + 1
    searches = found & (tl.load(target + COLLAPSED) == 0)
    count = tl.where(searches, count, 0)
    index, before, in_bin = _find(state + FIRST_DIGITS + t * FIRST_BINS, count, rank)
    return rank, below, inside, searches, low + (index << shift), before, in_bin


@triton.jit
def _threshold(state, t, fraction, elements):
    """Key of a threshold, how many are at or below it, and whether it was missed."""
    target = state + TARGETS + t * TARGET
    rank, below, inside, searches, start, before, in_bin = _narrow(state, t, fraction, elements)
    shift = tl.load(target + SHIFT)
    count = tl.where(searches & (shift > 0), tl.full([], 1, tl.int64) << shift, 0)
    digits = state + SECOND_DIGITS + t * SECOND_BINS
    index, before_key, of_key = _find(digits, count, rank - before)
    found = start + index
    upto = below + before + tl.where(shift > 0, before_key + of_key, in_bin)
    # Outside: the nearest end of the bracket. There is nothing to miss if the rank is 0.
    low = tl.load(target + LOW)
    high = tl.load(target + END) - 1
    collapsed = tl.load(target + COLLAPSED) != 0
    some = (rank != 0) | (below != 0)
    key = tl.where(searches, found, tl.where(rank > 0, high, low - 1))
    upto = tl.where(searches, upto, tl.where(rank > 0, below + inside, below))
    key = tl.where(collapsed, low, tl.where(some, key, -1))
    upto = tl.where(collapsed, below + inside, tl.where(some, upto, 0))
    missed = (rank <= 0) | (rank > inside)
    return key, upto, missed & (collapsed | some)


@triton.jit
def _count_second(state, t, key, start, searches, BLOCK: tl.constexpr):
    target = state + TARGETS + t * TARGET
    shift = tl.load(target + SHIFT)
    size = tl.where(searches & (shift > 0), tl.full([], 1, tl.int64) << shift, 0)
    above = key.to(tl.int64) - start
    inside = (above >= 0) & (above < size)
    if tl.sum(inside.to(tl.int32)) > 0:
        digit = tl.where(inside, above, 0).to(tl.int32)
        _count_digits(state + SECOND_DIGITS + t * SECOND_BINS, digit, inside, BLOCK)


@kernel(registers=128)
def _resolve_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, operand, found_inf, state,
    record, log_keys, capacity, elements, upper, lower, programs, first, updates, approx,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second digits of the log (by the ``first`` launch) or of all keys; the last program scans."""
    if (programs > 0) & (tl.load(found_inf) == 0):
        speculated = tl.load(state + MODE) == SPECULATE
        logged = tl.load(state + LOGGED)
        targets = 1 + (lower > 0).to(tl.int32)
        for t in range(0, targets):
            fraction = tl.where(t == 0, upper, lower)
            _, _, _, searches, start, _, _ = _narrow(state, t, fraction, elements)
            if speculated:
                count = tl.where(first != 0, tl.minimum(logged, capacity), 0)
                begin, end, stride = _programs_of(count, BLOCK)
                for entry in range(begin, end, stride):
                    at = entry + tl.arange(0, BLOCK)
                    key = tl.load(log_keys + at, mask=at < count, other=0) & 0x7FFFFFFF
                    key = tl.where(at < count, key, -1)
                    _count_second(state, t, key, start, searches, BLOCK)
            else:
                begin, end, stride = _programs_of(tiles, 1)
                for tile in range(begin, end, stride):
                    row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
                    key = _keys_of_tile(
                        row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, operand, D0, D1,
                        LINEAR, ALIGNED, SECOND,
                    )  # fmt: skip
                    _count_second(state, t, tl.where(valid, key, -1), start, searches, BLOCK)
        tl.debug_barrier()
        # Releases what all programs have added to the last one.
        if tl.atomic_add(state + RESOLVE_TICKET, 1, sem="acq_rel") == programs - 1:
            # More was logged than the log takes: the estimate has to do.
            missed = speculated & (logged > capacity)
            estimated = missed | (approx != 0)
            kept = tl.full([], 0, tl.int64)
            for t in range(0, targets):
                fraction = tl.where(t == 0, upper, lower)
                key, upto, is_missed = _threshold(state, t, fraction, elements)
                missed = missed | is_missed
                kept += tl.where(t == 0, upto, -upto)
                tl.store(record + t, tl.where(estimated, tl.load(state + ESTIMATE + t), key))
            inactive = _total(state, PASS_INACTIVE)
            bad = _total(state, BAD)
            tl.store(record + 2, tl.where(estimated, _total(state, KEPT), tl.maximum(kept, 0)))
            tl.store(record + 3, elements - inactive - bad)
            tl.store(record + 4, inactive)
            tl.store(record + 5, bad)
            tl.store(record + 6, (missed & (approx == 0)).to(tl.int64))
            if updates != 0:
                tl.store(record + 8, _total(state, UPDATED))
                tl.store(record + 9, bad)


# ------------------------------------------------------------------------------------------------ fix


@triton.jit
def _wrong(
    record, log_keys, log_places, entry, logged, first_place, tiles, BLOCK: tl.constexpr
):  # fmt: skip
    """Entries of the log, of this launch's tiles, that were not treated by the threshold: which, their
    tiles and elements there, and whether they are selected."""
    at = entry + tl.arange(0, BLOCK).to(tl.int64)
    word = tl.load(log_keys + at, mask=at < logged, other=0)
    selected = _is_selected(word & 0x7FFFFFFF, record)
    wrong = (at < logged) & (selected != (word < 0))
    place = tl.load(log_places + at, mask=wrong, other=0) - first_place
    wrong = wrong & (place >= 0) & (place < tiles.to(tl.int64) * BLOCK)
    return at, wrong, place // BLOCK, place % BLOCK, selected


@kernel()
def _capture_fix_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, state, record, log_keys,
    log_places, capacity, first_place,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    logged = tl.load(state + LOGGED)
    if tl.load(state + MODE) == EXACT:
        begin, end, stride = _programs_of(tiles, 1)
        for tile in range(begin, end, stride):
            row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
            key = _keys_of_tile(
                row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR,
                ALIGNED, SECOND,
            )  # fmt: skip
            _store_mask_bits(row, tile, _is_selected(key, record) & valid, BLOCK)
    elif logged <= capacity:
        begin, end, stride = _programs_of(logged, BLOCK)
        for entry in range(begin, end, stride):
            _, wrong, tile, element, _ = _wrong(
                record, log_keys, log_places, entry, logged, first_place, tiles, BLOCK
            )
            if tl.sum(wrong.to(tl.int32)) > 0:
                row = rows + tl.load(tile_rows + tile, mask=wrong, other=0).to(tl.int64) * COLUMNS
                index = (tile - tl.load(row + FIRST_TILE)) * BLOCK + element
                # Bits are flipped in whole words, as several may have to be in one byte.
                byte = tl.load(row + BITS) + index // 8
                bit = (index % 8 + byte % 4 * 8).to(tl.int32)
                word = (byte // 4 * 4).to(tl.pointer_type(tl.int32))
                one = tl.full([BLOCK], 1, tl.int32)
                tl.atomic_xor(word, one << bit, mask=wrong, sem="relaxed")


@kernel(registers=128)
def _update_fix_kernel(
    rows, tile_rows, tiles, ranked_tiles, dims, hyper, inv_scale, clip, rank_inactive, found_inf, state,
    record, log_keys, log_places, log_old, capacity, first_place, prepared, keys, first_weight,
    second_weight,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if (tiles > 0) & (tl.load(found_inf) == 0):
        logged = tl.load(state + LOGGED)
        updated = tl.full([], 0, tl.int64)
        if tl.load(state + MODE) == EXACT:
            begin, end, stride = _programs_of(tiles, 1)
            for tile in range(begin, end, stride):
                row, index, valid = _tile(rows, tile_rows, tile, ALIGNED, BLOCK)
                g, m = _gradient_and_moment(
                    row, dims, index, valid, hyper, inv_scale, clip, D1, D2, LINEAR, ALIGNED
                )
                p, v = _parameter_and_square(row, dims, index, valid, D0, D3, LINEAR, ALIGNED)
                segment = tl.load(row + INDEX)
                alpha = (1.0 - tl.load(hyper + tl.load(row + GROUP) * 6)).to(tl.float32)
                is_ranked = valid & (tl.zeros([BLOCK], tl.int64) + tile < ranked_tiles)
                key = tl.where(is_ranked, _key(g, m, alpha, rank_inactive, True), -1)
                base = tl.zeros([BLOCK], tl.int32) + tl.load(keys + segment * 2 + 1)
                selected = is_ranked & _is_selected(key, record)
                kind = _kind(row, index, valid, base, selected, first_weight, second_weight, FRACTIONAL)
                kind = tl.where(key == NONFINITE, 0, kind)
                updated += tl.sum((valid & (kind != 0)).to(tl.int32)).to(tl.int64)
                pair = keys + segment * 2
                p, m, v = _adamw(p, g, m, v, kind, prepared + segment * PREPARED, FRACTIONAL)
                _store_parameter(row, dims, index, p, pair, valid, D0, LINEAR, ALIGNED, STOCHASTIC)
                _store_moments(row, dims, index, m, v, pair, valid, D2, D3, LINEAR, ALIGNED, True)
        elif logged <= capacity:
            begin, end, stride = _programs_of(logged, BLOCK)
            for entry in range(begin, end, stride):
                at, wrong, tile, element, selected = _wrong(
                    record, log_keys, log_places, entry, logged, first_place, tiles, BLOCK
                )
                if tl.sum(wrong.to(tl.int32)) > 0:
                    row = rows + tl.load(tile_rows + tile, mask=wrong, other=0).to(tl.int64) * COLUMNS
                    index = (tile - tl.load(row + FIRST_TILE)) * BLOCK + element
                    p = tl.load(log_old + at, mask=wrong, other=0.0)
                    m = tl.load(log_old + capacity + at, mask=wrong, other=0.0)
                    v = tl.load(log_old + 2 * capacity + at, mask=wrong, other=0.0)
                    to_g = _locate(row, dims, index, 1, LINEAR, True)
                    g = _load(tl.load(row + DATA + 1), to_g, wrong, D1, False)
                    g = _gradient(g, row, hyper, inv_scale, clip)
                    segment = tl.load(row + INDEX)
                    base = tl.load(keys + segment * 2 + 1)
                    kind = _kind(
                        row, index, wrong, base, selected, first_weight, second_weight, FRACTIONAL
                    )
                    was = kind + tl.where(selected, -second_weight, second_weight)
                    change = (kind != 0).to(tl.int32) - (was != 0).to(tl.int32)
                    updated += tl.sum(tl.where(wrong, change, 0)).to(tl.int64)
                    pair = keys + segment * 2
                    p, m, v = _adamw(p, g, m, v, kind, prepared + segment * PREPARED, FRACTIONAL)
                    _store_parameter(
                        row, dims, index, p, pair, wrong, D0, LINEAR, False, STOCHASTIC, True
                    )
                    _store_moments(
                        row, dims, index, m, v, pair, wrong, D2, D3, LINEAR, False, True, True
                    )
        if updated != 0:
            tl.atomic_add(record + 8, updated, sem="relaxed")
