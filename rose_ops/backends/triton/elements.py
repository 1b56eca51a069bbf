"""The arithmetic of elements, in blocks: that of ``csrc/include/rose/element.h``, one by one."""

# Kernels are compiled, not run: their annotations are Triton's.
from __future__ import annotations

import triton
import triton.language as tl

from rose_ops import definitions
from rose_ops.backends.triton import words

# Keys are int32: those of elements that are not ranked are negative.
INACTIVE_KEY = tl.constexpr(definitions.INACTIVE_KEY - 2**32)
NONFINITE_KEY = tl.constexpr(definitions.NONFINITE_KEY - 2**32)
INFINITY_KEY = tl.constexpr(definitions.INFINITY_KEY)
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.jit
def abs_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def bits_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def risk_key(g, m, alpha, rank_inactive, SECOND: tl.constexpr):
    ag = abs_bits(g)
    if SECOND:
        am = abs_bits(m)
        ratio = tl.div_rn(alpha * bits_float(ag), bits_float(am))
        ranked = tl.where(ag == 0, ONE, INFINITY_KEY)
        key = tl.where(
            am == 0, tl.where(rank_inactive != 0, ranked, INACTIVE_KEY), abs_bits(ratio - 1.0)
        )
        finite = (ag < INFINITY_KEY) & (am < INFINITY_KEY)
    else:
        key = tl.where((ag == 0) & (rank_inactive == 0), INACTIVE_KEY, ag)
        finite = ag < INFINITY_KEY
    return tl.where(finite, key, NONFINITE_KEY)


@triton.jit
def is_selected(key, record):
    high = tl.load(record + words.HIGH).to(tl.int32)
    low = tl.load(record + words.LOW).to(tl.int32)
    return ((key <= high) & (key > low)) | (key == INACTIVE_KEY)


@triton.jit
def rank_of(fraction, n):
    return fraction * (n // 1000000000) + fraction * (n % 1000000000) // 1000000000


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def next_step(step):
    """The number after it, and what that keys random bits by; see ``next_step`` and ``step_word`` in
    reference.py."""
    bits = step.to(tl.int32, bitcast=True)
    next_float = (bits + tl.where(bits < 0, -1, 1)).to(tl.float32, bitcast=True)
    sticks = (step + 1.0 == step) & ((bits & 0x7FFFFFFF) < INFINITY_KEY)
    step = tl.where(sticks, next_float, step + 1.0)
    bits = tl.where(step == step, step.to(tl.int32, bitcast=True), 0x7FC00000)
    small = (step >= 0) & (step < 16777216.0)
    return step, tl.where(small, tl.where(small, step, 0.0).to(tl.int32), bits)
