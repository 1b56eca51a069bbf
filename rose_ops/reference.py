"""What ROSE computes, in plain PyTorch: the truth every other backend is compared with.

Source: *ROSE: Robust Selective Fine-tuning for Pre-trained Language Models* (Jiang et al., EMNLP
2022), equations 1-5 and Algorithm 1.

The functions have the signatures of the operators ``torch.ops.rose_ops.*``, so this module is also
``backend="reference"``. It favours clarity: it stores every risk, which the kernels never do.

Arguments shared by the functions below (N tensors in G parameter groups):

* ``grads``, ``params``, ...: lists of N tensors of equal shapes, one entry per parameter. The list is
  one flat index space, each tensor in row-major order.
* ``hyper``: float64 ``[G, 6]``, see :class:`~rose_ops.definitions.Hyper`. ``group``: int64
  ``[N]``, the row of each tensor.
* ``inv_scale``: float32 scalar that gradients are multiplied by first (1 / AMP loss scale), or None.
* ``clip``: float32 ``[2]`` that they are multiplied by next, or None; see :func:`clip_factors`.
* ``record``: int64 ``[8]``, what came out of a ranking, see :class:`~rose_ops.definitions.Field`.
* ``ranking``: what is asked of a ranking, five numbers: a :class:`Mode`; ``upper`` and ``lower``,
  fractions in units of 1e-9; ``rank_inactive``, whether elements without evidence are ranked; ``draw``,
  which sample is taken. (The CPU's operators take more, of a ranking that processes share; see
  :meth:`rose_ops.ranks.Ranks.one_pass`.)

Masks are bits, 8 elements per byte, lowest bit first; a bool mask of one element speaks for its
whole tensor, and an empty one selects all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rose_ops.definitions import (
    APPROX_FEWEST,
    INACTIVE_KEY,
    NONFINITE_KEY,
    Field,
    Hyper,
    Mode,
    alphas_of,
    float32,
    hash_u32,
    is_selected,
    operator,
    pack,
    rank_of,
    risk_key,
    sampled,
    scaled,
    unpack,
)
from rose_ops.portable import clip_factors, count_keys, select_tensors_

__all__ = ["clip_factors", "count_keys", "rank_", "select_tensors_", "step_", "sums_of_squares"]


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
    found = _select(keys, ranking) if record is None else record.clone()
    writes = bool(masks) or record is not None
    for mask, key in zip(masks, keys if writes else (), strict=True):
        mask.copy_(pack(is_selected(key, found)))
    return found


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
    if ranking and record is None:
        chosen = [i for i, row in enumerate(group.tolist()) if hyper[row, Hyper.SELECTIVE] != 0]
        pairs = [grads[i] for i in chosen], [exp_avgs[i] for i in chosen]
        keys = _keys(*pairs, hyper, group[chosen], inv_scale, clip, rank_inactive)
        record = _select(keys, ranking)
    for i, (p, grad, m, v, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        row = int(group[i])
        coefficients = hyper[row].tolist()
        step.copy_(next_step(step))
        t = step.item()
        alpha = float32(1.0 - coefficients[Hyper.BETA1])
        is_selective = bool(coefficients[Hyper.SELECTIVE])
        g = coefficients[Hyper.SIGN] * scaled(grad, inv_scale, clip, is_selective)
        weight = _Weight(torch.ones(g.shape).double(), torch.zeros(g.shape).double())
        if is_selective:
            first, second = first_masks[i : i + 1], second_masks[i : i + 1]
            alpha = float32(1.0 - coefficients[Hyper.BETA1])
            found = (
                None if record is None else is_selected(risk_key(g, m, alpha, rank_inactive), record)
            )
            weight, finite = _weight_of(g, m, first, second, found, gamma)
            counts[1] += (~finite).sum()
        counts[0] += (weight.m > 0).sum()
        p1, m1, v1 = _adamw(p, g, m, v, t, weight, lr[row].double(), coefficients, dtype)
        index = torch.arange(g.numel()).view(g.shape) + int(offsets[i])
        if v.dtype == torch.bfloat16 and dtype == torch.float32:
            v1 = round_stochastic_bf16(v1, rounding_bits(index, seed, step_word(t), parameter=False))
        if p.dtype == torch.bfloat16 and dtype == torch.float32 and stochastic:
            p1 = round_stochastic_bf16(p1, rounding_bits(index, seed, step_word(t), parameter=True))
        p.copy_(p1)
        m.copy_(m1)
        v.copy_(v1)
    return torch.cat([_empty_record() if record is None else record, counts])


@operator
def sums_of_squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """Squared Frobenius norm of each tensor: float64 ``[N]``."""
    sums = [scaled(t, inv_scale).double().square().sum() for t in tensors]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.float64)


def _set_bracket_width(width: float) -> float:
    """For tests of other backends. Here there are no brackets."""
    return width


# ------------------------------------------------------------------------------- ranking


def _keys(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hyper: Tensor,
    group: Tensor,
    inv_scale: Tensor | None,
    clip: Tensor | None,
    rank_inactive: bool,
) -> list[Tensor]:
    moments: list[Tensor | None] = [*exp_avgs] or [None] * len(grads)
    return [
        risk_key(scaled(g, inv_scale, clip), m, alpha, rank_inactive).reshape(-1)
        for g, m, alpha in zip(grads, moments, alphas_of(hyper, group), strict=True)
    ]


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


# ------------------------------------------------------------------------------ updating


class _Weight(NamedTuple):
    """M of each element, and its complement."""

    m: Tensor
    complement: Tensor


def _weight_of(
    g: Tensor, m: Tensor, first: list[Tensor], second: list[Tensor], found: Tensor | None, gamma: float
) -> tuple[_Weight, Tensor]:
    """The mask M of a tensor (Eq. 5 if there are two: gamma*M_first + (1 - gamma)*M_second), and where
    its gradient and first moment are finite.

    Args:
        first, second: its captured masks, one or none each.
        found: the second-order mask, if it was found on the way.
    """
    masks = [None if not some else unpack(some[0], g.numel()).view(g.shape) for some in (first, second)]
    if found is not None:
        masks[1] = found
    one, *other = [mask for mask in masks if mask is not None]
    if other:
        both, neither = one & other[0], ~one & ~other[0]
        ours, rest = torch.tensor([gamma, 1.0 - gamma], dtype=torch.float64)
        weight = torch.where(one, ours, rest).masked_fill(both, 1.0).masked_fill(neither, 0.0)
        complement = torch.where(one, rest, ours).masked_fill(both, 0.0).masked_fill(neither, 1.0)
    else:
        weight, complement = one.double(), 1.0 - one.double()
    captured = first + second
    if found is None and all(x.dtype == torch.bool and x.numel() == 1 and not x for x in captured):
        finite = torch.ones(g.shape, dtype=torch.bool)  # they rule out the whole tensor
    else:
        finite = g.isfinite() & m.isfinite()
    return _Weight(weight.masked_fill(~finite, 0.0), complement), finite


def _adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    weight: _Weight,
    lr: Tensor,
    coefficients: list[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """p, m and v after step ``t``, evaluated in ``dtype``; see :func:`step_`."""

    def constant(x: float) -> float:
        return float32(x) if dtype == torch.float32 else x

    beta1, beta2, eps, weight_decay, *_ = coefficients
    p, g, m, v = p.to(dtype), g.to(dtype), m.to(dtype), v.to(dtype)
    on, off = weight.m == 1, weight.m == 0
    blend = weight.m.to(dtype) * g + weight.complement.to(dtype) * m
    g = torch.where(on, g, torch.where(off, m, blend))
    m1 = torch.where(off, m, constant(beta1) * m + constant(1.0 - beta1) * g)
    v1 = constant(beta2) * v + constant(1.0 - beta2) * (g * g)
    denom = v1.sqrt() / (1.0 - beta2**t) ** 0.5 + eps
    step_size = (lr * weight.m / (1.0 - beta1**t)).to(dtype)
    decay = (1.0 - lr * weight.m * weight_decay).to(dtype)
    return torch.where(off, p, p * decay - step_size * (m1 / denom)), m1, v1


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
