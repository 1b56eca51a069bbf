"""AdamW under a mask: what a segment's elements have in common, the arithmetic, and the update."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops.backends.triton import words
from rose_ops.backends.triton.access import (
    kernel,
    load,
    locate,
    mask_bits,
    store,
    store_bits,
    tile_of,
)
from rose_ops.backends.triton.elements import (
    INFINITY_KEY,
    abs_bits,
    is_selected,
    mix,
    next_step,
    risk_key,
)


@triton.jit
def prepare(
    rows, count, hyper, lr, found_inf, prepared, keys, gamma, seed, first_weight, second_weight,
    rules_out,
):  # fmt: skip
    """What all elements of a segment have in common in an update, and its step. A program each.

    Args:
        prepared: float32 ``[count, PREPARED]``, see words.py.
        keys: int32 ``[count, 2]``: what random bits are keyed by, and the kind of an element that no
            captured mask selects; -1: nothing of the segment is selected.
        first_weight, second_weight: what a mask that selects an element adds to its kind: 1 and 2
            where there are both, or 3.
        rules_out: whether masks of one value may say that nothing is selected.
    """
    i = tl.program_id(0).to(tl.int64)
    if (i < count) & (tl.load(found_inf) == 0):
        row = rows + i * words.COLUMNS
        group = hyper + tl.load(row + words.GROUP) * words.HYPER
        beta1 = tl.load(group + words.HYPER_BETA1)
        beta2 = tl.load(group + words.HYPER_BETA2)
        step_pointer = tl.load(row + words.STEP).to(tl.pointer_type(tl.float32))
        step, word = next_step(tl.load(step_pointer))
        tl.store(step_pointer, step)
        t = step.to(tl.float64)
        bias1 = 1.0 - tl.exp(t * tl.log(beta1))
        bias2 = 1.0 - tl.exp(t * tl.log(beta2))
        rate = tl.load(lr + tl.load(row + words.GROUP))
        decay = tl.load(group + words.HYPER_WEIGHT_DECAY)
        out = prepared + tl.load(row + words.INDEX) * words.PREPARED
        tl.store(out + words.BETA1, beta1.to(tl.float32))
        tl.store(out + words.REST1, (1.0 - beta1).to(tl.float32))
        tl.store(out + words.BETA2, beta2.to(tl.float32))
        tl.store(out + words.REST2, (1.0 - beta2).to(tl.float32))
        tl.store(out + words.EPS, tl.load(group + words.HYPER_EPS).to(tl.float32))
        tl.store(out + words.INV_ROOT_BIAS2, (1.0 / tl.sqrt(bias2)).to(tl.float32))
        weight = tl.load(gamma)
        tl.store(out + words.GAMMA, weight.to(tl.float32))
        tl.store(out + words.REST, (1.0 - weight).to(tl.float32))
        tl.store(out + words.GAMMA_STEP, (rate * weight / bias1).to(tl.float32))
        tl.store(out + words.REST_STEP, (rate * (1.0 - weight) / bias1).to(tl.float32))
        tl.store(out + words.FULL_STEP, (rate / bias1).to(tl.float32))
        tl.store(out + words.GAMMA_DECAY, (1.0 - rate * weight * decay).to(tl.float32))
        tl.store(out + words.REST_DECAY, (1.0 - rate * (1.0 - weight) * decay).to(tl.float32))
        tl.store(out + words.FULL_DECAY, (1.0 - rate * decay).to(tl.float32))
        selective = tl.load(group + words.HYPER_SELECTIVE) != 0
        kind = tl.where(selective, 0, 3)
        some = tl.zeros_like(kind)
        for k in tl.static_range(2):
            given = tl.load(row + words.MASK_KINDS + k)
            some += (given == words.MASK_OF_BITS).to(tl.int32)
            added = first_weight if k == 0 else second_weight
            whole = given == words.MASK_OF_ALL
            if given == words.MASK_OF_ONE:
                whole = tl.load(tl.load(row + words.MASKS + k).to(tl.pointer_type(tl.uint8))) != 0
            kind += tl.where(whole, added, 0)
        ruled_out = selective & (kind == 0) & (some == 0) & (rules_out != 0)
        kind = tl.where(ruled_out, -1, kind)
        pair = keys + tl.load(row + words.INDEX) * 2
        scrambled = word.to(tl.uint32, bitcast=True) * 0x9E3779B9
        tl.store(
            pair, mix(tl.load(seed).to(tl.int64).to(tl.uint32) ^ scrambled).to(tl.int32, bitcast=True)
        )
        tl.store(pair + 1, kind)


@kernel()
def prepare_kernel(
    rows, count, hyper, lr, found_inf, prepared, keys, record, selection, known, gamma, seed,
    first_weight, second_weight, rules_out,
):  # fmt: skip
    """A program for each segment. In ``record``: that of the ``selection``, if it is ``known`` and
    something is updated, or an empty one; and counts of 0."""
    if tl.program_id(0) == 0:
        word = tl.arange(0, 16)
        copied = word < tl.where(tl.load(found_inf) == 0, words.FIELDS * known, 0)
        value = tl.load(selection + word, mask=copied, other=0)
        tl.store(
            record + word, tl.where(copied | (word >= words.KEPT), value, -1), mask=word < words.RECORD
        )
    prepare(
        rows, count, hyper, lr, found_inf, prepared, keys, gamma, seed, first_weight, second_weight,
        rules_out,
    )  # fmt: skip


@triton.jit
def gradient(g, row, hyper, inv_scale, clip):
    """Unscaled, clipped, and negated to maximize."""
    group = hyper + tl.load(row + words.GROUP) * words.HYPER
    factor = tl.load(group + words.HYPER_SIGN).to(tl.float32) * tl.load(inv_scale)
    return g * factor * tl.load(clip + tl.where(tl.load(group + words.HYPER_SELECTIVE) != 0, 0, 1))


@triton.jit
def _second_moment(v, g, u):
    return tl.load(u + words.BETA2) * v + tl.load(u + words.REST2) * (g * g)


@triton.jit
def adamw(p, g, m, v, kind, u, FRACTIONAL: tl.constexpr):
    """p, m, v after the step; ``u`` is what their segment's prepared constants are at."""
    off = kind == 0
    gp = tl.where(off, m, g)
    step_size = tl.load(u + words.FULL_STEP)
    decay = tl.load(u + words.FULL_DECAY)
    if FRACTIONAL:
        is_gamma = kind == 1
        is_rest = kind == 2
        w = tl.where(is_gamma, tl.load(u + words.GAMMA), tl.load(u + words.REST))
        c = tl.where(is_gamma, tl.load(u + words.REST), tl.load(u + words.GAMMA))
        gp = tl.where(is_gamma | is_rest, w * g + c * m, gp)
        rest_size = tl.where(is_rest, tl.load(u + words.REST_STEP), step_size)
        rest_decay = tl.where(is_rest, tl.load(u + words.REST_DECAY), decay)
        step_size = tl.where(is_gamma, tl.load(u + words.GAMMA_STEP), rest_size)
        decay = tl.where(is_gamma, tl.load(u + words.GAMMA_DECAY), rest_decay)
    m_new = tl.where(off, m, tl.load(u + words.BETA1) * m + tl.load(u + words.REST1) * gp)
    v_new = _second_moment(v, gp, u)
    denominator = tl.sqrt_rn(v_new) * tl.load(u + words.INV_ROOT_BIAS2) + tl.load(u + words.EPS)
    p_new = tl.where(off, p, p * decay - step_size * tl.div_rn(m_new, denominator))
    return p_new, m_new, v_new


