"""The operators as Triton kernels: no nvcc is needed, and any vendor's GPU will do.

Signatures and results are those of :mod:`rose_ops.reference`. With ``TRITON_INTERPRET=1`` in the
environment (before this is imported) the kernels are interpreted, on CPU tensors, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from rose_ops import portable
from rose_ops._arguments import reads_pointers
from rose_ops.backends.triton import passes
from rose_ops.backends.triton.arguments import Factors, Ranking, Update, check_fractions
from rose_ops.backends.triton.launch import INTERPRETED
from rose_ops.backends.triton.table import check, check_groups, check_rows, device_of, upload
from rose_ops.definitions import Field, Hyper, Mode, keeps_denormals
from rose_ops.portable import count_keys

__all__ = ["clip_factors", "count_keys", "rank_", "select_tensors_", "step_", "sums_of_squares"]


def why_not() -> str | None:
    """Why these kernels cannot be used with this Triton and these GPUs, or None."""
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    if release < (3, 6):
        return (
            f"Triton {triton.__version__} is not tested; install 3.6 or later (PyTorch 2.10 brings it)"
        )
    if release < (3, 7) and not INTERPRETED and torch.version.cuda is not None:
        for i in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(i) >= (10, 0):
                return (
                    "Triton 3.6 rounds a product and a sum only once on Blackwell GPUs, against its "
                    "options; install 3.7 or later (PyTorch 2.12 brings it)"
                )
    return None


@reads_pointers("masks")
@keeps_denormals
def rank_(
    masks: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor,
    inv_scale: Tensor | None, clip: Tensor | None, record: Tensor | None, ranking: Sequence[int],
) -> Tensor:  # fmt: skip
    """See :func:`rose_ops.reference.rank_`."""
    wanted = Ranking.of(ranking, record)
    assert wanted is not None
    factors = Factors(inv_scale, clip, wanted.rank_inactive, device_of(grads))
    tensors = (grads, exp_avgs, hyper, group, factors, wanted)
    if not masks and wanted.mode != Mode.GIVEN:
        return passes.select(*tensors)
    return passes.capture(masks, *tensors, record)


@reads_pointers("params", "exp_avgs", "exp_avg_sqs", "steps")
@keeps_denormals
def step_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], first_masks: list[Tensor], second_masks: list[Tensor], record: Tensor | None,
    lr: Tensor, hyper: Tensor, group: Tensor, offsets: Tensor, inv_scale: Tensor | None,
    clip: Tensor | None, found_inf: Tensor | None, gamma: float, ranking: Sequence[int],
    rounding: Sequence[int],
) -> Tensor:  # fmt: skip
    """See :func:`rose_ops.reference.step_`."""
    wanted = Ranking.of(ranking, record, may_be_empty=True)
    if record is not None:
        check("record", record, torch.int64, Field.SIZE, device_of(params))
    if len(rounding) != 2:
        raise RuntimeError(f"rounding has {len(rounding)} numbers; expected seed and stochastic")
    seed, stochastic = rounding
    u = Update(
        params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, second_masks, lr, hyper, group,
        offsets, inv_scale, clip, found_inf, gamma, wanted, seed, bool(stochastic),
    )  # fmt: skip
    if wanted is None or wanted.mode == Mode.GIVEN:
        return passes.update(u, record)
    return passes.ranked_update(u, wanted, grads, exp_avgs, hyper, group)


@reads_pointers()
@keeps_denormals
def sums_of_squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """See :func:`rose_ops.reference.sums_of_squares`."""
    return passes.squares(tensors, inv_scale)


@reads_pointers()
def clip_factors(sums: Tensor, max_norm: float) -> Tensor:
    """See :func:`rose_ops.reference.clip_factors`."""
    check("sums", sums, torch.float64, sums.numel(), sums.device)
    return portable.clip_factors(sums, max_norm)


@reads_pointers("mask")
def select_tensors_(
    mask: Tensor, sums: Tensor, exp_avg_sums: Tensor | None, hyper: Tensor, group: Tensor,
    clip: Tensor | None, upper: int, lower: int, rank_inactive: bool,
) -> Tensor:  # fmt: skip
    """See :func:`rose_ops.reference.select_tensors_`. PyTorch's kernels: there are few tensors."""
    check_fractions(upper, lower)
    count, device = mask.numel(), mask.device
    check("mask", mask, torch.bool, count, device)
    check("sums", sums, torch.float64, count, device)
    if exp_avg_sums is not None:
        check("exp_avg_sums", exp_avg_sums, torch.float64, count, device)
    if clip is not None:
        check("clip", clip, torch.float32, 2, device)
    check_groups(hyper, group, count)
    check_rows(hyper, group.tolist())
    alphas = upload(1.0 - hyper.reshape(-1, len(Hyper))[group, Hyper.BETA1], device).float()
    return portable.select_by_sums_(mask, sums, exp_avg_sums, alphas, clip, upper, lower, rank_inactive)


def _set_bracket_width(width: float) -> float:
    """See :func:`rose_ops._ops.bracket_width`."""
    before, passes.bracket_width = passes.bracket_width, width
    return before
