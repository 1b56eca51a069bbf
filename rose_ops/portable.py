"""Operators that are PyTorch's own kernels, on any device: what is small, and what is rare.

They read nothing back, so that a GPU need not be waited for, and hold no temporary as large as the
parameters. :mod:`rose_ops.reference` and Triton's backend take theirs from here, CUDA
:func:`count_keys`; the arguments that operators share are explained in :mod:`rose_ops.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rose_ops.definitions import (
    FRACTION_UNIT,
    HIGH_DIGITS,
    INACTIVE_KEY,
    INFINITY_KEY,
    LOW_DIGITS,
    NONFINITE_KEY,
    Field,
    alphas_of,
    is_selected,
    operator,
    risk_key,
    scaled,
)

CHUNK = 1 << 20  # elements that count_keys looks at together


@operator
def norm_of(sums: Tensor, clip: Tensor | None = None) -> Tensor:
    """Norms from sums of squares, rounded once: float32; of selective tensors, clipped."""
    norms = sums.sqrt().float()
    return norms if clip is None else norms * clip[0]


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

    Args:
        digits: int64 ``[k]``, or None.

    Returns:
        int64. Without ``digits``, ``[65538]``: how many ranked elements have each value of the upper 16
        bits of their keys' 31, how many are inactive, and how many are not finite. With them,
        ``[k * 32768]``: of the ranked elements with each of these upper digits, how many have each
        value of the lower 15 bits.
    """

    def keys() -> Iterator[Tensor]:
        """Of all elements, so many at a time."""
        moments: list[Tensor | None] = [*exp_avgs] or [None] * len(grads)
        for grad, moment, alpha in zip(grads, moments, alphas_of(hyper, group), strict=True):
            g, m = grad.reshape(-1), None if moment is None else moment.reshape(-1)
            for begin in range(0, g.numel(), CHUNK):
                part = slice(begin, begin + CHUNK)
                of_m = None if m is None else m[part]
                yield risk_key(scaled(g[part], inv_scale, clip), of_m, alpha, rank_inactive)

    device = hyper.device if not grads else grads[0].device
    if digits is None:
        counts = torch.zeros(counted(None), dtype=torch.int64, device=device)
        for key in keys():
            unranked = HIGH_DIGITS + (key == NONFINITE_KEY).long()
            at = torch.where(key < INACTIVE_KEY, key >> 15, unranked)
            counts.scatter_add_(0, at, torch.ones_like(at))
        return counts
    # The last column takes what has other digits.
    counts = torch.zeros(digits.numel(), LOW_DIGITS + 1, dtype=torch.int64, device=device)
    for key in keys():
        for row, high in zip(counts, digits, strict=True):
            inside = (key < INACTIVE_KEY) & (key >> 15 == high)
            at = torch.where(inside, key & (LOW_DIGITS - 1), LOW_DIGITS)
            row.scatter_add_(0, at, torch.ones_like(at))
    return counts[:, :-1].flatten()


@operator
def select_tensors(
    grad_norms: Tensor,
    exp_avg_norms: Tensor | None,
    alpha: Tensor,
    upper: int,
    lower: int,
    rank_inactive: bool,
) -> tuple[Tensor, Tensor]:
    """Selection of whole tensors by their norms (the authors' granularity).

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
    zero = torch.zeros((), dtype=torch.int64, device=key.device)
    fields = dict.fromkeys(range(Field.SIZE), zero)
    fields[Field.HIGH] = fields[Field.LOW] = zero - 1
    if len(key):
        nothing = n == 0
        fields[Field.HIGH] = torch.where(nothing, -1, _quantile_key(risks, n, upper))
        # From `tau_l <= r` to `tau_l < r`: the largest key below.
        fields[Field.LOW] = torch.where(nothing, -1, _quantile_key(risks, n, lower) - 1)
    fields[Field.RANKED] = n
    fields[Field.INACTIVE] = (key == INACTIVE_KEY).sum()
    fields[Field.NONFINITE] = (key == NONFINITE_KEY).sum()
    mask = is_selected(key, torch.stack([*fields.values()]))
    fields[Field.KEPT] = (mask & ranked).sum()
    return mask, torch.stack([*fields.values()])


def _quantile_key(risks: Tensor, n: Tensor, fraction: int) -> Tensor:
    """Of the first ``n`` of sorted float32 risks, the key of a quantile, interpolated linearly."""
    last = (n - 1).clamp(min=0)
    product = fraction * (last % FRACTION_UNIT)  # as in rank_of, which drops the remainder
    index = fraction * (last // FRACTION_UNIT) + product // FRACTION_UNIT
    weight = (product % FRACTION_UNIT).double() / FRACTION_UNIT
    # take: an index in brackets would be read by the host. Products and sums one by one, in float64:
    # lerp is fused on some devices and not on others.
    low, high = risks.take(index), risks.take(torch.minimum(index + 1, last))
    between = (low.double() + weight * (high.double() - low.double())).float()
    between = torch.where(high.isinf(), high, between)  # that may have been inf - inf
    value = torch.where((weight == 0) | (low == high), low, between)
    return value.view(torch.int32).long()


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
        sums: float64 ``[N]``, of gradients, as the operator ``sums_of_squares`` returns them.
            exp_avg_sums: likewise of first moments, or None for first order.

    Returns:
        The selection record.
    """
    alphas = torch.tensor(alphas_of(hyper, group), dtype=torch.float32)
    return select_by_sums_(mask, sums, exp_avg_sums, alphas, clip, upper, lower, rank_inactive)


def select_by_sums_(
    mask: Tensor,
    sums: Tensor,
    exp_avg_sums: Tensor | None,
    alphas: Tensor,
    clip: Tensor | None,
    upper: int,
    lower: int,
    rank_inactive: bool,
) -> Tensor:
    """:func:`select_tensors_` with ``1 - beta1`` of each tensor, float32, on the device."""
    moments = None if exp_avg_sums is None else norm_of(exp_avg_sums)
    found, record = select_tensors(norm_of(sums, clip), moments, alphas, upper, lower, rank_inactive)
    mask.copy_(found)
    return record
