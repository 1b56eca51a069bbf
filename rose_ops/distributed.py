"""One ranking over several processes: who takes part, what they add up, and what follows from it.

Every process has a part of the elements. What a ranking needs to know of them is one tensor of
integers, its *state*, and the sum of the parts' states is the state of the whole: thresholds, and with
them every mask, are the same whatever the parts are. Nothing is written before the last sum of a step
is there, so when a process dies, or hangs until the group's timeout, the others raise and are as they
were.

Sums of one step (:attr:`Ranks.sums` counts them), and their bytes, which do not depend on the number of
elements:

====================================  ====  =======================================================
a ranking, exact or bracket              2  512 KiB, and 256 KiB for each bound
a ranking, approx                        1  4 bytes for each element of the sample, at most 4 MiB
a ranking of whole tensors               1  8 bytes for each tensor and process
``max_grad_norm``                        1  the same, for both together
``GradScaler``                           1  8 bytes
====================================  ====  =======================================================
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
from rose_ops.settings import Settings
from rose_ops.shards import Shard, is_spread

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


class Ranks:
    """The processes that share one ranking.

    Args:
        group: of ``torch.distributed``.
        device: of the parameters.
        first: the rank, of all, that adds what is the same on several processes; None: nothing is, as
            parameters are plain tensors, and parts of a whole.
        is_uniform: whether every process has a part of the same parameters (DTensors on the whole
            group); else each has others, or parts whose places in the whole are not known.

    Attributes:
        rank, size: of this process in the group, and of the group.
        begin: where this process's parameters begin in the index space, where they are others than
            those of the processes before it; known after :meth:`agree`.
        steps: that were taken, by the process that has taken the most; likewise.
        sums, bytes: how many states were added up, and what they took.
    """

    _made: Counter[tuple[int, ...]] = Counter()

    def __init__(self, group: Any, device: torch.device, first: int | None, is_uniform: bool) -> None:
        self._group, self.device, self._first, self.is_uniform = group, device, first, is_uniform
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.begin = self.steps = 0
        self.sums = self.bytes = 0
        self._tag = 0
        # Optimizers of the same ranks are told apart by the order in which they were first used.
        members = tuple(dist.get_process_group_ranks(group))
        self._made[members] += 1
        self._number = self._made[members]

    def counts(self, param: Any) -> bool:
        """Whether it is this process that adds a parameter's elements to a state: the first of those
        that have the same part of it.

        A DTensor on a part of the largest mesh is taken to have copies on the rest of it, as with FSDP2
        and tensor parallelism together; a plain parameter beside DTensors to have one on every process.
        """
        if self._first is None:
            return True
        if not is_spread(param):
            return dist.get_rank() == self._first
        mesh = param.device_mesh.mesh
        return Shard.of(param).is_first and bool((mesh == self._first).any())

    def at(self, *place: object) -> None:
        """Say where in its training this process is: processes at different places do not add up."""
        self._tag = zlib.crc32(repr((self._number, *place)).encode()) & 0x7FFF

    def add_(self, state: Tensor) -> None:
        """Add up a state, in place.

        Raises:
            RuntimeError: the processes are at different places of their training (on a GPU this is not
                looked at, as it would wait for the device), or one did not come in time.
        """
        self.sums += 1
        self.bytes += state.nbytes
        if state.device.type != "cpu":
            dist.all_reduce(state, group=self._group)
            return
        # All tags are the same where the sum of their squares is that of equal ones.
        tags = torch.tensor([self._tag, self._tag**2], dtype=state.dtype, device="cpu")
        whole = torch.cat([state.reshape(-1), tags])
        dist.all_reduce(whole, group=self._group)
        one, two = (int(x) for x in whole[-2:])
        if (self.size * two - one * one) % 2**32:
            raise RuntimeError(
                "the processes that share a ranking are not at the same place: they have taken other "
                "numbers of steps, captures in another order, or have other hyperparameters in their "
                "groups; expected the same calls, in the same order, on every one; nothing was changed"
            )
        state.copy_(whole[:-2].view_as(state))

    def rows(self, own: Tensor) -> Tensor:
        """``[size, k]``: float64 ``[k]`` of every process, so that all add them in the same order."""
        state = torch.zeros(self.size, own.numel(), dtype=torch.float64, device=own.device)
        state[self.rank] = own
        self.add_(state)
        return state

    def any(self, flag: Tensor) -> Tensor:
        """Float32, like ``flag``: not 0 where it is so for any process."""
        state = (flag != 0).to(torch.int64).reshape(1)
        self.add_(state)
        return state.to(torch.float32).reshape(flag.shape)

    def agree(self, known: dict[str, Any], numel: int, steps: int | None, values: list[Any]) -> None:
        """Compare what has to be the same on every process, and learn what is not.

        Args:
            known: by name.
            numel: of this process's parameters.
            steps: that were taken; None where there is no state to have taken any.
            values: some of what is in the parameters.

        Raises:
            RuntimeError: something is not the same, with both values; on every process. Or parts of a
                whole are the same on all of them, and so are no parts.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (known, numel, steps, values), group=self._group)
        differences = [
            f"{name} is {other.get(name)!r} on rank {rank} and {found[0][0].get(name)!r} on rank 0"
            for rank, (other, *_) in enumerate(found)
            for name in sorted(found[0][0].keys() | other.keys())
            if other.get(name) != found[0][0].get(name)
        ]
        taken = {steps: rank for rank, (_, _, steps, _) in enumerate(found) if steps is not None}
        if len(taken) > 1:
            differences.append(f"steps taken are {sorted(taken)}")
        if differences:
            raise RuntimeError(
                "the processes that share a ranking were not made alike: "
                + "; ".join(differences[:5])
                + "; expected the same everywhere; nothing was changed"
            )
        all_values = [values for *_, values in found]
        if self._first is None and len({repr(x) for x in all_values}) == 1 and len(set(values)) > 2:
            raise RuntimeError(
                "process_group= says that every process has a part of the parameters, and all have the "
                "same ones, as replicas have (DistributedDataParallel); expected no process_group: "
                "replicas find the same masks by themselves"
            )
        self.steps = max(taken, default=0)
        self.begin = 0 if self.is_uniform else sum(numel for _, numel, *_ in found[: self.rank])

    def thresholds(
        self, count_keys: Callable[[Tensor | None], Tensor], upper: int, lower: int
    ) -> Tensor:
        """The record of a ranking over all processes (:class:`rose_ops.definitions.Field`).

        Radix select by two digits, of both bounds together; nothing is read back.

        Args:
            count_keys: :func:`rose_ops.portable.count_keys` of what this process adds, by digits.
            upper, lower: fractions in units of 1e-9.
        """
        state = count_keys(None)
        self.add_(state)
        leading, classes = state.split([HIGH_DIGITS, 2])
        ranked, upto = leading.sum(), leading.cumsum(0)
        k = _ranks_of((upper, lower), ranked)
        digit = torch.searchsorted(upto, k).clamp(max=HIGH_DIGITS - 1)
        before = upto[digit] - leading[digit]

        state = count_keys(digit)
        self.add_(state)
        upto = state.view(len(k), LOW_DIGITS).cumsum(1)
        low = torch.searchsorted(upto, (k - before)[:, None]).clamp(max=LOW_DIGITS - 1)
        found = torch.where(k > 0, digit * LOW_DIGITS + low[:, 0], -1)
        at_or_below = torch.where(k > 0, before + upto.gather(1, low)[:, 0], 0)
        return _record(found, at_or_below, ranked, *classes)

    @keeps_denormals
    def thresholds_of_sample(
        self,
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
        state = torch.zeros(len(sample), dtype=torch.int32, device=self.device)
        for part in parts:
            ends = torch.tensor([part.begin, part.begin + math.prod(part.shard.shape)], device="cpu")
            first, last = torch.searchsorted(sample, ends).tolist()
            if part.counts and first < last and part.grad.numel():
                at, here = part.shard.places(sample[first:last] - part.begin)
                here = here.to(self.device)
                g = scaled(part.grad.reshape(-1)[here], inv_scale, clip)
                m = None if part.exp_avg is None else part.exp_avg.reshape(-1)[here]
                found = risk_key(g, m, float32(part.alpha), bool(rank_inactive))
                unranked = torch.where(found == INACTIVE_KEY, -1, -2)
                found = torch.where(found < INACTIVE_KEY, found + 1, unranked)
                state[(first + at).to(self.device)] = found.to(torch.int32)
        self.add_(state)
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
) -> Tensor:
    """The record of a ranking over all processes.

    Args:
        ops: a backend's operators, which count what is here.
        batch: of what is ranked, what is here; it may be empty.
        exp_avgs: empty: first order.
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
        return ranks.thresholds_of_sample(
            parts, sizes, scaling.inv_scale, scaling.clip, ranking.numbers()
        )
    mine = batch.subset(counts)
    grads, exp_avgs = mine.grads, mine.state("exp_avg") if exp_avgs else []

    def count_keys(digits: Tensor | None) -> Tensor:
        if not grads:
            return torch.zeros(counted(digits), dtype=torch.int64, device=ranks.device)
        return ops.count_keys(
            grads, exp_avgs, hyper, mine.layout.group, scaling.inv_scale, scaling.clip,
            ranking.rank_inactive, digits,
        )  # fmt: skip

    return ranks.thresholds(count_keys, ranking.upper, ranking.lower)


# ------------------------------------------------------------------------------------------ who shares


def ranks_of(params: Sequence[Tensor], settings: Settings) -> Ranks | None:
    """The processes that share the ranking, and the clipping norm, of an optimizer's parameters; None:
    this one has all of them.

    They are those of ``process_group``; else those of the largest mesh of a DTensor.

    Raises:
        RuntimeError, ValueError: it is not clear who shares it.
    """
    spread = [p for p in params if is_spread(p)]
    if settings.local_ranking or not params or (settings.process_group is None and not spread):
        return None
    if settings.process_group is not None:
        if spread and len(spread) < len(params):
            raise ValueError(
                "process_group= is given, and some parameters are DTensors and others plain tensors, "
                "which may be copies or parts; expected DTensors only (distribute_tensor), or none"
            )
        if settings.granularity == "tensor":
            raise NotImplementedError(
                "granularity='tensor' with process_group=: from parts alone the norms of whole tensors "
                "cannot be told; expected DTensors (FSDP2, distribute_tensor), without process_group="
            )
        group = settings.process_group
        if dist.get_rank(group) < 0:
            raise ValueError("this process is not in process_group; expected a group that it is in")
        outside = {
            int(rank)
            for p in spread
            for rank in p.device_mesh.mesh.flatten()  # type: ignore[attr-defined]
        } - set(dist.get_process_group_ranks(group))
        if outside:
            raise ValueError(
                f"process_group has not the ranks {sorted(outside)}, which have parts of the "
                "parameters; expected a group of all of them"
            )
    else:
        group = _group_of([p.device_mesh for p in spread])  # type: ignore[attr-defined]
    first, members = None, set()
    if spread:
        largest = max((p.device_mesh for p in spread), key=lambda mesh: mesh.size())  # type: ignore[attr-defined]
        first, members = int(largest.mesh.min()), set(largest.mesh.flatten().tolist())
    is_uniform = members == set(dist.get_process_group_ranks(group))
    ranks = Ranks(group, params[0].device, first, is_uniform)
    return ranks if ranks.size > 1 else None


def _group_of(meshes: Sequence[Any]) -> Any:
    largest = max(meshes, key=lambda mesh: mesh.size())
    members = set(largest.mesh.flatten().tolist())
    for mesh in meshes:
        if not set(mesh.mesh.flatten().tolist()) <= members:
            raise ValueError(
                f"parameters are on {mesh} and on {largest}, neither of which has all the other's "
                "ranks; expected process_group=, a group of all ranks that have a part of them"
            )
    if len(members) < dist.get_world_size():
        raise RuntimeError(
            f"parameters are on {largest}, of {len(members)} of the {dist.get_world_size()} processes. "
            "If the others have more of the same model (pipeline stages), its ranking is over all: "
            "expected process_group=torch.distributed.group.WORLD. If they have none, or copies: "
            "process_group= with the ranks of the mesh"
        )
    return dist.group.WORLD
