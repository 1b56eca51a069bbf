"""ROSE without an optimizer: thresholds, masks and the masked update on lists of tensors.

Formulas, classes of elements and mask formats are those of :mod:`rose_ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rose_ops import backends, engine
from rose_ops.checks import check_together
from rose_ops.groups import check_group
from rose_ops.layout import empty_masks
from rose_ops.operands import Operands, Ranking, Rounding, Scaling, Tables
from rose_ops.results import Selection, UpdateCounts
from rose_ops.settings import (
    GRANULARITIES,
    INACTIVE,
    ROUNDINGS,
    SELECTIONS,
    check_count,
    check_fractions,
    check_gamma,
    choice,
    is_number,
    shown,
)


def _tables(tensors: Sequence[Tensor], *columns: float, lr: float | Tensor = 0.0) -> Tables:
    """All tensors in one group. On the CPU, whatever torch.set_default_device() says."""
    hyper = torch.tensor([columns], dtype=torch.float64, device="cpu")
    sizes = torch.tensor([t.numel() for t in tensors], dtype=torch.int64, device="cpu")
    if isinstance(lr, Tensor):
        rate = lr.detach().to(torch.float64).reshape(1)
    else:
        rate = torch.tensor([lr], dtype=torch.float64, device="cpu")
    return Tables(hyper, torch.zeros_like(sizes), rate, sizes.cumsum(0) - sizes)


def _ranking(upper: float, lower: float, inactive: str, selection: str, seed: int) -> Ranking:
    choice("inactive", inactive, INACTIVE)
    choice("selection", selection, SELECTIONS)
    fractions = check_fractions(upper, lower)
    return Ranking(*fractions, inactive == "rank", selection, check_count("seed", seed, below=2**32))


def _check_ranked(grads: Sequence[Tensor], exp_avgs: Sequence[Tensor] | None, beta1: object) -> None:
    if not is_number(beta1) or not 0 <= beta1 < 1:
        raise ValueError(f"beta1={shown(beta1)}; expected a number in [0, 1)")
    # An empty list would be first order.
    if exp_avgs is not None and len(exp_avgs) != len(grads):
        raise ValueError(
            f"{len(grads)} gradients and {len(exp_avgs)} first moments; expected as many, or None for "
            "first order"
        )


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _detached(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    return [t.detach() for t in tensors or ()]


def select_threshold(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None = None,
    *,
    upper: float = 0.6,
    lower: float = 0.0,
    beta1: float = 0.9,
    inactive: str = "update",
    selection: str = "exact",
    seed: int = 0,
    inv_scale: Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """Threshold of the robust elements over all tensors at once (Eq. 2-4).

    Args:
        grads: N gradients (float32, bfloat16 or float16, any strides). First order: of the KL loss.
        exp_avgs: N first moments before the step, for second order; None for first order.
        upper, lower: fractions of the ranking, ``0 <= lower < upper <= 1``, at most 9 decimals.
        beta1: for second order; its scaling is ``1 - beta1``.
        inactive: ``"update"`` or ``"rank"``, see :class:`rose_ops.RoseFusedAdamW`.
        selection: ``"exact"``, ``"bracket"`` (the same: there is nothing to do on the way) or
            ``"approx"``, likewise.
        seed: of the sample that ``"approx"`` takes.
        inv_scale: float32 scalar that gradients are multiplied by first.
        backend: see :class:`rose_ops.RoseFusedAdamW`.

    Raises:
        ValueError: a setting out of its range, or as many moments as gradients are not there.
            RuntimeError: tensors that do not fit together.
    """
    ranking = _ranking(upper, lower, inactive, selection, seed)
    _check_ranked(grads, exp_avgs, beta1)
    ops = backends.resolve(backend, _device(grads)).ops
    tables = _tables(grads, beta1, 0.0, 0.0, 0.0, 1.0, 1.0)
    record = engine.rank(
        ops, _detached(grads), _detached(exp_avgs), tables, Scaling(inv_scale), ranking
    )
    return Selection.from_record(record)


def capture_mask(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None = None,
    *,
    upper: float = 0.6,
    lower: float = 0.0,
    beta1: float = 0.9,
    inactive: str = "update",
    selection: str = "exact",
    granularity: str = "element",
    seed: int = 0,
    inv_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[list[Tensor], Selection]:
    """Mask of the robust elements, and the selection behind it.

    Arguments are those of :func:`select_threshold`; ``selection="bracket"`` and ``"approx"`` take one
    pass over the tensors. At ``granularity="tensor"`` whole tensors are ranked, by their Frobenius
    norms (``selection`` does not matter there).

    Returns:
        For each tensor, uint8 ``[ceil(n / 8)]``: element i, counted row-major, is bit ``i % 8`` of
        byte ``i // 8``; at granularity ``"tensor"`` a bool scalar.
    """
    choice("granularity", granularity, GRANULARITIES)
    ranking = _ranking(upper, lower, inactive, selection, seed)
    _check_ranked(grads, exp_avgs, beta1)
    device = _device(grads)
    ops = backends.resolve(backend, device).ops
    tensors = (_detached(grads), _detached(exp_avgs))
    tables = _tables(grads, beta1, 0.0, 0.0, 0.0, 1.0, 1.0)
    if granularity == "tensor":
        mask = torch.empty(len(grads), dtype=torch.bool, device=device)
        sums = engine.sums_of(ops, mask, *tensors, Scaling(inv_scale))
        record = engine.rank_tensors(ops, mask, sums, tables, None, ranking)
        return list(mask.unbind()), Selection.from_record(record)
    masks = empty_masks([g.numel() for g in grads], device)
    record = engine.rank(ops, *tensors, tables, Scaling(inv_scale), ranking, masks)
    return masks, Selection.from_record(record)


def rose_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    first_masks: Sequence[Tensor] | None = None,
    second_masks: Sequence[Tensor] | None = None,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    gamma: float = 0.5,
    maximize: bool = False,
    inv_scale: Tensor | None = None,
    seed: int = 0,
    param_rounding: str = "nearest",
    backend: str = "auto",
) -> UpdateCounts:
    """One step of AdamW under captured masks, in place (Algorithm 1, lines 8-13).

    ``M = gamma*M_first + (1 - gamma)*M_second`` if both masks are given, the one given otherwise,
    and 1 (plain AdamW) without any. The update is that of :func:`rose_ops.reference.step_`.

    Args:
        params, grads: N tensors each (float32, bfloat16 or float16).
        exp_avgs, exp_avg_sqs: N moments each, float32 or bfloat16 (then ``exp_avg_sqs`` are rounded
            stochastically, keyed on ``seed``, the step and the element).
        steps: N float32 scalars, incremented by one.
        first_masks, second_masks: from :func:`capture_mask`.
        param_rounding: ``"nearest"`` or ``"stochastic"`` (of bfloat16 parameters).

    Raises:
        ValueError: a setting out of its range, or parameters that share memory. RuntimeError: tensors
            or masks that do not fit together. Nothing was changed.
    """
    choice("param_rounding", param_rounding, ROUNDINGS)
    check_gamma(gamma)
    check_count("seed", seed, below=2**32)
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    check_group({**options, "capturable": False}, is_new=not isinstance(lr, Tensor))
    if len(set(map(id, params))) < len(params):
        raise ValueError("params has a tensor more than once; expected each once")
    check_together(params)
    selective = first_masks is not None or second_masks is not None
    tables = _tables(
        params, *betas, eps, weight_decay, -1.0 if maximize else 1.0, float(selective), lr=lr
    )
    operands = Operands(
        _detached(params), _detached(grads), list(exp_avgs), list(exp_avg_sqs), list(steps)
    )
    ops = backends.resolve(backend, _device(params)).ops
    with torch.no_grad():
        _, counts = engine.update(
            ops, operands, (list(first_masks or ()), list(second_masks or ())), tables,
            Scaling(inv_scale), gamma, None, Rounding(seed, param_rounding == "stochastic"),
        )  # fmt: skip
        # As after any in-place operation: a backward that still needs the old values is an error.
        torch.autograd.graph.increment_version(params)
    return UpdateCounts(*counts.unbind())


__all__ = [
    "Selection",
    "UpdateCounts",
    "capture_mask",
    "rose_adamw_",
    "select_threshold",
]
