"""Two gradients over the micro-batches of one step: that of the KL divergence, which masks come from,
and that of the loss, which the update uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rose_ops.captures import copy_of_view
from rose_ops.flat import members
from rose_ops.losses import (
    RoseLosses,
    ce_and_kl,
    check_no_gradients,
    check_r_drop,
    clip_,
    logits_of,
    masks_to_capture,
    without_autocast,
)
from rose_ops.settings import check_limit
from rose_ops.wrappers import Precision, Replicas, unwrap


class Accumulation:
    """One step's gradients, micro-batch by micro-batch::

        step = Accumulation(model, optimizer)
        for each micro-batch:
            two forwards, each with step.forward():
            step.backward(ce, kl)        # weighted, so that their sums are those of the whole batch
        step.finish()                    # masks are captured, and .grad is that of ce + r_drop * kl
        optimizer.step()

    The gradient of the kl is kept beside ``.grad``: one copy of the gradients (two, while a micro-batch
    is at work, where they are views of a flat buffer).

    Args:
        model: with dropout, in training mode.
        optimizer: a ``RoseFusedAdamW``, or any other for a baseline; wrapped or not.
        r_drop: weight of the kl in the update's gradient.
        scaler: of the losses, for float16 gradients.

    Raises:
        ValueError: gradients are there already, or what wraps the model does not go with several
            backwards.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        r_drop: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.r_drop = check_r_drop(r_drop)
        self._rose = unwrap(optimizer)
        self._first, self._second = masks_to_capture(self._rose, self.r_drop)
        self._own = [p for group in (self._rose or optimizer).param_groups for p in group["params"]]
        every = dict.fromkeys([*model.parameters(), *(m for p in self._own for m in members(p))])
        check_no_gradients(model, every)
        self._members = [m for m in every if m.requires_grad]
        self._kl: list[Tensor | None] = [None] * len(self._members)
        self._precision = Precision(Precision.of(optimizer, scaler).scaler)
        self._replicas = Replicas(model, every, several=True, clips=False, accumulates=True)

    @property
    def needs_kl(self) -> bool:
        """Whether the kl, and so a second pass, is needed."""
        return self._first or self.r_drop > 0.0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """For a forward."""
        with self._replicas.quiet(self._rose), self._replicas.watched():
            self._replicas.before_forward()
            yield

    def backward(self, ce: Tensor, kl: Tensor | None) -> None:
        """Add a micro-batch's gradients. (kl may be None where :attr:`needs_kl` is False.)"""
        with self._replicas.quiet(self._rose):
            if kl is not None:
                with self._of_kl():
                    self._precision.scaled(kl).backward(retain_graph=True)
            self._precision.scaled(ce).backward()

    def finish(self, max_grad_norm: float | None = None) -> Tensor | None:
        """Capture the masks; leave the gradient of ``ce + r_drop * kl`` in ``.grad``, scaled if it was.

        Args:
            max_grad_norm: clip it to this norm, and a second-order mask's likewise.

        Returns:
            The norm before that, None without.

        Raises:
            ValueError: ``max_grad_norm`` is no number > 0, or the optimizer has its own; nothing was
                changed.
        """
        check_limit(max_grad_norm, self._rose.settings.max_grad_norm if self._rose else None)
        rose, scale = self._rose, self._precision.scale_on(self._members[0].device)
        with self._replicas.quiet(rose):
            self._replicas.average_()
            if self.needs_kl:
                with self._of_kl():
                    self._replicas.average_()
                    if rose is not None and self._first:
                        rose.capture("first", clear=False, grad_scale=scale)
            if rose is not None and self._second:
                rose.capture("second", clear=False, grad_scale=scale, max_grad_norm=max_grad_norm)
        if self.r_drop > 0.0:
            self._add_kl()
        self._kl = [None] * len(self._members)
        return None if max_grad_norm is None else clip_(self._own, max_grad_norm, scale)

    @contextmanager
    def _of_kl(self) -> Iterator[None]:
        """Inside, ``.grad`` is that of the kl."""
        outside = [(m.grad, copy_of_view(m.grad)) for m in self._members]
        for m, grad in zip(self._members, self._kl, strict=True):
            m.grad = grad
        self._kl = []
        try:
            yield
        finally:
            for m in self._members:
                copy = copy_of_view(m.grad)
                self._kl.append(m.grad if copy is None else copy)
            for m, (grad, values) in zip(self._members, outside, strict=True):
                if grad is not None and values is not None:
                    with torch.no_grad():
                        grad.copy_(values)
                m.grad = grad

    @torch.no_grad()
    def _add_kl(self) -> None:
        for m, kl in zip(self._members, self._kl, strict=True):
            if kl is not None and m.grad is not None:
                m.grad.add_(kl, alpha=self.r_drop)
            elif kl is not None:
                m.grad = kl.mul_(self.r_drop)


