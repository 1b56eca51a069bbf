"""AdamW under a mask, which is given, or that of thresholds that are known."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import (
    alpha_of,
    is_selective,
    kernel,
    load,
    mask_bits,
    store,
    tile_of,
)
from rose_ops.backends.triton.elements import (
    INFINITY_KEY,
    abs_bits,
    bits_float,
    is_selected,
    mix,
    next_step,
    risk_key,
)
from rose_ops.backends.triton.select import add


@triton.jit
def _put(word, x):
    tl.store(word, x.to(tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def constant(word):
    return bits_float(tl.load(word))


@triton.jit
def _base_kind(row, FRACTIONAL: tl.constexpr, BY_RISK: tl.constexpr):
    selective = tl.load(row + words.SELECTIVE) != 0
    kind = tl.where(selective, 0, 3)
    may_add = tl.zeros_like(kind) + BY_RISK  # to it, for single elements
    for order in tl.static_range(2):
        mask_kind = tl.load(row + words.MASK_KINDS + order)
        may_add += (mask_kind == words.MASK_OF_BITS).to(tl.int32)
        is_whole = mask_kind == words.MASK_OF_ALL
        if mask_kind == words.MASK_OF_ONE:
            is_whole = tl.load(tl.load(row + words.MASKS + order).to(tl.pointer_type(tl.uint8))) != 0
        kind += tl.where(is_whole, order + 1 if FRACTIONAL else 3, 0)
    return tl.where((kind == 0) & (may_add == 0), -1, kind)


@triton.jit
def prepare(
    all_rows, count, hyper, lr, gamma, inv_scale, clip, found_inf, prepared, seed,
    FRACTIONAL: tl.constexpr, BY_RISK: tl.constexpr,
):  # fmt: skip
    """What all elements of a segment have in common, and its step. A program for each segment."""
    i = tl.program_id(0).to(tl.int64)
    if (i < count) & (tl.load(found_inf) == 0):
        row = all_rows + i * words.COLUMNS
        u = prepared + tl.load(row + words.INDEX) * words.PREPARED
        step_pointer = tl.load(row + words.STEP).to(tl.pointer_type(tl.float32))
        step, word = next_step(tl.load(step_pointer))
        tl.store(step_pointer, step)
        t = step.to(tl.float64)
        group = hyper + tl.load(row + words.GROUP) * words.HYPER
        beta1 = tl.load(group + words.BETA1)
        beta2 = tl.load(group + words.BETA2)
        bias1 = 1.0 - tl.exp(t * tl.log(beta1))
        bias2 = 1.0 - tl.exp(t * tl.log(beta2))
        _put(u + words.BETA1, beta1)
        _put(u + words.C1, 1.0 - beta1)
        _put(u + words.BETA2, beta2)
        _put(u + words.C2, 1.0 - beta2)
        _put(u + words.EPS, tl.load(group + words.EPS))
        _put(u + words.INV_ROOT_BIAS2, 1.0 / tl.sqrt(bias2))
        _put(u + words.SCALE, tl.load(group + words.SIGN).to(tl.float32) * tl.load(inv_scale))
        _put(u + words.CLIP, tl.load(clip + tl.where(tl.load(row + words.SELECTIVE) != 0, 0, 1)))
        m = tl.load(gamma)
        _put(u + words.M + 1, m)
        _put(u + words.M + 2, 1.0 - m)
        for kind in tl.static_range(1, 4):
            rate = tl.load(lr + tl.load(row + words.GROUP))
            if kind == 1:
                rate *= m
            elif kind == 2:
                rate *= 1.0 - m
            _put(u + words.STEP_SIZE + kind, rate / bias1)
            _put(u + words.DECAY + kind, 1.0 - rate * tl.load(group + words.WEIGHT_DECAY))
        key = mix(seed.to(tl.uint32) ^ (word.to(tl.uint32, bitcast=True) * 0x9E3779B9))
        tl.store(u + words.RANDOM_KEY, key.to(tl.int32, bitcast=True))
        tl.store(u + words.BASE_KIND, _base_kind(row, FRACTIONAL, BY_RISK))


@triton.jit
def prepared_for(t, prepared):
    return prepared + tl.load(t.row + words.INDEX) * words.PREPARED


@triton.jit
def gradient(t, u, ACCESS: tl.constexpr):
    """Unscaled, negated to maximize, and clipped."""
    return load(t, words.GRAD, ACCESS) * constant(u + words.SCALE) * constant(u + words.CLIP)


@triton.jit
def _second_moment(v, g, u):
    return constant(u + words.BETA2) * v + constant(u + words.C2) * (g * g)


@triton.jit
def adamw(p, g, m, v, kind, u, FRACTIONAL: tl.constexpr):
    """p, m, v after the step. Kinds: 0 is not selected, 3 is; 1 and 2 are elements of an ensemble of
    two masks, by the first or the second of which alone they are selected."""
    off = kind == 0
    gp = tl.where(off, m, g)
    step_size = constant(u + words.STEP_SIZE + 3)
    decay = constant(u + words.DECAY + 3)
    if FRACTIONAL:
        is_first = kind == 1
        is_second = kind == 2
        w = tl.where(is_first, constant(u + words.M + 1), constant(u + words.M + 2))
        c = tl.where(is_first, constant(u + words.M + 2), constant(u + words.M + 1))
        gp = tl.where(is_first | is_second, w * g + c * m, gp)
        step_size = tl.where(is_second, constant(u + words.STEP_SIZE + 2), step_size)
        step_size = tl.where(is_first, constant(u + words.STEP_SIZE + 1), step_size)
        decay = tl.where(is_second, constant(u + words.DECAY + 2), decay)
        decay = tl.where(is_first, constant(u + words.DECAY + 1), decay)
    m_new = tl.where(off, m, constant(u + words.BETA1) * m + constant(u + words.C1) * gp)
    v_new = _second_moment(v, gp, u)
    denominator = tl.sqrt_rn(v_new) * constant(u + words.INV_ROOT_BIAS2) + constant(u + words.EPS)
    p_new = tl.where(off, p, p * decay - step_size * tl.div_rn(m_new, denominator))
    return p_new, m_new, v_new


@triton.jit
def kind_of(t, u, selected, FRACTIONAL: tl.constexpr, BY_RISK: tl.constexpr):
    """Kinds of finite elements. BY_RISK: those of the second-order mask are ``selected``."""
    FIRST: tl.constexpr = 1 if FRACTIONAL else 3
    SECOND: tl.constexpr = 2 if FRACTIONAL else 3
    kind = t.index.to(tl.int32) * 0 + tl.load(u + words.BASE_KIND)
    if FRACTIONAL or not BY_RISK:
        kind += mask_bits(t, 0) * FIRST
    if BY_RISK:
        kind += selected.to(tl.int32) * SECOND
    else:
        kind += mask_bits(t, 1) * SECOND
    return kind


@triton.jit
def store_update(t, u, p, m, v, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr):
    """STOCHASTIC: rounding of bfloat16 parameters; that of second moments always is."""
    random_key = tl.load(u + words.RANDOM_KEY).to(tl.uint32, bitcast=True)
    store(t, words.PARAM, p, random_key, STOCHASTIC, ACCESS)
    store(t, words.MOMENT, m, random_key, False, ACCESS)
    store(t, words.SQUARE, v, random_key, True, ACCESS)


@triton.jit
def update_tile(
    t, u, record, rank_inactive,
    FRACTIONAL: tl.constexpr, BY_RISK: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """By masks, or BY_RISK: by the thresholds of the record, to which counts are added."""
    g = gradient(t, u, ACCESS)
    m = load(t, words.MOMENT, ACCESS)
    p = load(t, words.PARAM, ACCESS)
    v = load(t, words.SQUARE, ACCESS)
    selective = is_selective(t)
    selected = selective
    if BY_RISK:
        selected &= is_selected(risk_key(g, m, alpha_of(t), rank_inactive, True), record)
    nonfinite = selective & ((abs_bits(g) >= INFINITY_KEY) | (abs_bits(m) >= INFINITY_KEY))
    kind = tl.where(nonfinite, 0, kind_of(t, u, selected, FRACTIONAL, BY_RISK))
    add(record + words.UPDATED, t.valid & (kind != 0))
    add(record + words.UPDATE_NONFINITE, nonfinite)
    p, m, v = adamw(p, g, m, v, kind, u, FRACTIONAL)
    store_update(t, u, p, m, v, STOCHASTIC, ACCESS)


@kernel()
def prepare_kernel(
    all_rows, count, hyper, lr, gamma, inv_scale, clip, found_inf, prepared, seed, record, selection,
    FRACTIONAL: tl.constexpr, BY_RISK: tl.constexpr,
):  # fmt: skip
    """A program for each segment. BY_RISK: copies the ``selection`` to the record, if anything is to be
    done; else that is empty. Its counts are 0."""
    if tl.program_id(0) == 0:
        word = tl.arange(0, 16)
        known = words.FIELDS if BY_RISK else 0
        copied = word < tl.where(tl.load(found_inf) == 0, known, 0)
        value = tl.load(selection + word, mask=copied, other=0)
        empty = tl.where(word < words.KEPT, -1, 0)
        tl.store(record + word, tl.where(copied, value, empty), mask=word <= words.UPDATE_NONFINITE)
    prepare(
        all_rows,
        count,
        hyper,
        lr,
        gamma,
        inv_scale,
        clip,
        found_inf,
        prepared,
        seed,
        FRACTIONAL,
        BY_RISK,
    )


@kernel(registers=72)
def update_kernel(
    rows, tile_rows, tiles, rank_inactive, found_inf, prepared, record,
    FRACTIONAL: tl.constexpr, BY_RISK: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In place. A program for each tile: a loop would take registers."""
    if (tiles > 0) & (tl.load(found_inf) == 0):
        t = tile_of(rows, tile_rows, tl.program_id(0).to(tl.int64), ACCESS, BLOCK)
        u = prepared_for(t, prepared)
        if tl.load(u + words.BASE_KIND) >= 0:
            update_tile(t, u, record, rank_inactive, FRACTIONAL, BY_RISK, STOCHASTIC, ACCESS)
        else:  # the second moment goes on with the first one for a gradient
            v = _second_moment(load(t, words.SQUARE, ACCESS), load(t, words.MOMENT, ACCESS), u)
            random_key = tl.load(u + words.RANDOM_KEY).to(tl.uint32, bitcast=True)
            store(t, words.SQUARE, v, random_key, True, ACCESS)
