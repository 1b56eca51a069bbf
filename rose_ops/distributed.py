"""One ranking over several processes: what they add up, and what follows from it.

Every process has a part of the elements. What a ranking needs to know of them is one tensor of
integers, its *state*, and the sum of the parts' states is the state of the whole: thresholds, and with
them every mask, are the same whatever the parts are.

Sums of one step (:attr:`rose_ops.ranks.Ranks.sums` counts them), and their bytes, which do not depend
on the number of elements:

====================================  ====  =======================================================
a ranking, exact or bracket, on CPUs     3  at most 100 KiB for each bound
the same on GPUs                         2  512 KiB, and 256 KiB for each bound
a ranking, approx                        1  4 bytes for each element of the sample, at most 4 MiB
a ranking of whole tensors               1  8 bytes for each tensor and process
``max_grad_norm``                        1  the same, for both together
``GradScaler``                           1  8 bytes
====================================  ====  =======================================================

The three, in one pass over the data (csrc/cpu/pass.cpp): of samples, around the threshold of the step
before; of what lies below and inside of a bracket, when all elements are seen; of the keys near the
threshold. Where the sample is not enough (there was no threshold; it is more than an octave away; too
many elements are around it), the two of GPUs follow in the place of the other two. Of less than 2^20
elements, there are only these.

When a process dies, or hangs until the group's timeout, the others raise. Until the sum of a bracket's
samples, or the last one of any other kind of ranking, nothing is changed. After it, the elements of a
bracket are all treated, by an estimate of the threshold: a whole step, that is not exactly theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rose_ops.batch import Batch
from rose_ops.checks import is_recording
from rose_ops.definitions import (
    APPROX_FEWEST,
    HIGH_DIGITS,
    INACTIVE_KEY,
    LOW_DIGITS,
    Field,
    Hyper,
    float32,
    keeps_denormals,
    rank_of,
    risk_key,
    sampled,
    scaled,
)
from rose_ops.operands import Ranking, Scaling
from rose_ops.portable import counted
from rose_ops.ranks import Ranks
from rose_ops.shards import Shard

_UNRANKED = torch.iinfo(torch.int32).max  # in a sample: larger than the key of any risk


class Part(NamedTuple):
    """What this process knows of one ranked tensor.

    Attributes:
        grad, exp_avg: what is here of them; of first order, without ``exp_avg``.
        alpha: ``1 - beta1``.
        shard: where it lies in the whole.
        begin: where the whole begins in the index space of the ranking.
        counts: whether it is this process that adds it to the state, where others have the same part.
    """

    grad: Tensor
    exp_avg: Tensor | None
    alpha: float
    shard: Shard
    begin: int
    counts: bool


def _thresholds(
    ranks: Ranks, count_keys: Callable[[Tensor | None], Tensor], upper: int, lower: int
) -> Tensor:
    """The record of a ranking over all processes (:class:`rose_ops.definitions.Field`).

    Radix select by two digits, of both bounds together; nothing is read back.

    Args:
        count_keys: :func:`rose_ops.portable.count_keys` of what this process adds, by digits.
        upper, lower: fractions in units of 1e-9.
    """
    state = count_keys(None)
    ranks.add_(state)
    leading, classes = state.split([HIGH_DIGITS, 2])
    ranked, upto = leading.sum(), leading.cumsum(0)
    k = _ranks_of((upper, lower), ranked)
    digit = torch.searchsorted(upto, k).clamp(max=HIGH_DIGITS - 1)
    before = upto[digit] - leading[digit]

    state = count_keys(digit)
    ranks.add_(state)
    upto = state.view(len(k), LOW_DIGITS).cumsum(1)
    low = torch.searchsorted(upto, (k - before)[:, None]).clamp(max=LOW_DIGITS - 1)
    found = torch.where(k > 0, digit * LOW_DIGITS + low[:, 0], -1)
    at_or_below = torch.where(k > 0, before + upto.gather(1, low)[:, 0], 0)
    return _record(found, at_or_below, ranked, *classes)


@keeps_denormals
def _thresholds_of_sample(
    ranks: Ranks,
    parts: Sequence[Part],
    sizes: Sequence[int],
    inv_scale: Tensor | None,
    clip: Tensor | None,
    ranking: Sequence[int],
) -> Tensor:
    """The record of a ranking by ``Mode.APPROX`` over all processes, whose counts are those of the
    sample.

    Args:
        parts: of the ranked tensors, what is here.
        sizes: of the wholes that make up the index space, the same on every process.
        inv_scale, clip, ranking: as operators have them; see :mod:`rose_ops.reference`.
    """
    _, upper, lower, rank_inactive, draw = ranking
    with torch.device("cpu"):
        sample = sampled(sizes, draw)
    # A key and 1, so that 0 is nothing: elements that have no gradient.
    state = torch.zeros(len(sample), dtype=torch.int32, device=ranks.device)
    for part in parts:
        ends = torch.tensor([part.begin, part.begin + math.prod(part.shard.shape)], device="cpu")
        first, last = torch.searchsorted(sample, ends).tolist()
        if part.counts and first < last and part.grad.numel():
            at, here = part.shard.places(sample[first:last] - part.begin)
            here = here.to(ranks.device)
            g = scaled(part.grad.reshape(-1)[here], inv_scale, clip)
            m = None if part.exp_avg is None else part.exp_avg.reshape(-1)[here]
            found = risk_key(g, m, float32(part.alpha), bool(rank_inactive))
            unranked = torch.where(found == INACTIVE_KEY, -1, -2)
            found = torch.where(found < INACTIVE_KEY, found + 1, unranked)
            state[(first + at).to(ranks.device)] = found.to(torch.int32)
    ranks.add_(state)
    ranked = (state > 0).sum()
    values = torch.where(state > 0, state - 1, _UNRANKED).sort().values
    k = _ranks_of((upper, lower), ranked)
    found = torch.where(k > 0, values[(k - 1).clamp(min=0)].long(), -1)
    at_or_below = torch.searchsorted(values, found.to(torch.int32), right=True)
    return _record(found, at_or_below, ranked, (state == -1).sum(), (state == -2).sum())


def _ranks_of(fractions: tuple[int, int], n: Tensor) -> Tensor:
    """:func:`rose_ops.definitions.rank_of` of a number on the device; of no lower bound, none."""
    return torch.stack([rank_of(fraction, n) for fraction in fractions if fraction])  # type: ignore[misc, arg-type]


def _record(
    keys: Tensor, at_or_below: Tensor, ranked: Tensor, inactive: Tensor, nonfinite: Tensor
) -> Tensor:
    """Of the upper bound, and of the lower one, if there is one."""
    record = torch.zeros(Field.SIZE, dtype=torch.int64, device=keys.device)
    record[Field.HIGH] = keys[0]
    record[Field.LOW] = keys[1] if len(keys) > 1 else -1
    below = at_or_below[1] if len(keys) > 1 else 0
    record[Field.KEPT] = (at_or_below[0] - below).clamp(min=0)
    record[Field.RANKED], record[Field.INACTIVE], record[Field.NONFINITE] = ranked, inactive, nonfinite
    return record


def record_of(
    ranks: Ranks,
    ops: Any,
    batch: Batch,
    exp_avgs: list[Tensor],
    hyper: Tensor,
    scaling: Scaling,
    ranking: Ranking,
    adds_up: str | None = None,
) -> Tensor:
    """The record of a ranking over all processes.

    Args:
        ops: a backend's operators, which count what is here.
        batch: of what is ranked, what is here; it may be empty.
        exp_avgs: empty: first order.
        adds_up: the kind of an exact ranking, if the operators add up on their way through the data.
    """
    layout, counts = batch.layout, [ranks.counts(p) for p in batch.params]
    shards = layout.shards or list(map(Shard.of, batch.parts))
    sizes = [math.prod(shard.shape) for shard in shards]
    # Elsewhere it is not known which elements one process would have in its sample: all are counted.
    if ranking.selection == "approx" and ranks.is_uniform and sum(sizes) >= APPROX_FEWEST:
        if is_recording(ranks.device):
            raise RuntimeError(
                "selection='approx' over several processes cannot be recorded in a CUDA graph, as it "
                "takes another sample in every step; expected 'bracket' or 'exact'"
            )
        alphas = (1.0 - hyper[:, Hyper.BETA1]).tolist()
        moments: list[Tensor | None] = [*exp_avgs] or [None] * len(counts)
        begins = accumulate(sizes, initial=0)
        parts = [
            Part(grad, moment, alphas[row], shard, begin, is_mine)
            for grad, moment, row, shard, begin, is_mine in zip(
                batch.grads, moments, layout.rows, shards, begins, counts, strict=False
            )
        ]
        return _thresholds_of_sample(
            ranks, parts, sizes, scaling.inv_scale, scaling.clip, ranking.numbers()
        )
    mine = batch.subset(counts)
    grads, exp_avgs = mine.grads, mine.state("exp_avg") if exp_avgs else []

    if adds_up is not None and ranking.selection == "exact":
        on_the_way = ranks.one_pass(adds_up, ranking, mine.params)
        if on_the_way is not None:
            with ranks.raising():
                record = ops.rank_(
                    [], grads, exp_avgs, hyper, mine.layout.group, scaling.inv_scale, scaling.clip,
                    None, on_the_way.numbers(),
                )  # fmt: skip
            if record[Field.MISSES] == 0:
                return record

    def count_keys(digits: Tensor | None) -> Tensor:
        if not grads:
            return torch.zeros(counted(digits), dtype=torch.int64, device=ranks.device)
        return ops.count_keys(
            grads, exp_avgs, hyper, mine.layout.group, scaling.inv_scale, scaling.clip,
            ranking.rank_inactive, digits,
        )  # fmt: skip

    return _thresholds(ranks, count_keys, ranking.upper, ranking.lower)
