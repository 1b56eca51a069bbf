"""What the numbers of the method mean: columns, keys, bits and samples, for :mod:`rose_ops.reference`,
which computes with them, and for all that has to agree with it.

Nothing here decides or updates anything. C++ has the same in ``csrc/include/rose/``; tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from rose_ops._arguments import checks_memory

P = ParamSpec("P")
T = TypeVar("T")

INFINITY_KEY = 0x7F800000
INACTIVE_KEY = 1 << 31  # keys of ranked elements have 31 bits
NONFINITE_KEY = INACTIVE_KEY + (1 << 20)
LINE = 16  # elements that are sampled together: a cache line of float32
APPROX_FEWEST = 1 << 20  # with fewer elements, Mode.APPROX is exact
SAMPLE_KEY = 0x5A3B  # together with the draw, the seed of a sample
HIGH_DIGITS, LOW_DIGITS = 1 << 16, 1 << 15  # values of the upper 16 and the lower 15 bits of a key
FRACTION_UNIT = 10**9  # the fractions kept are passed as integers of this unit
LOG_OF_FAILURE = 26.0  # l in step_; kLogOfFailure in threshold.h


class Hyper(IntEnum):
    """Columns of the hyperparameter table."""

    BETA1 = 0
    BETA2 = 1
    EPS = 2
    WEIGHT_DECAY = 3
    SIGN = 4  # -1: maximize
    SELECTIVE = 5  # 0: plain AdamW


class Mode(IntEnum):
    """How the thresholds of a ranking are found. EXACT and BRACKET give the same ones, unless a bracket
    misses."""

    GIVEN = 0  # not at all: a record has them
    EXACT = 1  # in passes of their own, before they are used
    BRACKET = 2  # in the pass that uses them: see step_
    APPROX = 3  # as those of a sample: see rank_


class Field(IntEnum):
    """Entries of a record, which says what came out of a ranking. One without a ranking has -1 for HIGH
    and LOW, and zeros."""

    HIGH = 0  # key of tau_h; -1: nothing ranked is kept
    LOW = 1  # key of tau_l; -1: no lower bound
    KEPT = 2  # ranked elements with LOW < key <= HIGH
    RANKED = 3
    INACTIVE = 4
    NONFINITE = 5
    MISSES = 6  # of brackets
    SIZE = 8


def float32(x: float) -> float:
    """``x`` rounded to float32."""
    return torch.tensor(x, dtype=torch.float64, device="cpu").float().item()


def keeps_denormals(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` without flushing denormals to zero, whatever this thread is set to."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        flushing = (torch.tensor(2.0**-126, dtype=torch.float32, device="cpu") * 0.5).item() == 0
        torch.set_flush_denormal(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_flush_denormal(flushing)

    return wrapper


def operator(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function stand for an operator: it checks storages first, keeps denormals, and makes new
    tensors on the CPU, whatever this thread's defaults are."""

    @checks_memory
    @keeps_denormals
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.get_default_device().type == "cpu":  # as mostly: the other way makes all calls slower
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapper


def scaled(
    grad: Tensor, inv_scale: Tensor | None, clip: Tensor | None = None, selective: bool = True
) -> Tensor:
    """The gradient as float32, unscaled and clipped: ``fl(fl(g * inv_scale) * clip)``."""
    g = grad.float()
    if inv_scale is not None:
        g = g * inv_scale.to(g.device)
    return g if clip is None else g * clip[0 if selective else 1].to(g.device)


def risk_key(g: Tensor, m: Tensor | None, alpha: float | Tensor, rank_inactive: bool) -> Tensor:
    """Rank key of every element: int64, the bit pattern of its float32 risk.

    First order (``m is None``, Eq. 2): ``r = |g|``. Second order (Eq. 4):
    ``r = |fl(fl(fl(alpha*|g|) / |m|) - 1)|``. Non-negative floats order as their bit patterns do.
    Elements with no evidence to rank by (``g == 0`` in first order, ``m == 0`` in second) are
    ``INACTIVE_KEY``, unless ``rank_inactive``: then their risks are 0, and ``inf`` or (both zero) 1.
    NaN and inf are ``NONFINITE_KEY``.
    """
    g = g.abs()
    finite = g.isfinite()
    if m is None:
        risk, inactive = g, g == 0
    else:
        m = m.float().abs()
        finite = finite & m.isfinite()
        inactive = m == 0
        risk = (alpha * g / m - 1).abs()
        risk = torch.where(inactive, torch.where(g == 0, 1.0, torch.inf).float(), risk)
    key = risk.contiguous().view(torch.int32).long()
    if not rank_inactive:
        key = torch.where(inactive, INACTIVE_KEY, key)
    return torch.where(finite, key, NONFINITE_KEY)


