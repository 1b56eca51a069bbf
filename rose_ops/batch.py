"""One step's tensors: which parameters have a gradient, whether all of it can be used, their state, and
what follows from them that need not be found again at every step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from rose_ops import memory
from rose_ops.flat import FlatParameter, members
from rose_ops.layout import address, memory_order, overlaps_itself, sharing_memory
from rose_ops.settings import Settings

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("step", *MOMENTS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layout:
    """The structure of the parameters that have a gradient, in index-space order: no tensors of the
    user's, so that keeping it keeps nothing alive.

    Attributes:
        rows: of the group table, for each parameter.
        offsets: of each parameter's first element in the index space.
        masks: buffers by kind, to be written again.
    """

    def __init__(self, rows: list[int], offsets: list[int]) -> None:
        self.rows, self.offsets = rows, offsets
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
            part = Layout(list(compress(self.rows, keep)), list(compress(self.offsets, keep)))
            self._subset = keep, part
        return self._subset[1]


class Batch(NamedTuple):
    """One step's tensors; views and gradients in memory order.

    Attributes:
        states: of the parameters; empty until there is one for each.
        scattered: indices of parameters that are not contiguous.
    """

    layout: Layout
    params: list[Tensor]
    views: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    scattered: list[int]

    @classmethod
    def of(
        cls, layout: Layout, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> Batch:
        scattered = [i for i, p in enumerate(params) if not p.is_contiguous()]
        batch = cls(layout, params, [], [], states, scattered)
        return batch._replace(views=batch.ordered(params), grads=batch.ordered(grads))

    def ordered(self, tensors: list[Tensor]) -> list[Tensor]:
        """What belongs to the parameters, in the order of their memory."""
        if self.scattered:
            tensors = list(tensors)
            for i in self.scattered:
                (tensors[i],) = memory_order(self.params[i], (tensors[i],))
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
        return self.ordered(values) if key in MOMENTS else values

    def subset(self, keep: list[bool]) -> Batch:
        if all(keep):
            return self
        params = list(compress(self.params, keep))
        views, grads = (list(compress(x, keep)) for x in (self.views, self.grads))
        states = list(compress(self.states, keep))
        scattered = [i for i, p in enumerate(params) if not p.is_contiguous()]
        return Batch(self.layout.subset(keep), params, views, grads, states, scattered)


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


class Collector:
    """Makes batches. What is as it was at the latest step is not looked at again."""

    def __init__(self, settings: Settings, given: Iterable[Tensor]) -> None:
        self._settings = settings
        self._known: _Known | None = None
        # Identities: a wrapper that puts shards in the place of parameters keeps these alive.
        self._given = set(map(id, given))
        self._apart: set[tuple[int, int]] = set()  # identities and places that share no memory

    def forget(self) -> None:
        self._known = None

    def add(self, params: Iterable[Tensor]) -> None:
        self._given.update(map(id, params))

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
        ):
            mine = [all_states[i] for i in seen.order]
            if all(map(is_complete, mine)):
                return Batch.of(seen.layout, params, grads, mine)
        self._known = None
        rows = [row for row, count in enumerate(lengths) for _ in range(count)]
        offsets = list(accumulate(numels, initial=0))[:-1]
        layout = Layout(list(compress(rows, present)), list(compress(offsets, present)))
        self._check_identities(every)
        for p, grad, offset in zip(params, grads, layout.offsets, strict=True):
            check_ready(p, grad, states.get(p) or {}, offset, self._settings)
        places = {(id(p), address(p)) for p in params}
        if not places <= self._apart:  # as in almost every step: which have gradients may vary
            check_together(params)
            self._apart = places
        if all(p in states and is_complete(states[p]) for p in params):
            self._remember(layout, every, lengths, numels, present, params, states)
            return Batch.of(layout, params, grads, [states[p] for p in params])
        return Batch.of(layout, params, grads, [])

    def _check_identities(self, every: list[Tensor]) -> None:
        if is_sharded(self._settings) and any(id(p) not in self._given for p in every):
            raise RuntimeError(
                "parameters in the optimizer's groups are not those that it was given: a wrapper has "
                "put others in their place, such as this rank's part of them (DeepSpeed's ZeRO, "
                f"Megatron's distributed optimizer). {_LOCAL}"
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
        )  # fmt: skip


_LOCAL = (
    "A ranking and a clipping norm are over all parameters, and from a part of them something else "
    "would be trained without a word. Use DistributedDataParallel, or pass local_ranking=True to rank "
    "and clip each rank's part by itself"
)


def is_sharded(settings: Settings) -> bool:
    """Whether a part of the parameters would be taken for the whole."""
    return (
        settings.is_global
        and not settings.local_ranking
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def is_complete(state: dict[str, Any]) -> bool:
    return "step" in state and "exp_avg" in state and "exp_avg_sq" in state


def init_state(batch: Batch, states: dict[Tensor, dict[str, Any]], dtype: torch.dtype) -> Batch:
    """The batch with a state for each parameter.

    Each parameter's is published whole, and after all were made, so that running out of memory or an
    interrupt leaves none that is half there.
    """
    if batch.states or not batch.params:
        return batch
    new = [p for p in batch.params if p not in states or not is_complete(states[p])]
    steps = [p.detach().new_zeros((), dtype=torch.float32) for p in new]
    moments = [memory.zeros_like(new, dtype) for _ in MOMENTS]
    for p, *values in zip(new, steps, *moments, strict=True):
        states[p].update(zip(STATE, values, strict=True))  # what others keep there stays
    return batch._replace(states=[states[p] for p in batch.params])


def check_given(params: list[Tensor], settings: Settings, there: list[Tensor]) -> None:
    """Raise unless ``params`` can be a group, next to those that are ``there``.

    Only parameters that are trained need to fit: others may be anything (quantized, complex, on "meta",
    not yet materialized) and are looked at when they have a gradient.
    """
    if len(set(params)) < len(params):
        raise ValueError(
            "a parameter is more than once in a group; expected once, as one ranking counts every "
            "element once"
        )
    trained = [p for p in params if p.requires_grad and not is_lazy(p)]
    for param in trained:
        check_param(param)
        check_shard(param, settings)
        if settings.granularity == "tensor" and isinstance(param, FlatParameter):
            raise ValueError(
                "granularity='tensor' ranks whole tensors, and a flat parameter has none; expected the "
                "parameters as they were before flatten_parameters()"
            )
    known = {id(p) for p in trained}  # one that is in two groups is refused in PyTorch's words
    there = [p for p in there if p.requires_grad and not is_lazy(p) and id(p) not in known]
    check_together(there + trained)


def check_together(params: list[Tensor]) -> None:
    """Raise unless parameters are on one device and share no elements."""
    for param in params:
        if param.device != params[0].device:
            raise ValueError(
                f"a parameter is on {param.device} and others are on {params[0].device}; expected all "
                "on one device: use one optimizer for each (each with its own ranking)"
            )
    if pair := sharing_memory(params):
        i, j = pair
        raise ValueError(
            f"two parameters, of shapes {tuple(params[i].shape)} and {tuple(params[j].shape)}, share "
            "memory: each would update the other's elements at the same time. Tie them as one "
            "parameter (module.weight = other.weight), or give the optimizer one of them"
        )


# How parameters are marked by what splits them.
_SPLITTERS = {
    "_fsdp_flattened": "FullyShardedDataParallel (FSDP1)",
    "tensor_model_parallel": "Megatron's tensor parallelism",
    "ds_tensor": "DeepSpeed's ZeRO-3",
}


def check_shard(p: Tensor, settings: Settings) -> None:
    for mark, splitter in _SPLITTERS.items():
        found = getattr(p, mark, None)
        if found is not None and found is not False and is_sharded(settings):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} is this rank's part of one that {splitter} has "
                f"split. {_LOCAL}"
            )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its memory: no subclass that stands for other tensors or computes itself."""
    kind = type(tensor)
    return (
        kind in (Tensor, torch.nn.Parameter, FlatParameter)
        or issubclass(kind, FakeTensor)
        or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def check_param(p: Tensor) -> None:
    if not is_plain(p):
        if hasattr(p, "to_local"):
            raise NotImplementedError("DTensor parameters (FSDP2) are not there yet")
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is a {type(p).__name__}, a tensor subclass whose "
            "elements are not simply in memory; expected plain parameters (freeze it, or leave it out)"
        )
    if torch.is_complex(p):
        raise TypeError("complex parameters cannot be ranked; expected float32, bfloat16 or float16")
    if p.dtype not in _DTYPES:
        raise TypeError(f"parameters of {p.dtype} are not supported; expected one of {_DTYPES}")
    if p.layout != torch.strided:
        raise TypeError(f"parameters of layout {p.layout} are not supported; expected dense ones")
    if p.is_neg():
        raise ValueError(
            "a parameter is a lazily negated view (its negative bit is set); use .resolve_neg()"
        )
    if overlaps_itself(p):
        raise ValueError(
            "a parameter is an expanded tensor, whose elements share memory; use .contiguous()"
        )


