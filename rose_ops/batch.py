"""One step's tensors: which parameters have a gradient, whether all of it can be used, their state, and
what follows from them that need not be found again at every step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rose_ops import memory
from rose_ops.checks import (
    LOCAL,
    MOMENTS,
    STATE,
    check_ready,
    check_together,
    has_memory,
    is_complete,
    is_sharded,
)
from rose_ops.flat import members
from rose_ops.layout import address, memory_order
from rose_ops.settings import Settings
from rose_ops.shards import Shard, is_spread, local, spread_like


class Layout:
    """The structure of the parameters that have a gradient, in index-space order: no tensors of the
    user's, so that keeping it keeps nothing alive.

    Attributes:
        rows: of the group table, for each parameter.
        offsets: of each parameter's first element in the index space.
        shards: where the parts of parameters lie that are here, if any is spread over processes.
        masks: buffers by kind, to be written again.
    """

    def __init__(self, rows: list[int], offsets: list[int], shards: list[Shard] | None = None) -> None:
        self.rows, self.offsets, self.shards = rows, offsets, shards
        self.masks: dict[str, list[Tensor]] = {}
        self._subset: tuple[list[bool], Layout] | None = None

    # On the CPU, whatever torch.set_default_device() says.
    @cached_property
    def group(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.int64, device="cpu")

    @cached_property
    def offset(self) -> Tensor:
        return torch.tensor(self.offsets, dtype=torch.int64, device="cpu")

    def subset(self, keep: list[bool]) -> Layout:
        if self._subset is None or self._subset[0] != keep:
            shards = None if self.shards is None else list(compress(self.shards, keep))
            part = Layout(list(compress(self.rows, keep)), list(compress(self.offsets, keep)), shards)
            self._subset = keep, part
        return self._subset[1]


class Batch(NamedTuple):
    """One step's tensors; views and gradients in memory order.

    Attributes:
        params: the user's.
        parts: what is here of them.
        states: of the parameters; empty until there is one for each.
        scattered: indices of parameters that are not contiguous.
    """

    layout: Layout
    params: list[Tensor]
    parts: list[Tensor]
    views: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    scattered: list[int]

    @classmethod
    def of(
        cls, layout: Layout, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> Batch:
        parts = params
        if layout.shards is not None:
            parts, grads = list(map(local, params)), list(map(local, grads))
        scattered = [i for i, p in enumerate(parts) if not p.is_contiguous()]
        batch = cls(layout, params, parts, [], [], states, scattered)
        return batch._replace(views=batch.ordered(parts), grads=batch.ordered(grads))

    def ordered(self, tensors: list[Tensor]) -> list[Tensor]:
        """What belongs to the parameters, in the order of their memory."""
        if self.scattered:
            tensors = list(tensors)
            for i in self.scattered:
                (tensors[i],) = memory_order(self.parts[i], (tensors[i],))
        return tensors

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def members(self) -> list[Tensor]:
        """The model's parameters."""
        return [m for p in self.params for m in members(p)]

    def state(self, key: str) -> list[Tensor]:
        values = [state[key] for state in self.states]
        if self.layout.shards is not None:
            values = list(map(local, values))
        return self.ordered(values) if key in MOMENTS else values

    def subset(self, keep: list[bool]) -> Batch:
        if all(keep):
            return self
        params, parts, views, grads = (
            list(compress(x, keep)) for x in (self.params, self.parts, self.views, self.grads)
        )
        states = list(compress(self.states, keep))
        scattered = [i for i, p in enumerate(parts) if not p.is_contiguous()]
        return Batch(self.layout.subset(keep), params, parts, views, grads, states, scattered)


class _Known(NamedTuple):
    """A layout, and what it was made from, in terms that keep nothing alive."""

    layout: Layout
    params: list[int]  # identities
    groups: list[int]  # their lengths
    numels: list[int]
    present: list[bool]  # gradients
    dtypes: list[torch.dtype]
    states: list[int]  # identities of all in optimizer.state
    order: list[int]  # which of them belong to the layout, in its order
    places: list[int] | None  # addresses; None where there is no memory