def alphas_of(hyper: Tensor, group: Tensor) -> list[float]:
    """``1 - beta1`` of each tensor, as float32: what second order multiplies gradients by."""
    alphas = [float32(1.0 - beta1) for beta1 in hyper[:, Hyper.BETA1].tolist()]
    return [alphas[row] for row in group.tolist()]


def rank_of(fraction: int, n: int) -> int:
    """``floor(fraction / FRACTION_UNIT * n)``, exactly, in 64-bit integers (Eq. 3)."""
    return fraction * (n // FRACTION_UNIT) + fraction * (n % FRACTION_UNIT) // FRACTION_UNIT


def sampled(sizes: Sequence[int], draw: int) -> Tensor:
    """The elements of ``Mode.APPROX``'s sample, by their places in the index space of tensors of
    ``sizes`` elements.

    Each tensor is cut into lines of 16 elements, the last of which may be shorter. Of all lines, T,
    equal strata of consecutive ones are made, as many as ``T / 128``, but at least 2^14 (at most
    ``T / 8`` then) and at most 2^16. In each, one line is drawn by a hash of ``draw`` and the stratum's
    number. (A fixed stride would resonate with the lengths of rows. The last stratum may be shorter,
    and its line not there.)
    """
    lines = [-(-n // LINE) for n in sizes]
    total = sum(lines)
    wanted = min(max(total // 128, min(total // 8, 1 << 14)), 1 << 16)
    stratum = max(1, total // max(1, wanted))
    numbers = torch.arange(-(-total // stratum))
    drawn = numbers * stratum + (hash_u32(numbers, draw, SAMPLE_KEY) * stratum >> 32)
    drawn = drawn[drawn < total]
    first_line = torch.tensor([0, *lines]).cumsum(0)
    first_element, n = torch.tensor([0, *sizes]).cumsum(0), torch.tensor(sizes)
    tensor = torch.searchsorted(first_line, drawn, right=True) - 1
    within = ((drawn - first_line[tensor]) * LINE)[:, None] + torch.arange(LINE)
    return (first_element[tensor][:, None] + within)[within < n[tensor][:, None]]


def is_selected(keys: Tensor, record: Tensor) -> Tensor:
    """Bool mask: ``tau_l < r <= tau_h``, or inactive."""
    low, high = record.select(0, Field.LOW), record.select(0, Field.HIGH)
    inside = (keys > low) & (keys <= high)
    return inside | (keys == INACTIVE_KEY)


def pack(mask: Tensor) -> Tensor:
    """Bool ``[n]`` to uint8 ``[ceil(n / 8)]``, lowest bit first."""
    bits = torch.nn.functional.pad(mask.reshape(-1).long(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(mask: Tensor, n: int) -> Tensor:
    """A mask of any of the three kinds to bool ``[n]``."""
    if mask.numel() == 0:
        return torch.ones(n, dtype=torch.bool)
    if mask.dtype == torch.bool:
        return mask.reshape(1).expand(n)
    return ((mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().reshape(-1)[:n]


def hash_u32(index: Tensor, seed: int, step: int) -> Tensor:
    """32 random bits for each index: a counter-based hash of (seed, word of the step, index)."""
    mask = 0xFFFFFFFF

    def mix(x: Tensor) -> Tensor:  # "lowbias32" (C. Wellons, hash-prospector), mod 2**32
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
        x = ((x ^ (x >> 15)) * 0xD35A2D97) & mask
        return x ^ (x >> 15)

    key = mix(torch.tensor((seed ^ (step * 0x9E3779B9)) & mask))
    return mix(index & mask ^ mix((index >> 32) ^ key))
