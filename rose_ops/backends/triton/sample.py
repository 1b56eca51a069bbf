"""A bracket around each threshold, from a sample: how a step in one pass begins, see bracket.py.

The statistics are those of ``csrc/include/rose/threshold.h``, derived at
:func:`rose_ops.reference.step_`. Arguments of these kernels:

    state: see words.py.
    sample: the keys of LINE elements of each of ``strata``; -1 where there is no element.
    stratum: lines, of which one is drawn. Beyond the end, some of the last stratum may not be there.
    LINES: of the sample, at a time.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import math

import triton
import triton.language as tl

from rose_ops import definitions
from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import kernel, keys_of_tile, share_of
from rose_ops.backends.triton.elements import INFINITY_KEY, NONFINITE_KEY, mix
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
SECOND_DIGIT = tl.constexpr(16)  # bits of a key in a bracket that its bin does not say, at most


@kernel(registers=128)
def sample_kernel(
    rows, ranked, dims, hyper, inv_scale, clip, rank_inactive, operand, found_inf, state, record,
    record_size, sample, draw, strata, stratum, lines,
    all_rows, count, lr, prepared, keys, gamma, seed, first_weight, second_weight,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, SECOND: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """The keys of those of the sample's lines that are in one of these ``ranked`` segments; -1 where
    there is no element. See ``sampled`` in reference.py, with any number of strata. Prepares the update
    of ``count`` segments."""
    prepare(
        all_rows, count, hyper, lr, found_inf, prepared, keys, gamma, seed, first_weight, second_weight,
        0,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for start in range(program * 1024, words.ZEROED, tl.num_programs(0) * 1024):
        at = start + tl.arange(0, 1024)
        tl.store(state + at, tl.zeros([1024], tl.int64), mask=at < words.ZEROED)
    if program == 0:
        word = tl.arange(0, 16)
        tl.store(
            record + word, tl.where(word < words.KEPT, -1, 0).to(tl.int64), mask=word < record_size
        )
    number = program * LINES + tl.arange(0, LINES).to(tl.int64)
    key = mix((tl.zeros_like(number) + draw).to(tl.uint32) ^ SAMPLE_WORD)
    random = mix(number.to(tl.uint32) ^ mix(key))  # numbers have 32 bits
    line = number * stratum + ((random.to(tl.int64) * stratum) >> 32)
    # The last segment that starts at or before it.
    row = rows + tl.zeros_like(number)
    size = ranked
    while size > 1:
        middle = row + (size // 2) * words.COLUMNS
        row = tl.where(tl.load(middle + words.FIRST_LINE) <= line, middle, row)
        size -= size // 2
    start = (line - tl.load(row + words.FIRST_LINE)) * LINE
    n = tl.load(row + words.N)
    there = (number < strata) & (start >= 0) & (start < n)
    index = start[:, None] + tl.arange(0, LINE)[None, :].to(tl.int64)
    valid = there[:, None] & (index < n[:, None])
    key = keys_of_tile(
        row[:, None], dims, index, valid, hyper, inv_scale, clip, rank_inactive, operand, D0, D1,
        LINEAR, False, SECOND, True,
    )  # fmt: skip
    to = number[:, None] * LINE + tl.arange(0, LINE)[None, :]
    mine = there | ((number < strata) & (line >= lines))
    tl.store(sample + to, tl.where(valid, key, -1), mask=mine[:, None])


@triton.jit
def _add(word, numbers):
    tl.atomic_add(word, tl.sum(numbers.to(tl.int64)), sem="relaxed")


@triton.jit
def _zero(address, count):
    for start in range(0, count, words.WINDOW_BINS):
        at = start + tl.arange(0, words.WINDOW_BINS)
        tl.store(address + at, tl.zeros([words.WINDOW_BINS], tl.int64), mask=at < count)


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
def _decide(state, t, fraction, stratum, width):
    """The bracket of a target; returns how much the log has to take."""
    target = state + words.TARGETS + t * words.TARGET
    low = tl.load(target + words.WINDOW_LOW, cache_modifier=".cg")
    high = tl.load(target + words.WINDOW_HIGH, cache_modifier=".cg")
    middle = tl.load(target + words.MIDDLE, cache_modifier=".cg")
    shift = _shift_for((high - low).to(tl.int32), words.WINDOW_BINS)
    at = tl.arange(0, words.WINDOW_BINS)
    bins = tl.load(state + words.WINDOWS + t * words.WINDOW_BINS + at, cache_modifier=".cg")
    weight = stratum.to(tl.float64)
    q = fraction.to(tl.float64) * 1e-9
    sampled = tl.load(state + words.SAMPLED, cache_modifier=".cg")

    cc = tl.load(target + words.CC, cache_modifier=".cg").to(tl.float64)
    cr = tl.load(target + words.CR, cache_modifier=".cg").to(tl.float64)
    rr = tl.load(target + words.RR, cache_modifier=".cg").to(tl.float64)
    u = tl.maximum(cc - 2.0 * q * cr + q * q * rr, 0.0)
    deviation = tl.sqrt(u + HALF_R * HALF_R) + HALF_R
    margin = weight * width * (deviation * ERRORS + OF_RANGE)
    # Estimated numbers of elements less the fraction of all that are ranked: below the window, up to
    # each bin, up to the middle.
    all_ranked = q * weight * sampled.to(tl.float64)
    start = (
        weight * tl.load(target + words.BELOW_WINDOW, cache_modifier=".cg").to(tl.float64) - all_ranked
    )
    upto = start + weight * tl.cumsum(bins, 0).to(tl.float64)
    upto_middle = tl.load(target + words.UPTO_MIDDLE, cache_modifier=".cg")
    below_middle = upto_middle - tl.load(target + words.AT_MIDDLE, cache_modifier=".cg")

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
    low = tl.where(fails, 0, low + (first.to(tl.int64) << shift))
    high = tl.where(fails, INFINITY_KEY, to)
    guess = tl.where(fails, middle, guess)

    collapsed = (weight * below_middle.to(tl.float64) - all_ranked < -1.0 - margin) & (
        weight * upto_middle.to(tl.float64) - all_ranked > margin
    )
    low = tl.where(collapsed, middle, low)
    high = tl.where(collapsed, middle, high)
    tl.store(target + words.BRACKET_LOW, low)
    tl.store(target + words.BRACKET_END, high + 1)
    tl.store(state + words.ESTIMATE + t, tl.where(collapsed, middle, guess))
    tl.store(target + words.COLLAPSED, collapsed.to(tl.int64))
    shift = tl.minimum(_shift_for((high - low).to(tl.int32), words.WINDOW_BINS), SECOND_DIGIT)
    tl.store(target + words.SHIFT, shift.to(tl.int64))
    _zero(state + words.FIRST_DIGITS + t * words.FIRST_BINS, ((high - low) >> shift) + 1)
    _zero(state + words.SECOND_DIGITS + t * words.SECOND_BINS, 1 << shift)
    # At most, but for a probability of exp(-l): the lower tail of a sum of independent terms between 0
    # and 16, whose squares are at most 16 times as large.
    root = tl.sqrt(inside.to(tl.float64) + 8.0 * LOG) + ROOT
    most = tl.where(stratum == 1, inside.to(tl.float64), weight * root * root)
    return tl.where(collapsed, 0.0, most)


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
def _count_sample(state, t, sample, lines, low, middle, high, shift, LINES: tl.constexpr):
    """A program's share of the sample, counted for target ``t``: the bins of its window from ``low`` to
    ``high``, elements below the window and up to the ``middle``, and the squares that the bracket's
    width follows from."""
    target = state + words.TARGETS + t * words.TARGET
    # Of each line, 8 bits for each of four numbers, which are 16 at most.
    sampled = tl.zeros([LINES], tl.int32)
    upto_middle = tl.zeros([LINES], tl.int32)
    at_middle = tl.zeros([LINES], tl.int32)
    below = tl.zeros([LINES], tl.int32)
    cc = tl.zeros([LINES // 2], tl.int32)
    cr = tl.zeros([LINES // 2], tl.int32)
    rr = tl.zeros([LINES // 2], tl.int32)
    begin, end, stride = share_of(lines, LINES)
    for start in range(begin, end, stride):
        number = start + tl.arange(0, LINES).to(tl.int64)
        at = number[:, None] * LINE + tl.arange(0, LINE)[None, :]
        key = tl.load(sample + at, mask=(number < lines)[:, None], other=NONFINITE_KEY)
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
        count_digits(state + words.WINDOWS + t * words.WINDOW_BINS, digit, inside, LINES * LINE)
    _add(target + words.BELOW_WINDOW, below)
    _add(target + words.UPTO_MIDDLE, upto_middle)
    _add(target + words.AT_MIDDLE, at_middle)
    _add(target + words.CC, cc)
    _add(target + words.CR, cr)
    _add(target + words.RR, rr)
    if t == 0:
        _add(state + words.SAMPLED, sampled)


@kernel(registers=128, num_warps=16)
def bracket_kernel(
    found_inf, state, sample, lines, stratum, upper, lower, width, elements, capacity,
    LINES: tl.constexpr,
):  # fmt: skip
    """Each program finds the windows, which are the same; the last one the brackets."""
    if (lines > 0) & (tl.load(found_inf) == 0):
        few = tl.minimum(lines, FEW)
        element = tl.arange(0, FEW * LINE)
        there = element // LINE < few
        line = (element // LINE).to(tl.int64) * (lines // few)
        some = tl.load(sample + line * LINE + element % LINE, mask=there, other=NONFINITE_KEY)
        targets = 1 + (lower > 0).to(tl.int32)
        for t in range(0, targets):
            target = state + words.TARGETS + t * words.TARGET
            low, high, middle = _window(some, tl.where(t == 0, upper, lower), lines)
            shift = _shift_for(high - low, words.WINDOW_BINS)
            tl.store(target + words.WINDOW_LOW, low.to(tl.int64))
            tl.store(target + words.WINDOW_HIGH, high.to(tl.int64))
            tl.store(target + words.MIDDLE, middle.to(tl.int64))
            _count_sample(state, t, sample, lines, low, middle, high, shift, LINES)
        tl.debug_barrier()
        # Releases what all programs have added to the last one.
        if tl.atomic_add(state + words.BRACKET_TICKET, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            most = tl.full([], 0.0, tl.float64)
            for t in range(0, targets):
                most += _decide(state, t, tl.where(t == 0, upper, lower), stratum, width)
            most = tl.minimum(most, elements.to(tl.float64))
            tl.store(
                state + words.MODE,
                tl.where(most <= capacity, words.SPECULATE, words.EXACT).to(tl.int64),
            )
