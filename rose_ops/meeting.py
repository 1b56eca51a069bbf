"""What the processes that share a ranking must have in common: when they meet, and at every call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rose_ops import backends
from rose_ops.batch import Batch
from rose_ops.captures import Captures
from rose_ops.ranks import Ranks, ranks_of
from rose_ops.settings import Settings, is_number
from rose_ops.shards import local


def meet(
    params: Iterable[Tensor],
    groups: list[dict[str, Any]],
    hyper: Tensor,
    settings: Settings,
    steps: int | None,
) -> Ranks | None:
    """Who shares the ranking of an optimizer, after a look whether theirs were made alike; None: this
    process has all of it.

    Args:
        params, groups, settings: the optimizer's. hyper: the table of its groups.
        steps: that were taken; None where there is no state to have taken any.

    Raises:
        RuntimeError, ValueError: it is not clear who shares it, or something is not the same on every
            process.
    """
    params = [p for p in params if p.requires_grad and not is_lazy(p)]
    ranks = ranks_of(params, settings)
    if ranks is None:
        return None
    known = settings.to_saved()
    known["backend"] = backends.resolve(settings.backend, ranks.device, fake=False).name
    if ranks.is_uniform:
        known["parameters"] = [(str(p.dtype), *p.shape) for p in params]
        known["groups"] = hyper.tolist()
        known["lr"] = [lr if is_number(lr := group["lr"]) else "a tensor" for group in groups]
    values = [x for p in params for x in local(p).detach().flatten()[:4].tolist()]
    ranks.agree(known, sum(p.numel() for p in params), steps, values)
    return ranks


def say_place(
    ranks: Ranks, what: str, steps: int, captures: Captures, hyper: Tensor, batch: Batch
) -> None:
    """Of a call that all processes make: with what it has to be the same.

    Args:
        what: the call. steps: that were taken before it.
    """
    own = sorted((kind, masks.limit) for kind, masks in captures.own.items())
    place = [what, steps, sorted(captures.kinds), own]
    if ranks.is_uniform:
        place += [hyper.tolist(), *(p.numel() for p in batch.params)]
    ranks.at(*place)


def agreed(found_inf: Tensor | float, ranks: Ranks) -> Tensor:
    """Whether any process has seen an overflow."""
    if not isinstance(found_inf, Tensor):  # GradScaler's sum over no gradients
        found_inf = torch.full((), float(found_inf), device=ranks.device)
    return ranks.any(local(found_inf))
