"""Parameters and gradients as views of flat buffers: an index space of one segment per dtype."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rose_ops import memory
from rose_ops.layout import overlaps_itself, sharing_memory

_AGAIN = (
    "call flatten_parameters() and make the optimizer again (the old one's state_dict() can be loaded "
    "into it)"
)


class FlatParameter(nn.Parameter):
    """Parameters of one dtype and device as one vector; see :func:`flatten_parameters`.

    Its elements are those of ``members``, one after the other, each in its memory order and without
    padding between them: the members' data are views of it. It has no gradient of its own: ``grad``
    is that of the members, and setting one sets the other.

    A copy (``copy.deepcopy``, ``pickle``) is made of copies of the members, which are those of the
    model if it is copied in the same call.

    Attributes:
        members: the model's parameters, in order.
    """

    members: tuple[Tensor, ...]
    _labels: tuple[str, ...]  # the members' names in messages
    _windows: list[tuple[torch.Size, tuple[int, ...], int]]  # their shapes, strides and first elements
    _bytes: list[int]  # how many bytes after the start of the vector each begins
    _gradient: Tensor

    def __new__(cls, members: Sequence[Tensor], labels: Sequence[str]) -> FlatParameter:
        first = members[0]
        n = sum(p.numel() for p in members)
        flat = torch.Tensor._make_subclass(cls, memory.empty(n, first.dtype, first.device), True)
        flat.members, flat._labels = tuple(members), tuple(labels)
        flat._gradient = memory.empty(n, first.dtype, first.device)
        flat._windows, begin = [], 0
        for p in members:
            flat._windows.append((p.shape, memory.dense_strides(p), begin))
            begin += p.numel()
        flat._bytes = [begin * first.element_size() for _, _, begin in flat._windows]
        for i, (p, view) in enumerate(zip(members, flat.views(flat.detach()), strict=True)):
            p.data = memory.with_own_storage(view.copy_(p.detach()))
            # A weak reference: when no optimizer has the flat parameter any more, gradients are
            # again what autograd makes of them.
            p.register_post_accumulate_grad_hook(partial(_into_buffer, weakref.ref(flat), i))
        return flat

    def views(self, vector: Tensor) -> list[Tensor]:
        """A vector of as many elements, for example a moment, as views in the members' shapes."""
        return [self._window(vector, i) for i in range(len(self.members))]

    def _window(self, vector: Tensor, i: int) -> Tensor:
        shape, strides, begin = self._windows[i]
        return vector.as_strided(shape, strides, vector.storage_offset() + begin)

    @property
    def grad(self) -> Tensor | None:
        """The members' gradients, which are views of it; None if none of them has one.

        Gradients that were put into place by others are moved into the buffer.

        Raises:
            RuntimeError: some members have a gradient and others have not, a gradient is not like
                its parameter, or a member's data is not a view of this parameter any more.
        """
        grads = [p.grad for p in self.members]
        if all(grad is None for grad in grads):
            return None
        self._check_members()
        missing = [name for name, grad in zip(self._labels, grads, strict=True) if grad is None]
        if missing:
            raise RuntimeError(
                f"no gradient for {_some(missing)}, where other members of the flat parameter have "
                "one. An optimizer would leave them alone, and in a flat parameter it cannot: leave "
                "them out of flatten_parameters(), freeze nothing after it, or let them count as "
                "zero: p.grad = torch.zeros_like(p). (model.zero_grad() discards all gradients.)"
            )
        found = [grad for grad in grads if grad is not None]
        if not self._are_views(found, self._gradient):
            for i, grad in enumerate(found):
                if problem := self._misfit(grad, i):
                    raise RuntimeError(f"the gradient of {self._labels[i]} {problem}")
                self._take_over(grad, i)
        return self._gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            for p in self.members:
                p.grad = None
            return
        self._check_members()
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise RuntimeError(
                f"a gradient of shape {tuple(value.shape)}, {value.dtype} on {value.device}, for a "
                f"flat parameter of shape {tuple(self.shape)}, {self.dtype} on {self.device}"
            )
        with torch.no_grad():
            self._gradient.copy_(value)
        for p, view in zip(self.members, self.views(self._gradient), strict=True):
            p.grad = view

    def _are_views(self, tensors: Iterable[Tensor], vector: Tensor) -> bool:
        """Whether each tensor begins in ``vector`` where its member does."""
        start = vector.data_ptr()
        try:
            addresses = list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # a sparse tensor has none
            return False
        return addresses == [start + begin for begin in self._bytes]

    def _check_members(self) -> None:
        vector = self.detach()
        if self._are_views(self.members, vector):
            return
        views = zip(self.members, self.views(vector), strict=True)
        i = next(i for i, (p, view) in enumerate(views) if p.data_ptr() != view.data_ptr())
        p = self.members[i]
        raise RuntimeError(
            f"{self._labels[i]} is no longer a view of its flat parameter ({self.dtype} on "
            f"{self.device}; it is {p.dtype} on {p.device}): model.to(), another "
            f"flatten_parameters() or a new .data moved it; {_AGAIN}"
        )

    def _misfit(self, grad: Tensor, i: int) -> str | None:
        """Why a gradient cannot be put into the buffer."""
        p = self.members[i]
        if grad.layout != torch.strided:
            return f"has the layout {grad.layout}; expected a dense one (sparse=False)"
        if (grad.shape, grad.dtype, grad.device) == (p.shape, self.dtype, self.device):
            return None
        return (
            f"has shape {tuple(grad.shape)} and is {grad.dtype} on {grad.device}; expected "
            f"{tuple(p.shape)}, {self.dtype} on {self.device}"
        )

    @torch.no_grad()
    def _take_over(self, grad: Tensor, i: int) -> None:
        view = self._window(self._gradient, i)
        if grad.data_ptr() != view.data_ptr():
            view.copy_(grad)
            self.members[i].grad = view

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatParameter:
        return type(self)(copy.deepcopy(self.members, memo), self._labels)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.members, self._labels)


