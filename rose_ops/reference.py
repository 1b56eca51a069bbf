"""What ROSE computes, in plain PyTorch: the truth every other backend is compared with.

Source: *ROSE: Robust Selective Fine-tuning for Pre-trained Language Models* (Jiang et al., EMNLP
2022), equations 1-5 and Algorithm 1.

The functions have the signatures of the operators ``torch.ops.rose_ops.*``, so this module is also
``backend="reference"``. It favours clarity: it stores every risk, which the kernels never do.

Arguments shared by the functions below (N tensors in G parameter groups):

* ``grads``, ``params``, ...: lists of N tensors of equal shapes, one entry per parameter. The list is
  one flat index space, each tensor in row-major order.
* ``hyper``: float64 ``[G, 6]``, see :class:`Hyper`. ``group``: int64 ``[N]``, the row of each tensor.
* ``inv_scale``: float32 scalar that gradients are multiplied by first (1 / AMP loss scale), or None.
* ``clip``: float32 ``[2]`` that they are multiplied by next, or None; see :func:`clip_factors`.
* ``record``: int64 ``[8]``, what is known of a selection, see :class:`Field`.
* ``ranking``: what is asked of a ranking, five numbers: a :class:`Mode`; ``upper`` and ``lower``,
  fractions in units of 1e-9; ``rank_inactive``, whether elements without evidence are ranked; ``draw``,
  which sample is taken.

Masks are bits, 8 elements per byte, lowest bit first; a bool mask of one element speaks for its
whole tensor, and an empty one selects all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from rose_ops._arguments import checks_memory

P = ParamSpec("P")
T = TypeVar("T")

INFINITY_KEY = 0x7F800000
INACTIVE_KEY = 1 << 31  # keys of ranked elements have 31 bits
NONFINITE_KEY = INACTIVE_KEY + (1 << 20)
LINE = 16  # elements of a line, what samples are made of: a cache line of float32
APPROX_FEWEST = 1 << 20  # elements, below which Mode.APPROX is exact
SAMPLE_KEY = 0x5A3B  # keys the sample, with its draw
HIGH_DIGITS, LOW_DIGITS = 1 << 16, 1 << 15  # values of the upper 16 and the lower 15 bits of a key
CHUNK = 1 << 20  # elements that count_keys looks at together
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
    """How the thresholds of a ranking are found. Wherever they are, they are the same, but for those of
    a sample and for a miss of a bracket."""

    GIVEN = 0  # they are known, by a record
    EXACT = 1  # first, in passes of their own
    BRACKET = 2  # on the way, in the pass that they are for: see step_
    APPROX = 3  # those of a sample: see rank_


class Field(IntEnum):
    """Entries of a selection record. An empty one: nothing is ranked."""

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
    """Run ``function`` with denormals as the numbers they are, whatever this thread is set to."""

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
    """Of all that stands for an operator: it looks at storages first, and computes with denormals, and
    on the CPU, whatever this thread is set to."""

    @checks_memory
    @keeps_denormals
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"):  # torch.set_default_device() may say something else
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


@operator
def clip_factors(sums: Tensor, max_norm: float) -> Tensor:
    """The norm of all gradients, and what those of selective and of other tensors are multiplied by to
    be clipped: float32 ``[3]``.

    ``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` has it. A norm that is
    not finite makes every element of a selective tensor NaN, so that none of them is updated.

    Args:
        sums: float64, the squared norm of each tensor. They are added in float64, in an order that is
            up to the backend.
    """
    norm = norm_of(sums.sum())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.stack([norm, torch.where(norm.isfinite(), factor, torch.nan), factor])


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


def _keys(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hyper: Tensor,
    group: Tensor,
    inv_scale: Tensor | None,
    clip: Tensor | None,
    rank_inactive: bool,
) -> list[Tensor]:
    moments: Sequence[Tensor | None] = exp_avgs or [None] * len(grads)
    alphas = [float32(1.0 - beta1) for beta1 in hyper[:, Hyper.BETA1].tolist()]
    return [
        risk_key(scaled(g, inv_scale, clip), m, alphas[i], rank_inactive).reshape(-1)
        for g, m, i in zip(grads, moments, group.tolist(), strict=True)
    ]


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


def _empty_record() -> Tensor:
    return torch.tensor([-1, -1] + [0] * (Field.SIZE - 2))


def _select(keys: list[Tensor], ranking: Sequence[int]) -> Tensor:
    """The record of a ranking of ``keys``, of one tensor each."""
    mode, upper, lower, _, draw = ranking
    every = torch.cat([torch.empty(0, dtype=torch.int64), *keys])
    ranked = every[every < INACTIVE_KEY]
    if mode == Mode.APPROX and every.numel() >= APPROX_FEWEST:
        found = every[sampled([key.numel() for key in keys], draw)]
        among = found[found < INACTIVE_KEY].sort().values
    else:
        among = ranked.sort().values

    def threshold(fraction: int) -> int:
        k = rank_of(fraction, among.numel())
        return -1 if k == 0 else int(among[k - 1])

    high, low = threshold(upper), threshold(lower)
    record = torch.zeros(Field.SIZE, dtype=torch.int64)
    record[Field.HIGH], record[Field.LOW] = high, low
    record[Field.KEPT] = ((ranked > low) & (ranked <= high)).sum()
    record[Field.RANKED] = ranked.numel()
    record[Field.INACTIVE] = (every == INACTIVE_KEY).sum()
    record[Field.NONFINITE] = (every == NONFINITE_KEY).sum()
    return record


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


@operator
def rank_(
    masks: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hyper: Tensor,
    group: Tensor,
    inv_scale: Tensor | None,
    clip: Tensor | None,
    record: Tensor | None,
    ranking: Sequence[int],
) -> Tensor:
    """Thresholds of the robust parameters (Eq. 3), what lies on each side of them, and masks of it.

    First order if ``exp_avgs`` is empty, else second order. ``tau_h`` is the ``k_h``-th smallest
    ranked risk with ``k_h = floor(upper * ranked)``, ``tau_l`` likewise.

    ``Mode.APPROX`` takes them from a sample instead (:func:`sampled`), with its risks and its number of
    ranked ones, unless there are fewer than ``APPROX_FEWEST`` elements. The counts are exact. With L
    lines, of which y_j is the number of ranked elements at or below the threshold less ``upper`` times
    that of ranked elements, the error of the achieved rank has a standard deviation of
    ``sqrt(sum of (y_j - mean)^2) / (16*L)`` of n: with independent risks ``sqrt(c*(1-c)/(16*L))``, at
    most ``sqrt(c*(1-c)/L)``, when the risks of each line are alike. That is 0.07% and 0.27% at 64Mi
    elements.

    Args:
        masks: N masks to write, one bit per element. None of them: the thresholds alone, where
            ``Mode.BRACKET`` has nothing to do on the way.
        record: with ``Mode.GIVEN``, and only then, whose thresholds are known; or None.

    Returns:
        The record of the selection: int64 ``[8]``, indexed by :class:`Field`; ``record``, if given.
    """
    keys = _keys(grads, exp_avgs, hyper, group, inv_scale, clip, bool(ranking[3]))
    result = _select(keys, ranking) if record is None else record.clone()
    writes = bool(masks) or record is not None
    for mask, key in zip(masks, keys if writes else (), strict=True):
        mask.copy_(pack(is_selected(key, result)))
    return result


def counted(digits: Tensor | None) -> int:
    """How many numbers :func:`count_keys` returns."""
    return HIGH_DIGITS + 2 if digits is None else digits.numel() * LOW_DIGITS


@operator
def count_keys(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hyper: Tensor,
    group: Tensor,
    inv_scale: Tensor | None,
    clip: Tensor | None,
    rank_inactive: bool,
    digits: Tensor | None,
) -> Tensor:
    """What processes add up to find the thresholds of one ranking, each of what it has of the elements;
    see :mod:`rose_ops.distributed`.

    (This is also what GPUs use: it holds the keys of a million elements at a time, and reads nothing
    back.)

    Args:
        digits: int64 ``[k]``, or None.

    Returns:
        int64. Without ``digits``, ``[65538]``: how many ranked elements have each value of the upper 16
        bits of their keys' 31, how many are inactive, and how many are not finite. With them,
        ``[k * 32768]``: of the ranked elements with each of these upper digits, how many have each
        value of the lower 15 bits.
    """
    device = hyper.device if not grads else grads[0].device
    count = 1 if digits is None else digits.numel()
    size = HIGH_DIGITS + 2 if digits is None else LOW_DIGITS + 1
    counts = torch.zeros(count, size, dtype=torch.int64, device=device)
    moments: Sequence[Tensor | None] = exp_avgs or [None] * len(grads)
    alphas = [float32(1.0 - beta1) for beta1 in hyper[:, Hyper.BETA1].tolist()]
    for grad, moment, row in zip(grads, moments, group.tolist(), strict=True):
        g, m = grad.reshape(-1), None if moment is None else moment.reshape(-1)
        for begin in range(0, g.numel(), CHUNK):
            part = slice(begin, begin + CHUNK)
            keys = risk_key(
                scaled(g[part], inv_scale, clip), None if m is None else m[part], alphas[row],
                rank_inactive,
            )  # fmt: skip
            for i in range(count):
                if digits is None:
                    unranked = HIGH_DIGITS + (keys == NONFINITE_KEY).long()
                    at = torch.where(keys < INACTIVE_KEY, keys >> 15, unranked)
                else:
                    inside = (keys < INACTIVE_KEY) & (keys >> 15 == digits[i])
                    at = torch.where(inside, keys & (LOW_DIGITS - 1), LOW_DIGITS)
                counts[i].scatter_add_(0, at, torch.ones_like(at))
    return counts.flatten() if digits is None else counts[:, :-1].flatten()


def next_step(step: Tensor) -> Tensor:
    """The number of the step after ``step``, float32.

    One more; or, where that rounds to the same number (from 2^24 on), the next float32, so that the
    rounding of no two steps is keyed alike. The count then runs ahead of the steps that were taken,
    which matters to nothing else: bias corrections are 1 in float32 there, with betas up to 0.999999.
    Inf and NaN stay.
    """
    after = step + 1
    sticks = (after == step) & step.isfinite()
    return torch.where(sticks, torch.nextafter(step, torch.full_like(after, torch.inf)), after)


def step_word(step: float) -> int:
    """The 32 bits by which a step keys its rounding: its number below 2^24; else its bit pattern as a
    float32, which is larger than those and another one for every number (for NaN, one for all)."""
    if 0 <= step < 2**24:
        return int(step)
    return (
        int(torch.tensor(step if step == step else torch.nan, dtype=torch.float32).view(torch.int32))
        & 0xFFFFFFFF
    )


def hash_u32(index: Tensor, seed: int, step: int) -> Tensor:
    """32 random bits for each index: a counter-based hash of (seed, word of the step, index)."""
    mask = 0xFFFFFFFF

    def mix(x: Tensor) -> Tensor:  # "lowbias32" (C. Wellons, hash-prospector), mod 2**32
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
        x = ((x ^ (x >> 15)) * 0xD35A2D97) & mask
        return x ^ (x >> 15)

    key = mix(torch.tensor((seed ^ (step * 0x9E3779B9)) & mask))
    return mix(index & mask ^ mix((index >> 32) ^ key))


def rounding_bits(index: Tensor, seed: int, step: int, parameter: bool) -> Tensor:
    """16 random bits for each global element index.

    Of the words of two neighbours, ``hash_u32`` of ``2*i`` and ``2*i + 1``, the first is for both's
    second moments, the other for both's parameters; its lower half is for the first neighbour.
    """
    return hash_u32(index & ~1 | int(parameter), seed, step) >> 16 * (index & 1) & 0xFFFF


def round_stochastic_bf16(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16, up with the probability that makes it right on average.

    The 16 bits that are cut off are compared with 16 random bits. NaN and inf stay as they are.
    """
    cut = ((x.view(torch.int32).long() + random) >> 16 << 16).to(torch.int32)
    return torch.where(x.isfinite(), cut.view(torch.float32), x).bfloat16()


class _Weight(NamedTuple):
    """M of each element, its complement, and which elements are exactly 0 or 1."""

    m: Tensor
    complement: Tensor


def _weights(first: Tensor | None, second: Tensor | None, gamma: float) -> _Weight:
    """The mask M (Eq. 5 if both are given): gamma*M_first + (1 - gamma)*M_second, in {0, .., 1}."""
    if first is None or second is None:
        mask = first if first is not None else second
        assert mask is not None
        return _Weight(mask.double(), 1.0 - mask.double())
    both, neither = first & second, ~first & ~second
    ours, rest = torch.tensor([gamma, 1.0 - gamma], dtype=torch.float64)
    m = torch.where(first, ours, rest).masked_fill(both, 1.0).masked_fill(neither, 0.0)
    complement = torch.where(first, rest, ours)
    return _Weight(m, complement.masked_fill(both, 0.0).masked_fill(neither, 1.0))


@operator
def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    first_masks: list[Tensor],
    second_masks: list[Tensor],
    record: Tensor | None,
    lr: Tensor,
    hyper: Tensor,
    group: Tensor,
    offsets: Tensor,
    inv_scale: Tensor | None,
    clip: Tensor | None,
    found_inf: Tensor | None,
    gamma: float,
    ranking: Sequence[int],
    rounding: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """AdamW under the mask (Algorithm 1, lines 8-13), in place::

        g' = M*g + (1 - M)*m
        m <- beta1*m + (1 - beta1)*g'          M = 0 leaves m as it is
        v <- beta2*v + (1 - beta2)*g'^2
        p <- p - lr*M*( mhat/(sqrt(vhat) + eps) + weight_decay*p )

    with ``mhat = m/(1 - beta1^t)`` and ``vhat = v/(1 - beta2^t)``. M comes from ``first_masks`` and
    ``second_masks`` (captured), or, with a ``ranking``, from a second-order mask found on the way: that
    of :func:`rank_` over the selective tensors. Tensors of groups that are not selective get plain
    AdamW. An element whose gradient or first moment is not finite has M = 0. Where the masks rule out a
    whole tensor, its gradient is not looked at.

    With ``Mode.BRACKET`` the kernels rank and update in one pass over the tensors, unless there are so
    few elements that two are faster. A sample of cache lines, one in each of many equal strata, gives a
    bracket that holds the threshold; the pass settles what lies outside of it, logs what lies inside,
    and what the log shows to have been settled wrongly is done again. The result is that of
    ``Mode.EXACT`` unless the threshold is outside of its bracket, a *miss*: then the nearest end of the
    bracket is the threshold, and MISSES is 1.

    Why a miss is rare. Let y_j be, in the line drawn from stratum j of L lines, the number of ranked
    elements at or below the threshold less ``upper`` times the number of ranked elements. The lines are
    drawn independently, and L times the sum of the y_j has the expectation that the definition of the
    threshold makes 0 (within 1). |y_j - E y_j| <= 16, the elements of a line, so by Bernstein's
    inequality ``|sum of (y_j - E y_j)| <= sqrt(2*V*l) + (2/3)*16*l`` but for a probability of
    ``2*exp(-l)``, with V the variance of the sum. V is estimated by U, the sum of the squared
    differences of neighbours (y_1 - y_2, y_3 - y_4, ...): E U >= V, and a sum of independent terms
    between 0 and 16^2 is rarely too small: ``U >= E U - 16*sqrt(2*l*(E U))`` but for a probability of
    ``exp(-l)`` (as in Maurer and Pontil, 2009). With ``r = 16*sqrt(2*l)``, that is
    ``sqrt(V) <= r/2 + sqrt(r^2/4 + U)``, and the bracket's half-width, in elements of the sample, is
    ``sqrt(2*l)*(r/2 + sqrt(r^2/4 + U)) + (2/3)*16*l``. (U is taken at a first estimate of the
    threshold.)
    A bracket is wrong with a probability of at most 3*exp(-l), then. A threshold has at most 16 of
    them, each narrower than the last; or one, and a log that is too short with a probability of at most
    exp(-l). A ranking has two thresholds if ``lower > 0``, and a step in an ensemble has two rankings.
    With l = 26 a whole step misses with a probability below 4 * 16 * 3 * exp(-26) < 1e-9.

    Args:
        steps: N float32 scalars, counted up first; see :func:`next_step`.
        record: with ``Mode.GIVEN``, and only then, whose thresholds are known; or None.
        lr: ``[G]``. offsets: int64 ``[N]``, global index of each tensor's first element.
        found_inf: if it holds a non-zero, nothing changes at all.
        ranking: empty without a second-order mask to find.
        rounding: two numbers. A seed, which keys, with the step (:func:`step_word`) and the element's
            global index, the stochastic rounding of bfloat16 second moments; and whether bfloat16
            parameters are rounded that way, too (else to nearest).
        dtype: precision in which this is evaluated. The rounding of m and v is part of the
            definition in float32; float64 gives the value that errors are measured against.

    Returns:
        int64 ``[10]``: the record of the selection, an empty one if nothing is ranked or updated;
        elements with M > 0; elements of selective tensors with M = 0 because they are not finite.
    """
    counts = torch.zeros(2, dtype=torch.int64)
    if found_inf is not None and found_inf.item() != 0:
        return torch.cat([_empty_record(), counts])
    rank_inactive, (seed, stochastic) = bool(ranking and ranking[3]), rounding
    selection = record
    if ranking and record is None:
        chosen = [i for i, row in enumerate(group.tolist()) if hyper[row, Hyper.SELECTIVE] != 0]
        pairs = [grads[i] for i in chosen], [exp_avgs[i] for i in chosen]
        keys = _keys(*pairs, hyper, group[chosen], inv_scale, clip, rank_inactive)
        selection = _select(keys, ranking)
    for i, (p, grad, m, v, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        row = int(group[i])
        beta1, beta2, eps, weight_decay, sign, selective = hyper[row].tolist()
        step.copy_(next_step(step))
        t = step.item()
        word = step_word(t)
        g = sign * scaled(grad, inv_scale, clip, bool(selective))
        m0, v0, p0 = m.to(dtype), v.to(dtype), p.to(dtype)

        if selective:
            first = unpack(first_masks[i], g.numel()).view(g.shape) if first_masks else None
            second = unpack(second_masks[i], g.numel()).view(g.shape) if second_masks else None
            if selection is not None:
                key = risk_key(g, m, float32(1.0 - beta1), rank_inactive)
                second = is_selected(key, selection)
            weight = _weights(first, second, gamma)
            if selection is None and _rules_out(first_masks[i : i + 1] + second_masks[i : i + 1]):
                finite = torch.ones(g.shape, dtype=torch.bool)
            else:
                finite = g.isfinite() & m.isfinite()
            M = weight.m.masked_fill(~finite, 0.0)
            counts[1] += (~finite).sum()
        else:
            weight = _Weight(torch.ones(g.shape).double(), torch.zeros(g.shape).double())
            M = weight.m
        counts[0] += (M > 0).sum()

        on, off = M == 1, M == 0
        g = g.to(dtype)
        blend = M.to(dtype) * g + weight.complement.to(dtype) * m0
        g = torch.where(on, g, torch.where(off, m0, blend))
        c1, c2 = _constant(1.0 - beta1, dtype), _constant(1.0 - beta2, dtype)
        m1 = torch.where(off, m0, _constant(beta1, dtype) * m0 + c1 * g)
        v1 = _constant(beta2, dtype) * v0 + c2 * (g * g)

        denom = v1.sqrt() / (1.0 - beta2**t) ** 0.5 + eps
        step_size = (lr[row].double() * M / (1.0 - beta1**t)).to(dtype)
        decay = (1.0 - lr[row].double() * M * weight_decay).to(dtype)
        p1 = torch.where(off, p0, p0 * decay - step_size * (m1 / denom))
        index = torch.arange(g.numel()).view(g.shape) + int(offsets[i])
        if v.dtype == torch.bfloat16 and dtype == torch.float32:
            v1 = round_stochastic_bf16(v1, rounding_bits(index, seed, word, parameter=False))
        if p.dtype == torch.bfloat16 and dtype == torch.float32 and stochastic:
            p1 = round_stochastic_bf16(p1, rounding_bits(index, seed, word, parameter=True))
        p.copy_(p1)
        m.copy_(m1)
        v.copy_(v1)
    return torch.cat([_empty_record() if selection is None else selection, counts])


def _rules_out(masks: list[Tensor]) -> bool:
    """Whether the masks of a tensor are all for the whole of it, and none selects it."""
    return all(mask.dtype == torch.bool and mask.numel() == 1 and not mask for mask in masks)


def _set_bracket_width(width: float) -> float:
    """For tests of other backends. Here there are no brackets."""
    return width


def _constant(x: float, dtype: torch.dtype) -> float:
    """A coefficient as the arithmetic sees it: rounded to float32 unless evaluated in float64."""
    return float32(x) if dtype == torch.float32 else x


@operator
def sums_of_squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """Squared Frobenius norm of each tensor: float64 ``[N]``."""
    sums = [scaled(t, inv_scale).double().square().sum() for t in tensors]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.float64)


@operator
def norm_of(sums: Tensor, clip: Tensor | None = None) -> Tensor:
    """Norms from sums of squares, rounded once: float32; of selective tensors, clipped."""
    norms = sums.sqrt().float()
    return norms if clip is None else norms * clip[0]


@operator
def select_tensors(
    grad_norms: Tensor,
    exp_avg_norms: Tensor | None,
    alpha: Tensor,
    upper: int,
    lower: int,
    rank_inactive: bool,
) -> tuple[Tensor, Tensor]:
    """Selection of whole tensors by their norms (the authors' granularity), on any device.

    The risks are those of :func:`risk_key`, with Frobenius norms for ``|g|`` and ``|m|``. The
    thresholds are linearly interpolated quantiles of the ranked tensors, as ``torch.quantile`` but
    with ranks from exact fractions; a tensor is kept if ``tau_l <= r <= tau_h``.

    Args:
        grad_norms: float32 ``[N]``. exp_avg_norms: likewise, or None for first order.
        alpha: float32 ``[N]``, ``1 - beta1`` of each tensor.
        upper, lower: fractions in units of 1e-9.

    Returns:
        Bool mask ``[N]``, and a selection record that counts tensors.
    """
    key = risk_key(grad_norms, exp_avg_norms, alpha, rank_inactive)
    ranked = key < INACTIVE_KEY
    n = ranked.sum()
    risks = key.sort().values.clamp(max=INFINITY_KEY).to(torch.int32).view(torch.float32)

    def quantile(fraction: int) -> Tensor:
        last = (n - 1).clamp(min=0)
        product = fraction * (last % FRACTION_UNIT)  # as in rank_of, which drops the remainder
        index = fraction * (last // FRACTION_UNIT) + product // FRACTION_UNIT
        weight = (product % FRACTION_UNIT).double() / FRACTION_UNIT
        # take: an index in brackets would be read by the host. Products and sums one by one, in
        # float64: lerp is fused on some devices and not on others.
        low, high = risks.take(index), risks.take(torch.minimum(index + 1, last))
        between = (low.double() + weight * (high.double() - low.double())).float()
        between = torch.where(high.isinf(), high, between)  # that may have been inf - inf
        value = torch.where((weight == 0) | (low == high), low, between)
        return value.view(torch.int32).long()

    zero = torch.zeros((), dtype=torch.int64, device=key.device)
    fields = dict.fromkeys(range(Field.SIZE), zero)
    fields[Field.HIGH] = fields[Field.LOW] = zero - 1
    if len(key):
        nothing = n == 0
        fields[Field.HIGH] = torch.where(nothing, -1, quantile(upper))
        # From `tau_l <= r` to `tau_l < r`: the largest key below.
        fields[Field.LOW] = torch.where(nothing, -1, quantile(lower) - 1)
    fields[Field.RANKED] = n
    fields[Field.INACTIVE] = (key == INACTIVE_KEY).sum()
    fields[Field.NONFINITE] = (key == NONFINITE_KEY).sum()
    mask = is_selected(key, torch.stack([*fields.values()]))
    fields[Field.KEPT] = (mask & ranked).sum()
    return mask, torch.stack([*fields.values()])


@operator
def select_tensors_(
    mask: Tensor,
    sums: Tensor,
    exp_avg_sums: Tensor | None,
    hyper: Tensor,
    group: Tensor,
    clip: Tensor | None,
    upper: int,
    lower: int,
    rank_inactive: bool,
) -> Tensor:
    """:func:`select_tensors` from sums of squares, into a bool ``mask``.

    Args:
        sums: float64 ``[N]``, of gradients, as :func:`sums_of_squares` returns them. exp_avg_sums:
            likewise of first moments, or None for first order.

    Returns:
        The selection record.
    """
    alphas = torch.tensor(
        [1.0 - beta1 for beta1 in hyper[group, Hyper.BETA1].tolist()], dtype=torch.float32
    )
    return _select_tensors_(mask, sums, exp_avg_sums, alphas, clip, upper, lower, rank_inactive)


def _select_tensors_(
    mask: Tensor,
    sums: Tensor,
    exp_avg_sums: Tensor | None,
    alphas: Tensor,
    clip: Tensor | None,
    upper: int,
    lower: int,
    rank_inactive: bool,
) -> Tensor:
    moments = None if exp_avg_sums is None else norm_of(exp_avg_sums)
    found, record = select_tensors(norm_of(sums, clip), moments, alphas, upper, lower, rank_inactive)
    mask.copy_(found)
    return record
