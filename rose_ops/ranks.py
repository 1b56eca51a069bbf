"""The processes that share one ranking: who they are, and what they say to each other."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from rose_ops.operands import Ranking
from rose_ops.settings import Settings
from rose_ops.shards import Shard, is_spread

_handles = count()


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
        numel: elements of all processes' parameters; known after :meth:`agree`.
        sums, bytes: how many states were added up, and what they took.
        latest: keys of the upper and of the lower threshold of the latest ranking of each kind; -1
            where there was none. The next ones are likely to be near.
    """

    fewest = 1 << 20  # elements: of fewer, a sample would be too large a part
    _made: Counter[tuple[int, ...]] = Counter()
    _by_handle: WeakValueDictionary[int, Ranks] = WeakValueDictionary()

    def __init__(self, group: Any, device: torch.device, first: int | None, is_uniform: bool) -> None:
        self._group, self.device, self._first, self.is_uniform = group, device, first, is_uniform
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.begin = self.steps = self.numel = 0
        self.sums = self.bytes = 0
        self.latest: dict[str, list[int]] = {}
        self._failure: BaseException | None = None
        self._handle = next(_handles)
        self._by_handle[self._handle] = self
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
        self.numel = numel if self.is_uniform else sum(numel for _, numel, *_ in found)
        self.begin = 0 if self.is_uniform else sum(numel for _, numel, *_ in found[: self.rank])

    def one_pass(self, kind: str, ranking: Ranking, params: Sequence[Tensor]) -> Ranking | None:
        """A ranking as the CPU's operators share it, which add up on their way through the data; None:
        they do not. They find an exact one's threshold, and use a bracket's.

        Args:
            params: what is ranked here.
        """
        if ranking.selection == "approx" or self.numel < self.fewest:
            return None
        others = [i for i, p in enumerate(params) if not self.counts(p)]
        latest = self.latest.get(kind, [-1, -1])
        # Each takes a sample of its own.
        draw = (ranking.draw + 0x9E3779B9 * self.rank) & 0xFFFFFFFF
        return ranking._replace(draw=draw, shared=[self._handle, self.numel, *latest, *others])

    @contextmanager
    def raising(self) -> Iterator[None]:
        """In the block, operators may add up; what goes wrong with that is raised as it is."""
        try:
            yield
        except RuntimeError:
            failure, self._failure = self._failure, None  # it would keep the user's frames
            if failure is None:
                raise
            raise failure from failure.__cause__

    @classmethod
    def add_for_operator_(cls, state: Tensor, handle: int) -> bool:
        """:meth:`add_`. Operators in C++ are told whether it went well: they cannot pass on errors."""
        ranks = cls._by_handle[handle]
        try:
            ranks.add_(state)
        except BaseException as error:
            ranks._failure = error
        return ranks._failure is None


torch.library.define("rose_ops::_add_over_ranks", "(Tensor(a!) state, int ranks) -> bool")
torch.library.impl("rose_ops::_add_over_ranks", "CPU", Ranks.add_for_operator_)


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
