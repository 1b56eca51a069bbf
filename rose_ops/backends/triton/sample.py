"""A bracket around each threshold, from a sample: how a step in one pass begins, see bracket.py.

The statistics are those of ``csrc/include/rose/threshold.h``, derived at
:func:`rose_ops.reference.step_`. Arguments of these kernels, and of those in bracket.py:

    sample: the keys of LINE elements of each of ``strata``; NO_KEY where there is no element.
    stratum: lines, of which one is drawn. Beyond the end, some of the last stratum may not be there.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import math

import triton
import triton.language as tl

from rose_ops import definitions
from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import Tile, kernel, keys_of, share_of
from rose_ops.backends.triton.elements import INFINITY_KEY, NO_KEY, mix
from rose_ops.backends.triton.select import add, fresh, is_last
from rose_ops.backends.triton.update import prepare
from rose_ops.definitions import LOG_OF_FAILURE

LINE = tl.constexpr(definitions.LINE)
SAMPLE_WORD = tl.constexpr(definitions.SAMPLE_KEY * 0x9E3779B9 % 2**32)
LOG = tl.constexpr(LOG_OF_FAILURE)
ROOT = tl.constexpr(math.sqrt(8.0 * LOG_OF_FAILURE))  # of at_most()
# Of half_width(), whose r is twice this.
HALF_R = tl.constexpr(definitions.LINE * math.sqrt(2.0 * LOG_OF_FAILURE) / 2.0)
ERRORS = tl.constexpr(math.sqrt(2.0 * LOG_OF_FAILURE))
OF_RANGE = tl.constexpr(2.0 / 3.0 * definitions.LINE * LOG_OF_FAILURE)

FEW = tl.constexpr(512)  # lines that give the window


@triton.jit
def _drawn_line(number, draw, stratum):
    """Of each stratum."""
    key = mix(mix((tl.zeros_like(number) + draw).to(tl.uint32) ^ SAMPLE_WORD))
    random = mix(number.to(tl.uint32) ^ key)  # numbers have 32 bits
    return number * stratum + ((random.to(tl.int64) * stratum) >> 32)


@kernel(registers=128)
def sample_kernel(
    rows, ranked, inv_scale, clip, rank_inactive, found_inf, state, record, sample, draw, strata,
    stratum, lines, course, all_rows, count, hyper, lr, gamma, prepared, seed,
    FRACTIONAL: tl.constexpr, SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The keys of those lines of the sample that are in the first ``ranked`` of these segments; see
    ``sampled`` in definitions.py, with any number of strata. Prepares the update of ``count`` segments
    from ``all_rows`` on, the state and the record."""
    SCATTERED: tl.constexpr = ACCESS.scattered
    prepare(
        all_rows, count, hyper, lr, gamma, inv_scale, clip, found_inf, prepared, seed, FRACTIONAL, True
    )
    program = tl.program_id(0).to(tl.int64)
    begin, end, stride = share_of(tl.full([], words.STATE, tl.int64), 1024)
    for start in range(begin, end, stride):
        at = start + tl.arange(0, 1024)
        value = tl.where(at == words.COURSE, course, 0).to(tl.int64)
        tl.store(state + at, value, mask=at < words.STATE)
    if program == 0:
        word = tl.arange(0, 16)
        empty = tl.where(word < words.KEPT, -1, 0).to(tl.int64)
        tl.store(record + word, empty, mask=word < words.RECORD)
    number = program * LINES + tl.arange(0, LINES).to(tl.int64)
    line = _drawn_line(number, draw, stratum)
    # The last segment that starts at or before it.
    row = rows + tl.zeros_like(number)
    size = ranked
    while size > 1:
        half = row + (size // 2) * words.COLUMNS
        row = tl.where(tl.load(half + words.FIRST_LINE) <= line, half, row)
        size -= size // 2
    start = (line - tl.load(row + words.FIRST_LINE)) * LINE
    n = tl.load(row + words.N)
    there = (number < strata) & (start >= 0) & (start < n)
    index = start[:, None] + tl.arange(0, LINE)[None, :].to(tl.int64)
    t = Tile(row[:, None], index, there[:, None] & (index < n[:, None]))
    key = keys_of(t, inv_scale, clip, rank_inactive, SECOND_ORDER, SCATTERED)
    to = sample + number[:, None] * LINE + tl.arange(0, LINE)[None, :]
    mine = there | ((number < strata) & (line >= lines))
    tl.store(to, key, mask=mine[:, None])


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
    high = tl.where(position + margin < size, key2, INFINITY_KEY)
    return low, high, tl.minimum(key1, INFINITY_KEY)


@triton.jit
def _shift_for(span, bins):
    """The smallest shift that makes of ``span`` less than ``bins``."""
    shift = span * 0
    for _ in range(31):
        shift += ((span >> shift) >= bins).to(tl.int32)
    return shift


@triton.jit
def count_digits(bins, digit, inside, BLOCK: tl.constexpr):
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


@triton.jit
def _count_sample(state, t, sample, strata, low, high, pivot, LINES: tl.constexpr):
    """What a target's bracket depends on: bins of its window, and sums of this program's lines."""
    target = state + words.TARGETS + t * words.TARGET
    shift = _shift_for(high - low, words.WINDOW_BINS)
    sampled = tl.zeros([LINES], tl.int32)
    upto_pivot = tl.zeros([LINES], tl.int32)
    at_pivot = tl.zeros([LINES], tl.int32)
    below = tl.zeros([LINES], tl.int32)
    cc = tl.zeros([LINES // 2], tl.int32)
    cr = tl.zeros([LINES // 2], tl.int32)
    rr = tl.zeros([LINES // 2], tl.int32)
    begin, end, stride = share_of(strata, LINES)
    for start in range(begin, end, stride):
        line = (start + tl.arange(0, LINES).to(tl.int64))[:, None]
        key = tl.load(sample + line * LINE + tl.arange(0, LINE)[None, :], line < strata, NO_KEY)
        ranked = key >= 0
        # Of each line, 8 bits for each of four numbers, which are 16 at most.
        four = ranked.to(tl.int32)
        four += (ranked & (key <= pivot)).to(tl.int32) << 8
        four += (key == pivot).to(tl.int32) << 16
        four += (ranked & (key < low)).to(tl.int32) << 24
        four = tl.sum(four, axis=1)
        r = four & 0xFF
        c = (four >> 8) & 0xFF
        sampled += r
        upto_pivot += c
        at_pivot += (four >> 16) & 0xFF
        below += four >> 24
        even_r, odd_r = tl.split(r.reshape([LINES // 2, 2]))
        even_c, odd_c = tl.split(c.reshape([LINES // 2, 2]))
        rr += (even_r - odd_r) * (even_r - odd_r)
        cr += (even_c - odd_c) * (even_r - odd_r)
        cc += (even_c - odd_c) * (even_c - odd_c)
        flat = key.reshape([LINES * LINE])
        inside = (flat >= low) & (flat <= high)
        digit = tl.where(inside, (flat - low) >> shift, 0)
        count_digits(state + words.WINDOWS + t * words.WINDOW_BINS, digit, inside, LINES * LINE)
    add(target + words.BELOW_WINDOW, below)
    add(target + words.UPTO_PIVOT, upto_pivot)
    add(target + words.AT_PIVOT, at_pivot)
    add(target + words.CC, cc)
    add(target + words.CR, cr)
    add(target + words.RR, rr)
    if t == 0:
        add(state + words.SAMPLED, sampled)


@triton.jit
def _half_width(target, q):
    """Of a bracket, in elements of the sample."""
    cc = fresh(target + words.CC).to(tl.float64)
    cr = fresh(target + words.CR).to(tl.float64)
    rr = fresh(target + words.RR).to(tl.float64)
    u = tl.maximum(cc - 2.0 * q * cr + q * q * rr, 0.0)
    deviation = tl.sqrt(u + HALF_R * HALF_R) + HALF_R
    return deviation * ERRORS + OF_RANGE


@triton.jit
def _decide(state, t, fraction, stratum, width):
    """The bracket of a target; returns how much the log has to take."""
    target = state + words.TARGETS + t * words.TARGET
    low = fresh(target + words.WINDOW_LOW)
    high = fresh(target + words.WINDOW_HIGH)
    pivot = fresh(target + words.PIVOT)
    shift = _shift_for((high - low).to(tl.int32), words.WINDOW_BINS)
    at = tl.arange(0, words.WINDOW_BINS)
    bins = fresh(state + words.WINDOWS + t * words.WINDOW_BINS + at)
    sampled = fresh(state + words.SAMPLED)
    weight = stratum.to(tl.float64)
    q = fraction.to(tl.float64) * 1e-9
    margin = weight * width * _half_width(target, q)
    # Estimated numbers of elements less the fraction of all that are ranked: below the window, up to
    # each bin, and of a class of ties at the pivot.
    all_ranked = q * weight * sampled.to(tl.float64)
    start = weight * fresh(target + words.BELOW_WINDOW).to(tl.float64) - all_ranked
    upto = start + weight * tl.cumsum(bins, 0).to(tl.float64)
    upto_pivot = fresh(target + words.UPTO_PIVOT)
    below_pivot = upto_pivot - fresh(target + words.AT_PIVOT)
    collapsed = (weight * below_pivot.to(tl.float64) - all_ranked < -1.0 - margin) & (
        weight * upto_pivot.to(tl.float64) - all_ranked > margin
    )

    first = tl.sum((upto < -1.0 - margin).to(tl.int32))
    estimate = tl.sum((upto < 0.0).to(tl.int32))
    last = tl.sum((upto <= margin).to(tl.int32))
    last_bin = ((high - low) >> shift).to(tl.int32)
    fails = ((low > 0) & (start >= -1.0 - margin)) | ((high < INFINITY_KEY) & (last > last_bin))
    last = tl.minimum(last, last_bin)
    first = tl.minimum(first, last)
    inside = tl.where(fails, sampled, tl.sum(tl.where((at >= first) & (at <= last), bins, 0)))
    to = tl.minimum(low + ((last + 1).to(tl.int64) << shift) - 1, high)
    guess = tl.minimum(low + ((tl.minimum(estimate, last) + 1).to(tl.int64) << shift) - 1, high)
    low = tl.where(collapsed, pivot, tl.where(fails, 0, low + (first.to(tl.int64) << shift)))
    high = tl.where(collapsed, pivot, tl.where(fails, INFINITY_KEY, to))
    tl.store(target + words.BRACKET_LOW, low)
    tl.store(target + words.BRACKET_END, high + 1)
    tl.store(state + words.ESTIMATE + t, tl.where(collapsed | fails, pivot, guess))
    tl.store(target + words.COLLAPSED, collapsed.to(tl.int64))
    # at_most(): but for a probability of exp(-l).
    root = tl.sqrt(inside.to(tl.float64) + 8.0 * LOG) + ROOT
    most = tl.where(stratum == 1, inside.to(tl.float64), weight * root * root)
    return tl.where(collapsed, 0.0, most)


@kernel(registers=128, num_warps=16)
def bracket_kernel(
    found_inf, state, sample, strata, stratum, upper, lower, width, elements, capacity,
    LINES: tl.constexpr,
):  # fmt: skip
    """Each program finds the windows, which are the same; the last one the brackets.

    Args:
        width: that half-widths are multiplied by; 1 unless in tests.
        elements: that are ranked.
    """
    if (strata > 0) & (tl.load(found_inf) == 0):
        few = tl.minimum(strata, FEW)
        element = tl.arange(0, FEW * LINE)
        line = (element // LINE).to(tl.int64) * (strata // few)
        some = tl.load(sample + line * LINE + element % LINE, element // LINE < few, NO_KEY)
        targets = 1 + (lower > 0).to(tl.int32)
        for t in range(0, targets):
            target = state + words.TARGETS + t * words.TARGET
            low, high, pivot = _window(some, tl.where(t == 0, upper, lower), strata)
            tl.store(target + words.WINDOW_LOW, low.to(tl.int64))
            tl.store(target + words.WINDOW_HIGH, high.to(tl.int64))
            tl.store(target + words.PIVOT, pivot.to(tl.int64))
            _count_sample(state, t, sample, strata, low, high, pivot, LINES)
        if is_last(state + words.BRACKET_TICKET, tl.num_programs(0)):
            most = tl.full([], 0.0, tl.float64)
            for t in range(0, targets):
                most += _decide(state, t, tl.where(t == 0, upper, lower), stratum, width)
            most = tl.minimum(most, elements.to(tl.float64))
            tl.store(
                state + words.COURSE,
                tl.where(most <= capacity, words.SPECULATIVE, words.EXACT).to(tl.int64),
            )