def check_ready(
    p: Tensor, grad: Tensor, state: dict[str, Any], offset: int, settings: Settings
) -> None:
    moment: Any = state.get("exp_avg")
    if (
        is_complete(state)
        and type(grad) is Tensor
        and grad.dtype in _DTYPES
        and p.dtype in _DTYPES
        and grad.layout == p.layout == torch.strided
        and grad.shape == p.shape == moment.shape
        and grad.device == p.device == moment.device
        and p.is_contiguous()
        and type(p) is torch.nn.Parameter
        and not p.is_neg()
        and not p.__dict__  # no marks
    ):
        return  # as in almost every step: the rest takes time
    what = f"the parameter of shape {tuple(p.shape)} (elements from {offset})"
    if grad.layout != torch.strided or torch.is_complex(grad):
        kind = "complex" if torch.is_complex(grad) else "sparse"
        raise RuntimeError(
            f"the gradient of {what} is {kind}; RoseFusedAdamW ranks dense real gradients "
            "(for an embedding, use sparse=False)"
        )
    if not is_plain(grad):
        raise TypeError(
            f"the gradient of {what} is a {type(grad).__name__}; expected a plain tensor, whose "
            "elements are in memory"
        )
    if grad.device != p.device:
        raise RuntimeError(f"the gradient of {what} is on {grad.device}, expected {p.device}")
    if grad.shape != p.shape:
        raise RuntimeError(
            f"the gradient of {what} has shape {tuple(grad.shape)}; expected the parameter's"
        )
    check_param(p)
    check_shard(p, settings)
    if grad.dtype not in _DTYPES:
        raise TypeError(f"the gradient of {what} is {grad.dtype}; expected one of {_DTYPES}")
    if missing := [key for key in STATE if key not in state]:
        if len(missing) < len(STATE):
            raise RuntimeError(
                f"the state of {what} has no {', '.join(map(repr, missing))}; expected "
                f"{', '.join(STATE)}, or none of them: load it by load_state_dict(), or clear it"
            )
        return
    if moment.shape != p.shape or moment.device != p.device:
        raise RuntimeError(
            f"{what} has state of shape {tuple(moment.shape)} on {moment.device}: the parameter "
            "changed its shape or device after a step; make a new optimizer for it"
        )


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