def _size(labels: Any) -> int:
    """How many examples labels are of."""
    if isinstance(labels, Tensor) and labels.dim() == 0:
        raise ValueError("labels are a 0-dim tensor; expected one row for each example")
    if isinstance(labels, (tuple, Mapping)):
        leaves = tree_leaves(dict(labels) if isinstance(labels, Mapping) else labels)
        return next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim() > 0), len(labels))
    return len(labels)


def rose_accumulate(
    model: nn.Module,
    micro_batches: Sequence[tuple[Any, Any]],
    optimizer: torch.optim.Optimizer,
    *,
    r_drop: float = 0.0,
    max_grad_norm: float | None = None,
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> RoseLosses:
    """:func:`rose_backward` over several micro-batches: masks and gradient are those of one large
    batch, within rounding.

    The gradients of the kl and of the loss are kept apart until the last micro-batch, so that every
    micro-batch takes two forwards and two backwards (one of each in second order without R-Drop)::

        for micro_batches in batches:
            losses = rose_accumulate(model, micro_batches, optimizer)
            optimizer.step()
            optimizer.zero_grad()

    Args:
        micro_batches: pairs of inputs and labels, as :func:`rose_backward` takes them; each counts by
            the number of its labels: the rows of a tensor, of the first one in a tuple or mapping;
            the items of a list.
        autocast: makes the context of every forward, for example ``lambda: torch.autocast("cuda",
            torch.bfloat16)``.
        model, optimizer, r_drop, max_grad_norm, criterion, forward, scaler: as in
            :func:`rose_backward`.

    Returns:
        The losses of the whole batch.

    Raises:
        ValueError, TypeError: as :func:`rose_backward`; no micro-batches. With nothing changed.
    """
    micro_batches = list(micro_batches)
    if not micro_batches:
        raise ValueError("micro_batches is empty; expected pairs of inputs and labels")
    rose = unwrap(optimizer)
    check_limit(max_grad_norm, rose.settings.max_grad_norm if rose else None)
    step = Accumulation(model, optimizer, r_drop=r_drop, scaler=scaler)
    sizes = [_size(labels) for _, labels in micro_batches]
    if not sum(sizes):
        raise ValueError("micro_batches have no labels; expected at least one")
    total: list[Tensor] = []
    divergence: list[Tensor] = []
    try:
        for (inputs, labels), size in zip(micro_batches, sizes, strict=True):
            weight = size / sum(sizes)
            passes = []
            for _ in range(2 if step.needs_kl else 1):
                with step.forward(), autocast():
                    passes.append(logits_of(model, inputs, forward))
            with without_autocast(passes[0]):
                ce, kl = ce_and_kl(model, passes, labels, criterion)
                ce = ce * weight
                if kl is not None:
                    kl = kl * weight
                    divergence.append(kl.detach())
                total.append(ce.detach())
                step.backward(ce, kl)
        norm = step.finish(max_grad_norm)
    except BaseException:
        for p in dict.fromkeys([*model.parameters(), *step._own]):
            p.grad = None  # there was none before
        raise
    ce = torch.stack(total).sum()
    if not divergence:
        return RoseLosses(ce, ce, None, norm)
    kl = torch.stack(divergence).sum()
    return RoseLosses(ce + step.r_drop * kl, ce, kl, norm)