@triton.jit
def _random(row, index, key, WHAT: tl.constexpr):
    """In the lower half: 16 bits for each element's second moment (WHAT = 0) or parameter (1)."""
    position = index + tl.load(row + words.OFFSET)
    high = (position >> 32).to(tl.uint32) ^ tl.load(key).to(tl.uint32, bitcast=True)
    low = position.to(tl.uint32)
    return mix((low & 0xFFFFFFFE | WHAT) ^ mix(high)) >> ((low & 1) * 16)


@triton.jit
def _store_stochastic(address, at, x, random, valid, ALIGNED: tl.constexpr):
    u = x.to(tl.uint32, bitcast=True)
    rounded = tl.where(abs_bits(x) > INFINITY_KEY, u | 0x400000, u + (random & 0xFFFF))
    store_bits(address, at, rounded >> 16, valid, ALIGNED)


@triton.jit
def store_parameter(
    row, dims, index, x, key, valid, D0: tl.constexpr, LINEAR: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr = False,
):  # fmt: skip
    at = locate(row, dims, index, 0, LINEAR, ROWS)
    if STOCHASTIC and D0 == 1:
        _store_stochastic(tl.load(row + words.DATA), at, x, _random(row, index, key, 1), valid, ALIGNED)
    else:
        store(tl.load(row + words.DATA), at, x, valid, D0, ALIGNED)


