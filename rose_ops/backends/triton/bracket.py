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

The first two are in sample.py, the fourth one in resolve.py, the others here.

With ``approx``, the quantiles of the sample (by ``select_kernel``) are the estimates and there is no
bracket: the pass logs nothing, ``resolve`` writes down what it counted, and nothing is to be fixed.

``update_fix_kernel`` is longer than other functions here: its two modes are one launch, as the host
does not know which it will be.

A key inside a bracket has two digits: its bin, of at least 2048, and what is left, at most 16 bits.
Arguments of these kernels, and of that in resolve.py:

    state: see words.py.
    log_keys, log_places: of the elements in brackets: keys, with the sign set of those that the
        estimate keeps, and places, which count the elements of all tiles of all classes.
    log_old: parameters before the update, then first moments, then second ones: ``capacity`` of each.
    capacity: of the log.
    first_place: of this class.
    TWO: whether there is a lower threshold.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import (
    kernel,
    keys_of_tile,
    load,
    locate,
    mask_bits,
    share_of,
    store_mask_bits,
    tile_of,
)
from rose_ops.backends.triton.elements import INACTIVE_KEY, NONFINITE_KEY, is_selected, risk_key
from rose_ops.backends.triton.sample import count_digits
from rose_ops.backends.triton.update import adamw, gradient, store_moments, store_parameter


@triton.jit
def _inside(state, t, key):
    """Of a target: whether keys are below its bracket, inside it, and inside it and to be counted."""
    target = state + words.TARGETS + t * words.TARGET
    low = tl.load(target + words.BRACKET_LOW).to(tl.int32)
    end = tl.load(target + words.BRACKET_END).to(tl.int32)
    above = key >= low
    counted = above & (key < tl.where(tl.load(target + words.COLLAPSED) != 0, 0, end))
    return (key >= 0) & (key < low), above & (key < end), counted


@triton.jit
def _count_first(state, t, key, counted, BLOCK: tl.constexpr):
    """The first digits of keys in the bracket."""
    target = state + words.TARGETS + t * words.TARGET
    low = tl.load(target + words.BRACKET_LOW).to(tl.int32)
    digit = tl.where(counted, (key - low) >> tl.load(target + words.SHIFT).to(tl.int32), 0)
    count_digits(state + words.FIRST_DIGITS + t * words.FIRST_BINS, digit, counted, BLOCK)


@triton.jit
def _by_estimate(state, key, TWO: tl.constexpr):
    kept = (key >= 0) & (key <= tl.load(state + words.ESTIMATE).to(tl.int32))
    if TWO:
        kept = kept & (key > tl.load(state + words.ESTIMATE + 1).to(tl.int32))
    return kept


@triton.jit
def _count(state, tile, key, updated, kept, TWO: tl.constexpr, BLOCK: tl.constexpr):
    """Counters of a tile, 16 bits for each, and first digits; returns which elements are to be
    logged, and how many. Elements that are not to be counted have keys of -1."""
    below, inside, counted = _inside(state, 0, key)
    four = (
        updated.to(tl.int64)
        + ((key == NONFINITE_KEY).to(tl.int64) << (16 * words.COUNT_NONFINITE))
        + (below.to(tl.int64) << (16 * words.COUNT_BELOW))
        + (inside.to(tl.int64) << (16 * (words.COUNT_BELOW + 1)))
    )
    more = kept.to(tl.int64) + ((key == INACTIVE_KEY).to(tl.int64) << 16)
    logged = counted
    if TWO:
        below, inside, counted_lower = _inside(state, 1, key)
        more += (below.to(tl.int64) << 32) + (inside.to(tl.int64) << 48)
        logged = logged | counted_lower
    four_sum = tl.sum(four)
    more_sum = tl.sum(more)
    field = tl.arange(0, words.COUNTS)
    both = tl.where(field < 4, four_sum, more_sum)
    value = (both >> (field % 4 * 16).to(tl.int64)) & 0xFFFF
    slot = state + words.COUNTERS + tile % words.SLOTS * words.COUNTS
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
    first = tl.atomic_add(state + words.LOGGED, count.to(tl.int64), sem="relaxed")
    after = tl.cumsum(logged.to(tl.int32), 0) - 1
    room = tl.maximum(tl.minimum(capacity - first, BLOCK), 0).to(tl.int32)
    fits = logged & (after < room)
    tl.store(log_keys + first + after, tl.where(kept, key | INACTIVE_KEY, key), mask=fits)
    tl.store(log_places + first + after, place + tl.arange(0, BLOCK), mask=fits)
    return first, after, fits


