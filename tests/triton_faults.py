"""A Triton kernel with one fault, which test_triton.py must find."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kernel(data, FAULT: tl.constexpr):
    at = data + tl.arange(0, 512)
    x = tl.load(at)
    y = tl.div_rn(x * x + 1.0, tl.sqrt_rn(x))
    if FAULT == "fused":
        y += tl.fma(x, x, x)
    elif FAULT == "quotient":
        y += 1.0 / x
    elif FAULT == "root":
        y += tl.sqrt(x)
    elif FAULT == "exponential":
        y += tl.exp(x)
    elif FAULT == "flushed":
        y = tl.inline_asm_elementwise(
            "add.ftz.f32 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FAULT == "upper word":  # which is not only compared
        y = tl.inline_asm_elementwise(
            "abs.ftz.f32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FAULT == "narrowing":
        y = y.to(tl.bfloat16).to(tl.float32)
    elif FAULT == "ordered":
        tl.atomic_add(at, y)
    tl.store(at, y)
