"""Masks that are there before a step, captured or one's own; and that the gradients behind a captured
one are of one loss alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rose_ops.batch import Batch
from rose_ops.checks import has_memory, is_recording
from rose_ops.flat import members
from rose_ops.masks import MASKS, OwnMasks
from rose_ops.shards import local, moved_mask


class Captures:
    """Of an optimizer, for its coming step.

    Attributes:
        kinds: of the masks that were captured; they are in the parameters' states.
        own: masks of ``set_masks()``, by kind.
    """

    def __init__(self, states: dict[Tensor, dict[str, Any]], own: dict[str, OwnMasks]) -> None:
        self.kinds = {kind for kind, key in MASKS.items() for state in states.values() if key in state}
        self.own = own
        # By kind, the strides of parameters that were not contiguous when their bits were put in order.
        strides = {p: stride for p in states if (stride := _stride(p)) is not None}
        self._strides = {kind: dict(strides) for kind in self.kinds}
        self._used: list[ref[Tensor]] = []  # gradients of the latest step

    def put(self, kind: str, batch: Batch, masks: Iterable[Tensor]) -> None:
        for state, mask in zip(batch.states, masks, strict=True):
            state[MASKS[kind]] = mask
        self.kinds.add(kind)
        self._strides[kind] = {batch.params[i]: batch.parts[i].stride() for i in batch.scattered}

    def put_in_order(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Bits of masks are in the order in memory of their parameters; where strides have changed
        since, as ``model.to(memory_format=torch.channels_last)`` changes them, in the new one."""
        for kind in self.kinds:
            strides, key = self._strides[kind], MASKS[kind]
            for p, state in states.items():
                before, now = strides.get(p), _stride(p)
                if before == now or key not in state:
                    continue
                if state[key].dtype != torch.bool:
                    state[key] = moved_mask(state[key], before, p)
                if now is None:
                    del strides[p]
                else:
                    strides[p] = now

    def drop(self, kind: str, states: Iterable[dict[str, Any]]) -> None:
        for state in states:
            state.pop(MASKS[kind], None)
        self.kinds.discard(kind)

    def is_own(self, kind: str) -> bool:
        """Whether ``set_masks()`` has said what is selected, so that nothing is ranked."""
        return kind in self.own and not self.own[kind].limit

    @property
    def there(self) -> set[str]:
        """Kinds that the coming step has not to find."""
        return self.kinds | set(filter(self.is_own, self.own))

    @property
    def limits(self) -> dict[str, dict[Tensor, Tensor]]:
        """To what is ranked, by kind and parameter."""
        return {kind: own.masks for kind, own in self.own.items() if own.limit}

    def of(self, batch: Batch) -> dict[str, list[Tensor | None]]:
        """The masks that are there, as operators read them; None of a parameter that has none."""
        if self.own and batch.params and is_recording(batch.device):
            raise NotImplementedError(
                "a CUDA graph cannot be recorded with masks of set_masks(), which it would not own; "
                "call clear_masks() before recording"
            )
        strides = {batch.params[i]: batch.parts[i].stride() for i in batch.scattered}
        if any(strides != self._strides[kind] for kind in self.kinds):
            self.put_in_order(dict(zip(batch.params, batch.states, strict=True)))
        found = {kind: [state.get(MASKS[kind]) for state in batch.states] for kind in self.kinds}
        for kind in filter(self.is_own, self.own):
            found[kind] = [self.own[kind].bits_of(p) for p in batch.params]
        return found

    def refuse_own(self, kind: str) -> None:
        """Raise if there is nothing to capture."""
        if self.is_own(kind):
            raise RuntimeError(
                f"capture({kind!r}): set_masks() has given the masks of this kind, so there is nothing "
                f"to rank; call clear_masks({kind!r}) first, or set_masks(..., limit=True) to rank "
                "within them"
            )

    def consume(self, keeps_first: bool, states: Iterable[dict[str, Any]], *, keeps_own: bool) -> None:
        """A step has used the masks.

        Args:
            keeps_first: whether the next one uses a captured first-order mask again.
            keeps_own: whether masks of ``set_masks()`` stay, as there was no step.
        """
        for kind in self.kinds - ({"first"} if keeps_first else set()):
            self.drop(kind, states)
        if not keeps_own:
            self.own = {kind: own for kind, own in self.own.items() if own.keep}

    def forget_used(self) -> None:
        """The gradients were cleared."""
        self._used = []

    def note_used(self, params: Iterable[Tensor]) -> None:
        """A step has used the gradients of ``params``."""
        self._used = [
            ref(grad)
            for p in params
            for m in members(p)
            # DistributedDataParallel gives out the same view of a bucket in every backward.
            if (grad := m.grad) is not None and (m is not p or _has_own_storage(grad))
        ]

    def refuse_used(self, kind: str, batch: Batch) -> None:
        """Gradients of the latest step's loss, into which another backward has been adding, are no
        gradients of one loss.

        Raises:
            RuntimeError: there are some.
        """
        used = {id(grad) for one in self._used if (grad := one()) is not None}
        if used and (count := sum(id(m.grad) in used for m in batch.members)):
            raise RuntimeError(
                f"capture({kind!r}): {count} gradients were there at the latest step already and have "
                "not been cleared since, so the mask would be of both losses together; call "
                "optimizer.zero_grad() between step() and this backward, or use "
                f"optimizer.capturing({kind!r}, set_aside=True)"
            )


class Capturing(AbstractContextManager[None]):
    """What ``RoseFusedAdamW.capturing`` returns. (A class, whose methods torch.compile can leave out of
    graphs.)

    Args:
        params: the optimizer's.
        captures: its captures.
        capture: what is called at the end.
        set_aside: whether gradients that are there are put aside, and back afterwards; else refused.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        captures: Captures,
        capture: Callable[[], None],
        set_aside: bool,
    ) -> None:
        self._members = [m for p in params for m in members(p)]
        self._captures, self._capture, self._set_aside = captures, capture, set_aside
        self._before: list[tuple[Tensor | None, Tensor | None]] = []

    @_disable_dynamo
    def __enter__(self) -> None:
        before = [m.grad for m in self._members]
        count = sum(grad is not None for grad in before)
        if count and not self._set_aside:
            raise RuntimeError(
                f"capturing(): {count} of {len(before)} parameters have a gradient already (zeros "
                "count), which would be in the mask; call zero_grad() before, or pass set_aside=True "
                "to have it put aside and back"
            )
        # Views of a buffer (of flat parameters, of DistributedDataParallel) are written to again by the
        # next backward: of these, the values are put aside, too.
        self._before = [(grad, copy_of_view(grad)) for grad in before]
        for m in self._members:
            m.grad = None
        self._captures.forget_used()

    @_disable_dynamo
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._capture()
        finally:
            for m, (grad, values) in zip(self._members, self._before, strict=True):
                if grad is not None and values is not None:
                    with torch.no_grad():
                        grad.copy_(values)
                m.grad = grad
            self._before = []


def copy_of_view(grad: Tensor | None) -> Tensor | None:
    """Of a gradient that the next backward would write into, its values."""
    if grad is None or grad.layout != torch.strided or not has_memory(grad):
        return None
    return None if _has_own_storage(grad) else grad.detach().clone()


def _stride(p: Tensor) -> tuple[int, ...] | None:
    """None: contiguous."""
    part = local(p)
    return None if part.is_contiguous() else part.stride()


def _has_own_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes
