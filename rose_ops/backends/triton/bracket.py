"""Selection and its use in one pass; see :func:`rose_ops.reference.step_`.

The launches are the same whatever the data: the device decides what each has to do.

1. ``sample``: the keys of one line of 16 elements in each of many equal strata.
2. ``bracket``: a window around the threshold from some of the sample, bins of all of the sample in that
   window, and from those the bracket. Where a class of ties surely is the threshold, the bracket is
   that one key ("collapsed"). Where more could be inside than the log takes, the course is EXACT.
3. ``pass``: treats every element by the estimated threshold, counts, and logs what is inside the
   bracket. In the course EXACT, nothing.
4. ``select``, 4 times: the threshold, by the log's keys and the counts. EXACT: by all elements.
5. ``finish``: treats again what was treated wrongly. EXACT: everything, for the first time.

In the course APPROX, the quantiles of the sample (by ``select``, before the pass) are the estimates,
and there is no bracket: the pass logs nothing, and the record is what it counted.

Arguments beyond those in access.py:

    state: see words.py.
    log_keys: of the elements inside the brackets, in no order; with the sign set where they were
        treated as selected.
    log_places: of these: tile * BLOCK + position in the tile, from ``first_place`` of the class on.
    log_old: of an update: their p, m and v before it.
    capacity: entries of the log, and what is between those of p, m and v.
    TWO: whether there is a lower threshold.
"""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import (
    Tile,
    alpha_of,
    is_selective,
    kernel,
    keys_of,
    load,
    share_of,
    store_mask_bits,
    tile_of,
)
from rose_ops.backends.triton.elements import INACTIVE_KEY, NO_KEY, NONFINITE_KEY, is_selected, risk_key
from rose_ops.backends.triton.select import add, capture_tile
from rose_ops.backends.triton.update import (
    adamw,
    gradient,
    kind_of,
    prepared_for,
    store_update,
    update_tile,
)

# ----------------------------------------------------------------------------------------------- pass


@triton.jit
def _is_kept(state, key, TWO: tl.constexpr):
    """By the estimate."""
    kept = (key >= 0) & (key <= tl.load(state + words.ESTIMATE).to(tl.int32))
    if TWO:
        kept = kept & (key > tl.load(state + words.ESTIMATE + 1).to(tl.int32))
    return kept


@triton.jit
def _count(state, tile, key, updated, kept, TWO: tl.constexpr, BLOCK: tl.constexpr):
    """Counters of a tile, 16 bits for each; which elements are to be logged. Elements that are not
    ranked have NO_KEY."""
    four = updated.to(tl.int64)
    four += (key == NONFINITE_KEY).to(tl.int64) << (16 * words.COUNT_NONFINITE)
    four += kept.to(tl.int64) << (16 * words.COUNT_KEPT)
    four += (key == INACTIVE_KEY).to(tl.int64) << (16 * words.COUNT_INACTIVE)
    of_brackets = tl.zeros([BLOCK], tl.int64)
    logged = key != key
    for t in tl.static_range(2 if TWO else 1):
        target = state + words.TARGETS + t * words.TARGET
        low = tl.load(target + words.BRACKET_LOW).to(tl.int32)
        end = tl.load(target + words.BRACKET_END).to(tl.int32)
        inside = (key >= low) & (key < end)
        of_brackets += ((key >= 0) & (key < low)).to(tl.int64) << (32 * t)
        of_brackets += inside.to(tl.int64) << (32 * t + 16)
        is_logged = tl.load(target + words.COLLAPSED) == 0
        logged = logged | (inside & (key < tl.where(is_logged, end, 0)))
    four_sum = tl.sum(four)
    brackets_sum = tl.sum(of_brackets)
    field = tl.arange(0, words.COUNTERS)
    value = tl.where(field < words.COUNT_BELOW, four_sum, brackets_sum) >> (field % 4 * 16).to(tl.int64)
    slot = state + words.COUNTS + tile % words.SLOTS * words.COUNTERS
    tl.atomic_add(slot + field, value & 0xFFFF, mask=(value & 0xFFFF) > 0, sem="relaxed")
    return logged


@triton.jit
def _append(
    state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK: tl.constexpr
):  # fmt: skip
    """Logs keys and places, for which there are ``count``; returns the entries of elements, and which
    of them there are."""
    first = tl.atomic_add(state + words.LOGGED, count.to(tl.int64), sem="relaxed")
    after = tl.cumsum(logged.to(tl.int32), 0) - 1
    room = tl.maximum(tl.minimum(capacity - first, BLOCK), 0).to(tl.int32)
    fits = logged & (after < room)
    tl.store(log_keys + first + after, tl.where(kept, key | INACTIVE_KEY, key), mask=fits)
    tl.store(log_places + first + after, place + tl.arange(0, BLOCK), mask=fits)
    return first + after, fits


@kernel()
def capture_pass_kernel(
    rows, tile_rows, tiles, inv_scale, clip, rank_inactive, state, log_keys, log_places, capacity,
    first_place,
    TWO: tl.constexpr, SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bits by the estimate, where there is memory for them."""
    if (tiles > 0) & (tl.load(state + words.COURSE) != words.EXACT):
        tile = tl.program_id(0).to(tl.int64)
        t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
        key = keys_of(t, inv_scale, clip, rank_inactive, SECOND_ORDER, ACCESS)
        kept = _is_kept(state, key, TWO)
        logged = _count(state, tile, key, kept, kept, TWO, BLOCK)
        if tl.load(t.row + words.BITS) != 0:
            store_mask_bits(t, tile, kept | (key == INACTIVE_KEY), BLOCK)
        count = tl.sum(logged.to(tl.int32))
        if count > 0:
            place = first_place + tile * BLOCK
            _append(state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK)


@kernel(registers=88)
def update_pass_kernel(
    rows, tile_rows, tiles, rank_inactive, found_inf, prepared, state, log_keys, log_places, log_old,
    capacity, first_place,
    TWO: tl.constexpr, FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW by the estimate. Elements of selective segments are ranked."""
    treats = tl.load(state + words.COURSE) != words.EXACT
    if (tiles > 0) & (tl.load(found_inf) == 0) & treats:
        tile = tl.program_id(0).to(tl.int64)
        t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
        u = prepared_for(t, prepared)
        g = gradient(t, u, ACCESS)
        m = load(t, words.MOMENT, ACCESS)
        key = tl.where(is_selective(t), risk_key(g, m, alpha_of(t), rank_inactive, True), NO_KEY)
        kept = _is_kept(state, key, TWO)
        kind = kind_of(t, u, kept | (key == INACTIVE_KEY), FRACTIONAL, True)
        kind = tl.where(key == NONFINITE_KEY, 0, kind)
        logged = _count(state, tile, key, t.valid & (kind != 0), kept, TWO, BLOCK)
        # Not earlier: registers would not do for these and for counting.
        p = load(t, words.PARAM, ACCESS)
        v = load(t, words.SQUARE, ACCESS)
        count = tl.sum(logged.to(tl.int32))
        if count > 0:
            place = first_place + tile * BLOCK
            entry, fits = _append(
                state, log_keys, log_places, capacity, key, kept, place, logged, count, BLOCK
            )
            tl.store(log_old + entry, p, mask=fits)
            tl.store(log_old + capacity + entry, m, mask=fits)
            tl.store(log_old + 2 * capacity + entry, v, mask=fits)
        p, m, v = adamw(p, g, m, v, kind, u, FRACTIONAL)
        store_update(t, u, p, m, v, STOCHASTIC, ACCESS)


# --------------------------------------------------------------------------------------------- finish


@triton.jit
def _wrong(
    rows, tile_rows, tiles, record, log_keys, log_places, entry, logged, first_place,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK entries of the log, elements of this launch's tiles that were not treated by the
    threshold: whether they are selected, and the elements."""
    at = entry + tl.arange(0, BLOCK).to(tl.int64)
    word = tl.load(log_keys + at, mask=at < logged, other=0)
    selected = is_selected(word & 0x7FFFFFFF, record)
    wrong = (at < logged) & (selected != (word < 0))
    place = tl.load(log_places + at, mask=wrong, other=0) - first_place
    wrong = wrong & (place >= 0) & (place < tiles.to(tl.int64) * BLOCK)
    tile = place // BLOCK
    row = rows + tl.load(tile_rows + tile, mask=wrong, other=0).to(tl.int64) * words.COLUMNS
    index = (tile - tl.load(row + words.FIRST_TILE)) * BLOCK + place % BLOCK
    return selected, Tile(row, index, wrong)


@triton.jit
def _flip_mask_bits(t, BLOCK: tl.constexpr):
    """In whole words, as several may have to be flipped in one byte."""
    byte = tl.load(t.row + words.BITS) + t.index // 8
    bit = (t.index % 8 + byte % 4 * 8).to(tl.int32)
    word = (byte // 4 * 4).to(tl.pointer_type(tl.int32))
    tl.atomic_xor(word, tl.full([BLOCK], 1, tl.int32) << bit, mask=t.valid, sem="relaxed")


@kernel()
def capture_finish_kernel(
    rows, tile_rows, tiles, inv_scale, clip, rank_inactive, state, record, log_keys, log_places,
    capacity, first_place,
    SECOND_ORDER: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bits that the pass got wrong; or all."""
    logged = tl.load(state + words.LOGGED)
    if tl.load(state + words.COURSE) == words.EXACT:
        begin, end, stride = share_of(tiles, 1)
        for tile in range(begin, end, stride):
            t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
            capture_tile(t, tile, inv_scale, clip, rank_inactive, record, SECOND_ORDER, ACCESS, BLOCK)
    elif logged <= capacity:
        begin, end, stride = share_of(logged, BLOCK)
        for entry in range(begin, end, stride):
            _, t = _wrong(
                rows, tile_rows, tiles, record, log_keys, log_places, entry, logged, first_place, BLOCK
            )
            if tl.sum(t.valid.to(tl.int32)) > 0:
                _flip_mask_bits(t, BLOCK)


@triton.jit
def _redo(
    t, entry, selected, record, log_old, capacity, prepared,
    FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates elements from what they were before."""
    at = entry + tl.arange(0, BLOCK).to(tl.int64)
    p = tl.load(log_old + at, mask=t.valid, other=0.0)
    m = tl.load(log_old + capacity + at, mask=t.valid, other=0.0)
    v = tl.load(log_old + 2 * capacity + at, mask=t.valid, other=0.0)
    u = prepared_for(t, prepared)
    g = gradient(t, u, ACCESS)
    kind = kind_of(t, u, selected, FRACTIONAL, True)
    was = kind_of(t, u, ~selected, FRACTIONAL, True)
    p, m, v = adamw(p, g, m, v, kind, u, FRACTIONAL)
    store_update(t, u, p, m, v, STOCHASTIC, ACCESS)
    change = (kind != 0).to(tl.int32) - (was != 0).to(tl.int32)
    add(record + words.UPDATED, tl.where(t.valid, change, 0))


@kernel(registers=128)
def update_finish_kernel(
    rows, tile_rows, tiles, rank_inactive, found_inf, prepared, state, record, log_keys, log_places,
    log_old, capacity, first_place,
    FRACTIONAL: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the pass got wrong; or all."""
    SCATTERED: tl.constexpr = ACCESS.scattered
    if (tiles > 0) & (tl.load(found_inf) == 0):
        logged = tl.load(state + words.LOGGED)
        if tl.load(state + words.COURSE) == words.EXACT:
            begin, end, stride = share_of(tiles, 1)
            for tile in range(begin, end, stride):
                t = tile_of(rows, tile_rows, tile, ACCESS, BLOCK)
                u = prepared_for(t, prepared)
                update_tile(t, u, record, rank_inactive, FRACTIONAL, True, STOCHASTIC, ACCESS)
        elif logged <= capacity:
            begin, end, stride = share_of(logged, BLOCK)
            for entry in range(begin, end, stride):
                selected, t = _wrong(
                    rows, tile_rows, tiles, record, log_keys, log_places, entry, logged, first_place,
                    BLOCK,
                )  # fmt: skip
                if tl.sum(t.valid.to(tl.int32)) > 0:
                    _redo(
                        t, entry, selected, record, log_old, capacity, prepared, FRACTIONAL, STOCHASTIC,
                        SCATTERED, BLOCK,
                    )  # fmt: skip