class Collector:
    """Makes batches. What is as it was at the latest step is not looked at again."""

    def __init__(self, settings: Settings, params: Iterable[Tensor]) -> None:
        self._settings = settings
        self._known: _Known | None = None
        # Identities: a wrapper that puts shards in the place of parameters keeps these alive.
        self.original: tuple[set[int], int] = set(), 0  # and the number of elements
        self.add(params)
        self._apart: set[tuple[int, int]] = set()  # identities and places that share no memory
        self.begin = 0  # of this process's elements in the index space

    def add(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        known, numel = self.original
        numel += sum(0 if is_lazy(p) else p.numel() for p in params)
        self.original = known | set(map(id, params)), numel

    def collect(
        self,
        groups: list[dict[str, Any]],
        states: dict[Tensor, dict[str, Any]],
        *,
        known: bool = True,
    ) -> Batch:
        """All parameters that have a gradient.

        Most of what could be wrong with tensors that are known is left to the operators, which check
        their arguments before they change any; see ``RoseFusedAdamW._explained``.

        Args:
            groups, states: of the optimizer.
            known: False: look at everything.

        Raises:
            RuntimeError, TypeError, ValueError: something cannot be used; nothing was changed.
        """
        every = [p for group in groups for p in group["params"]]
        found = [p.grad for p in every]  # once: a flat parameter looks at all its members
        present = [grad is not None for grad in found]
        grads = [grad for grad in found if grad is not None]
        params = list(compress(every, present))
        numels = [0 if is_lazy(p) else p.numel() for p in every]
        lengths = [len(group["params"]) for group in groups]
        all_states = [*states.values()]
        seen = self._known
        if (
            known
            and seen is not None
            and list(map(id, every)) == seen.params
            and numels == seen.numels
            and present == seen.present
            and lengths == seen.groups
            and [p.dtype for p in params] == seen.dtypes
            and list(map(id, all_states)) == seen.states
            and (seen.places is None or _places(params, seen.layout.shards is not None) == seen.places)
        ):
            mine = [all_states[i] for i in seen.order]
            if all(map(is_complete, mine)):
                return Batch.of(seen.layout, params, grads, mine)
        self._known = None
        rows = [row for row, count in enumerate(lengths) for _ in range(count)]
        offsets = list(compress(accumulate(numels, initial=self.begin), present))
        shards = None
        if any(map(is_spread, every)):
            shards = list(map(Shard.of, params))
            offsets = [offset + shard.start for offset, shard in zip(offsets, shards, strict=True)]
        layout = Layout(list(compress(rows, present)), offsets, shards)
        self._check_identities(every, sum(numels))
        for p, grad, offset in zip(params, grads, layout.offsets, strict=True):
            check_ready(p, grad, states.get(p) or {}, offset, self._settings)
        places = {(id(p), address(local(p))) for p in params}
        if not places <= self._apart:  # as in almost every step: which have gradients may vary
            check_together(params)
            self._apart = places
        if all(p in states and is_complete(states[p]) for p in params):
            self._remember(layout, every, lengths, numels, present, params, states)
            return Batch.of(layout, params, grads, [states[p] for p in params])
        return Batch.of(layout, params, grads, [])

    def _check_identities(self, every: list[Tensor], numel: int) -> None:
        known, original = self.original
        fewer = numel < original
        if fewer and is_sharded(self._settings) and any(id(p) not in known for p in every):
            raise RuntimeError(
                "parameters in the optimizer's groups are not those that it was given, and have "
                f"{numel} elements instead of {original}: a wrapper has put this rank's part "
                f"of them in their place (DeepSpeed's ZeRO, Megatron's distributed optimizer). {LOCAL}"
            )

    def _remember(
        self,
        layout: Layout,
        every: list[Tensor],
        lengths: list[int],
        numels: list[int],
        present: list[bool],
        params: list[Tensor],
        states: dict[Tensor, dict[str, Any]],
    ) -> None:
        ids = [*map(id, states.values())]
        at = {identity: i for i, identity in enumerate(ids)}
        self._known = _Known(
            layout, [*map(id, every)], lengths, numels, present, [p.dtype for p in params], ids,
            [at[id(states[p])] for p in params],
            _places(params, layout.shards is not None) if all(map(has_memory, params)) else None,
        )  # fmt: skip


def _places(params: list[Tensor], spread: bool) -> list[int]:
    return list(map(Tensor.data_ptr, map(local, params) if spread else params))


def init_state(batch: Batch, states: dict[Tensor, dict[str, Any]], dtype: torch.dtype) -> Batch:
    """The batch with a state for each parameter.

    Each parameter's is published whole, and after all were made, so that running out of memory or an
    interrupt leaves none that is half there.
    """
    if batch.states or not batch.params:
        return batch
    new = [p for p in batch.params if p not in states or not is_complete(states[p])]
    parts = list(map(local, new))
    steps = [p.detach().new_zeros((), dtype=torch.float32) for p in parts]
    moments = [list(map(spread_like, memory.zeros_like(parts, dtype), new)) for _ in MOMENTS]
    for p, *values in zip(new, steps, *moments, strict=True):
        states[p].update(zip(STATE, values, strict=True))  # what others keep there stays
    return batch._replace(states=[states[p] for p in batch.params])


def inside_backward_of(params: Iterable[Tensor]) -> bool:
    """Whether a backward is running that makes gradients of ``params``, and may not have made all."""
    if torch._C._current_graph_task_id() == -1:
        return False
    return any(
        torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(m).node)
        for p in params
        for m in members(p)
        if m.requires_grad and m.is_leaf
    )