@triton.jit
def store_moments(
    row, dims, index, m, v, key, valid, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr = False,
):  # fmt: skip
    if BOTH:
        at = locate(row, dims, index, 2, LINEAR, ROWS)
        store(tl.load(row + words.DATA + 2), at, m, valid, D2, ALIGNED)
    at = locate(row, dims, index, 3, LINEAR, ROWS)
    if D3 == 1:
        random = _random(row, index, key, 0)
        _store_stochastic(tl.load(row + words.DATA + 3), at, v, random, valid, ALIGNED)
    else:
        store(tl.load(row + words.DATA + 3), at, v, valid, D3, ALIGNED)


@kernel(registers=72)
def update_kernel(
    rows, tile_rows, tiles, dims, hyper, inv_scale, clip, rank_inactive, found_inf, selection, prepared,
    keys, counts, first_weight, second_weight,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, LINEAR: tl.constexpr,
    ALIGNED: tl.constexpr, FRACTIONAL: tl.constexpr, FROM_RISK: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW under the mask, in place. A program for each tile: a loop would take registers."""
    if (tiles > 0) & (tl.load(found_inf) == 0):
        tile = tl.program_id(0).to(tl.int64)
        row, index, valid = tile_of(rows, tile_rows, tile, ALIGNED, BLOCK)
        segment = tl.load(row + words.INDEX)
        key = keys + segment * 2
        u = prepared + segment * words.PREPARED
        at = locate(row, dims, index, 2, LINEAR)
        m = load(tl.load(row + words.DATA + 2), at, valid, D2, ALIGNED)
        at = locate(row, dims, index, 3, LINEAR)
        v = load(tl.load(row + words.DATA + 3), at, valid, D3, ALIGNED)
        if tl.load(key + 1) >= 0:
            at = locate(row, dims, index, 0, LINEAR)
            p = load(tl.load(row + words.DATA), at, valid, D0, ALIGNED)
            at = locate(row, dims, index, 1, LINEAR)
            g = load(tl.load(row + words.DATA + 1), at, valid, D1, ALIGNED)
            g = gradient(g, row, hyper, inv_scale, clip)
            group = hyper + tl.load(row + words.GROUP) * words.HYPER
            selective = (
                tl.zeros([BLOCK], tl.int32) + tl.load(group + words.HYPER_SELECTIVE).to(tl.int32) != 0
            )
            kind = tl.zeros([BLOCK], tl.int32) + tl.load(key + 1)
            if FRACTIONAL or not FROM_RISK:
                kind += mask_bits(row, index, valid, 0) * first_weight
            if FROM_RISK:
                alpha = (1.0 - tl.load(group)).to(tl.float32)
                risk = risk_key(g, m, alpha, rank_inactive, True)
                kind += (selective & is_selected(risk, selection)).to(tl.int32) * second_weight
            else:
                kind += mask_bits(row, index, valid, 1) * second_weight
            bad = selective & ((abs_bits(g) >= INFINITY_KEY) | (abs_bits(m) >= INFINITY_KEY))
            kind = tl.where(bad, 0, kind)
            tl.atomic_add(counts, tl.sum((valid & (kind != 0)).to(tl.int64)), sem="relaxed")
            tl.atomic_add(counts + 1, tl.sum((valid & bad).to(tl.int64)), sem="relaxed")
            p, m, v = adamw(p, g, m, v, kind, u, FRACTIONAL)
            store_parameter(row, dims, index, p, key, valid, D0, LINEAR, ALIGNED, STOCHASTIC)
            store_moments(row, dims, index, m, v, key, valid, D2, D3, LINEAR, ALIGNED, True)
        else:  # nothing of the tensor is selected
            v = _second_moment(v, m, u)
            store_moments(row, dims, index, m, v, key, valid, D2, D3, LINEAR, ALIGNED, False)