def members(p: Tensor) -> Sequence[Tensor]:
    """The model's parameters that a parameter of an optimizer stands for."""
    return p.members if isinstance(p, FlatParameter) else (p,)


def _into_buffer(flat_reference: weakref.ref[FlatParameter], i: int, p: Tensor) -> None:
    """After autograd has made a gradient: move it into the buffer, unless it is there."""
    flat = flat_reference()
    if flat is None:
        return
    # What does not fit is refused by the next step; and double backward needs the gradient's graph.
    grad = p.grad
    if grad is not None and not grad.requires_grad and not flat._misfit(grad, i):
        flat._take_over(grad, i)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@overload
def flatten_parameters(
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> list[FlatParameter]: ...
@overload
def flatten_parameters(params: Iterable[dict[str, Any]]) -> list[dict[str, Any]]: ...
def flatten_parameters(
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
) -> list[FlatParameter] | list[dict[str, Any]]:
    """Move parameters into flat buffers, so that an optimizer sees one vector for all of them.

    The model keeps its parameters, which become views of the vectors; their gradients become views
    of flat gradients. The vectors are for :class:`rose_ops.RoseFusedAdamW`, or any optimizer that
    works element by element::

        optimizer = RoseFusedAdamW(flatten_parameters(rose_param_groups(model)), lr=1e-3)

    A step then has one segment per group and dtype, whatever the number of tensors, and computes the
    same bits as over the trainable parameters one by one: elements keep their order (those of a group
    with several dtypes are sorted by dtype, which stochastic rounding sees) and there is no padding.
    Frozen parameters are left out. (Norms for clipping are sums in another order.)

    What changes:

    * A parameter without a gradient, where others have one, cannot be left out of a step: reading
      ``grad`` raises and names it. Have it count as zero by giving it a gradient of zeros.
    * ``optimizer.state_dict()`` has flat moments (:meth:`FlatParameter.views` gives their parts),
      and fits an optimizer over the same parameters flattened alike. ``model.state_dict()`` and
      ``model.load_state_dict()`` are as before; as with any optimizer, not with ``assign=True``.
    * After ``model.to(...)`` has moved parameters to another dtype or device, the next step raises:
      flatten again and make a new optimizer.
    * A copy of the model alone is an ordinary model; copied or pickled together with the optimizer,
      it is flat again.
    * The gradients' memory is allocated once and used again by every backward, which moves each
      gradient there as soon as it is made. To keep one beyond that, clone it.
    * Only ``RoseFusedAdamW`` tells autograd about its changes: with other optimizers, a second
      backward through a graph from before a step is not refused.

    Args:
        params: parameters, named parameters (names are for messages), or groups (dicts), as
            optimizers take them.

    Returns:
        A :class:`FlatParameter` for each dtype (and device), in the order of their first parameters;
        or the groups, each with its own.

    Raises:
        TypeError, ValueError: a parameter that cannot be flattened, or is there twice, or shares
            memory with another; nothing was changed.
    """
    given: list[Any] = list(params)
    grouped = bool(given) and all(isinstance(group, dict) for group in given)
    groups: list[dict[str, Any]] = given if grouped else [{"params": given}]
    flat = [[FlatParameter(members, labels) for members, labels in parts] for parts in _parts(groups)]
    if not grouped:
        return flat[0]
    return [{**group, "params": params} for group, params in zip(groups, flat, strict=True)]


def _parts(groups: list[dict[str, Any]]) -> list[list[tuple[list[Tensor], list[str]]]]:
    """The trainable parameters of each group by dtype and device, and their names. Changes nothing."""
    parts = []
    known: set[Tensor] = set()
    trained: list[Tensor] = []
    labels: list[str] = []
    for row, group in enumerate(groups):
        of_group: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[str]]] = {}
        params = group["params"]
        if isinstance(params, set):
            raise TypeError("parameters in a set have no order; expected a list")
        for i, item in enumerate([params] if isinstance(params, Tensor) else params):
            name, p = item if isinstance(item, tuple) else (f"parameter {i} of group {row}", item)
            _check(name, p)
            if p in known:
                raise ValueError(f"{name} is there twice; expected each parameter once")
            known.add(p)
            if p.requires_grad and p.numel():
                trained.append(p)
                labels.append(name)
                members, names = of_group.setdefault((p.dtype, p.device), ([], []))
                members.append(p)
                names.append(name)
        parts.append(list(of_group.values()))
    if pair := sharing_memory(trained):
        one, other = (labels[i] for i in pair)
        raise ValueError(
            f"{one} and {other} share memory, which flattening would end; tie them as one parameter "
            "(module.weight = other.weight)"
        )
    return parts


def _check(name: str, p: object) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} is a {type(p).__name__}; expected a parameter")
    if isinstance(p, FlatParameter):
        raise TypeError(f"{name} is flat already; expected the model's parameters")
    if is_lazy(p) or p.is_meta:
        raise ValueError(f"{name} has no memory yet; materialize the model first")
    if is_traceable_wrapper_subclass(p) or p.layout != torch.strided:
        raise TypeError(f"{name} is a {type(p).__name__} of layout {p.layout}; expected a dense tensor")
    if not p.is_leaf:
        raise ValueError(f"{name} is computed from other tensors; expected a leaf, as optimizers do")
    if overlaps_itself(p):
        raise ValueError(
            f"{name} is an expanded tensor, whose elements share memory; use .contiguous()"
        )