@kernel()
def capture_pass_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, state, log_keys, log_places,
    capacity, first_place,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pass of a capture: bits by the estimate, where there is memory for them."""
    if tiles > 0:
        tile = tl.program_id(0).to(tl.int64)
        row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
        key = keys_of_tile(
            row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR, ALIGNED,
            SECOND,
        )  # fmt: skip
        key = tl.where(valid, key, -1)
        kept = _by_estimate(state, key, TWO)
        logged, count = _count(state, tile, key, kept, kept, TWO, BLOCK)
        if tl.load(state + words.MODE) == words.SPECULATE:
            if tl.load(row + words.BITS) != 0:
                store_mask_bits(row, tile, kept | (key == INACTIVE_KEY), BLOCK)
            if count > 0:
                place = first_place + tile * BLOCK
                _append(state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK)


@triton.jit
def _gradient_and_moment(
    row, dims, index, valid, hyper, inv_scale, clip, D1: tl.constexpr, D2: tl.constexpr,
    LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    at = locate(row, dims, index, 1, LINEAR)
    g = load(tl.load(row + words.DATA + 1), at, valid, D1, ALIGNED)
    at = locate(row, dims, index, 2, LINEAR)
    m = load(tl.load(row + words.DATA + 2), at, valid, D2, ALIGNED)
    return gradient(g, row, hyper, inv_scale, clip), m


@triton.jit
def _parameter_and_square(
    row, dims, index, valid, D0: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    at = locate(row, dims, index, 0, LINEAR)
    p = load(tl.load(row + words.DATA), at, valid, D0, ALIGNED)
    at = locate(row, dims, index, 3, LINEAR)
    return p, load(tl.load(row + words.DATA + 3), at, valid, D3, ALIGNED)


@triton.jit
def _kind(row, index, valid, base, selected, first_weight, second_weight, FRACTIONAL: tl.constexpr):
    """Of a selective segment's masks, for elements that are finite."""
    kind = base + selected.to(tl.int32) * second_weight
    if FRACTIONAL:  # there are first-order masks
        kind += mask_bits(row, index, valid, 0) * first_weight
    return kind


@kernel(registers=80)
def update_pass_kernel(
    rows, tile_rows, tiles, ranked_tiles, dims, hyper, inv_scale, clip, rank_inactive, found_inf, state,
    log_keys, log_places, log_old, capacity, first_place, prepared, keys, first_weight, second_weight,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The pass of an update. Segments from ``ranked_tiles`` on are not selective."""
    if (tiles > 0) & (tl.load(found_inf) == 0):
        tile = tl.program_id(0).to(tl.int64)
        row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
        speculate = tl.load(state + words.MODE) == words.SPECULATE
        is_ranked = valid & (tl.zeros([BLOCK], tl.int64) + tile < ranked_tiles)
        if speculate:
            g, m = _gradient_and_moment(
                row, dims, index, valid, hyper, inv_scale, clip, D1, D2, LINEAR, ALIGNED
            )
            segment = tl.load(row + words.INDEX)
            alpha = (1.0 - tl.load(hyper + tl.load(row + words.GROUP) * words.HYPER)).to(tl.float32)
            key = tl.where(is_ranked, risk_key(g, m, alpha, rank_inactive, True), -1)
            kept = _by_estimate(state, key, TWO)
            base = tl.zeros([BLOCK], tl.int32) + tl.load(keys + segment * 2 + 1)
            kind = _kind(
                row, index, valid, base, kept | (key == INACTIVE_KEY), first_weight, second_weight,
                FRACTIONAL,
            )  # fmt: skip
            kind = tl.where(key == NONFINITE_KEY, 0, kind)
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
            u = prepared + segment * words.PREPARED
            pair = keys + segment * 2
            p, m, v = adamw(p, g, m, v, kind, u, FRACTIONAL)
            store_parameter(row, dims, index, p, pair, valid, D0, LINEAR, ALIGNED, STOCHASTIC)
            store_moments(row, dims, index, m, v, pair, valid, D2, D3, LINEAR, ALIGNED, True)
        else:
            key = keys_of_tile(
                row, dims, index, is_ranked, hyper, inv_scale, clip, rank_inactive, 1, D1, D2, LINEAR,
                ALIGNED, True,
            )  # fmt: skip
            key = tl.where(is_ranked, key, -1)
            none = key != key
            _count(state, tile, key, none, none, TWO, BLOCK)


@triton.jit
def _wrong(
    record, log_keys, log_places, entry, logged, first_place, tiles, BLOCK: tl.constexpr
):  # fmt: skip
    """Entries of the log, of this launch's tiles, that were not treated by the threshold: which, their
    tiles and elements there, and whether they are selected."""
    at = entry + tl.arange(0, BLOCK).to(tl.int64)
    word = tl.load(log_keys + at, mask=at < logged, other=0)
    selected = is_selected(word & 0x7FFFFFFF, record)
    wrong = (at < logged) & (selected != (word < 0))
    place = tl.load(log_places + at, mask=wrong, other=0) - first_place
    wrong = wrong & (place >= 0) & (place < tiles.to(tl.int64) * BLOCK)
    return at, wrong, place // BLOCK, place % BLOCK, selected


@triton.jit
def _element_of(rows, tile_rows, tile, element, wrong, BLOCK: tl.constexpr):
    """The rows of segments that wrong elements belong to, and their indices there."""
    row = rows + tl.load(tile_rows + tile, mask=wrong, other=0).to(tl.int64) * words.COLUMNS
    return row, (tile - tl.load(row + words.FIRST_TILE)) * BLOCK + element


@kernel()
def capture_fix_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, state, record, log_keys,
    log_places, capacity, first_place,
    D0: tl.constexpr, D1: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    logged = tl.load(state + words.LOGGED)
    if tl.load(state + words.MODE) == words.EXACT:
        begin, end, stride = share_of(tiles, 1)
        for tile in range(begin, end, stride):
            row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
            key = keys_of_tile(
                row, dims, index, valid, hyper, inv_scale, clip, rank_inactive, 0, D0, D1, LINEAR,
                ALIGNED, SECOND,
            )  # fmt: skip
            store_mask_bits(row, tile, is_selected(key, record) & valid, BLOCK)
    elif logged <= capacity:
        begin, end, stride = share_of(logged, BLOCK)
        for entry in range(begin, end, stride):
            _, wrong, tile, element, _ = _wrong(
                record, log_keys, log_places, entry, logged, first_place, tiles, BLOCK
            )
            if tl.sum(wrong.to(tl.int32)) > 0:
                row, index = _element_of(rows, tile_rows, tile, element, wrong, BLOCK)
                # Bits are flipped in whole words, as several may have to be in one byte.
                byte = tl.load(row + words.BITS) + index // 8
                bit = (index % 8 + byte % 4 * 8).to(tl.int32)
                word = (byte // 4 * 4).to(tl.pointer_type(tl.int32))
                one = tl.full([BLOCK], 1, tl.int32)
                tl.atomic_xor(word, one << bit, mask=wrong, sem="relaxed")


@kernel(registers=128)
def update_fix_kernel(
    rows, tile_rows, tiles, ranked_tiles, dims, hyper, inv_scale, clip, rank_inactive, found_inf, state,
    record, log_keys, log_places, log_old, capacity, first_place, prepared, keys, first_weight,
    second_weight,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if (tiles > 0) & (tl.load(found_inf) == 0):
        logged = tl.load(state + words.LOGGED)
        updated = tl.full([], 0, tl.int64)
        if tl.load(state + words.MODE) == words.EXACT:
            begin, end, stride = share_of(tiles, 1)
            for tile in range(begin, end, stride):
                row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
                g, m = _gradient_and_moment(
                    row, dims, index, valid, hyper, inv_scale, clip, D1, D2, LINEAR, ALIGNED
                )
                p, v = _parameter_and_square(row, dims, index, valid, D0, D3, LINEAR, ALIGNED)
                segment = tl.load(row + words.INDEX)
                alpha = (1.0 - tl.load(hyper + tl.load(row + words.GROUP) * words.HYPER)).to(tl.float32)
                is_ranked = valid & (tl.zeros([BLOCK], tl.int64) + tile < ranked_tiles)
                key = tl.where(is_ranked, risk_key(g, m, alpha, rank_inactive, True), -1)
                base = tl.zeros([BLOCK], tl.int32) + tl.load(keys + segment * 2 + 1)
                selected = is_ranked & is_selected(key, record)
                kind = _kind(row, index, valid, base, selected, first_weight, second_weight, FRACTIONAL)
                kind = tl.where(key == NONFINITE_KEY, 0, kind)
                updated += tl.sum((valid & (kind != 0)).to(tl.int32)).to(tl.int64)
                pair = keys + segment * 2
                p, m, v = adamw(p, g, m, v, kind, prepared + segment * words.PREPARED, FRACTIONAL)
                store_parameter(row, dims, index, p, pair, valid, D0, LINEAR, ALIGNED, STOCHASTIC)
                store_moments(row, dims, index, m, v, pair, valid, D2, D3, LINEAR, ALIGNED, True)
        elif logged <= capacity:
            begin, end, stride = share_of(logged, BLOCK)
            for entry in range(begin, end, stride):
                at, wrong, tile, element, selected = _wrong(
                    record, log_keys, log_places, entry, logged, first_place, tiles, BLOCK
                )
                if tl.sum(wrong.to(tl.int32)) > 0:
                    row, index = _element_of(rows, tile_rows, tile, element, wrong, BLOCK)
                    p = tl.load(log_old + at, mask=wrong, other=0.0)
                    m = tl.load(log_old + capacity + at, mask=wrong, other=0.0)
                    v = tl.load(log_old + 2 * capacity + at, mask=wrong, other=0.0)
                    to_g = locate(row, dims, index, 1, LINEAR, True)
                    g = load(tl.load(row + words.DATA + 1), to_g, wrong, D1, False)
                    g = gradient(g, row, hyper, inv_scale, clip)
                    segment = tl.load(row + words.INDEX)
                    base = tl.load(keys + segment * 2 + 1)
                    kind = _kind(
                        row, index, wrong, base, selected, first_weight, second_weight, FRACTIONAL
                    )
                    was = kind + tl.where(selected, -second_weight, second_weight)
                    change = (kind != 0).to(tl.int32) - (was != 0).to(tl.int32)
                    updated += tl.sum(tl.where(wrong, change, 0)).to(tl.int64)
                    pair = keys + segment * 2
                    p, m, v = adamw(p, g, m, v, kind, prepared + segment * words.PREPARED, FRACTIONAL)
                    store_parameter(
                        row, dims, index, p, pair, wrong, D0, LINEAR, False, STOCHASTIC, True
                    )
                    store_moments(
                        row, dims, index, m, v, pair, wrong, D2, D3, LINEAR, False, True, True
                    )
        if updated != 0:
            tl.atomic_add(record + words.UPDATED, updated, sem="relaxed")
