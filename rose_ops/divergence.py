"""The symmetric KL divergence of two passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_kl(
    logits_p: Tensor,
    logits_q: Tensor,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
) -> Tensor:
    """Symmetric Kullback-Leibler divergence of two classifiers' outputs.

    `KL(P||Q) + KL(Q||P) = sum_c (p_c - q_c) * (log p_c - log q_c)`, with P and Q the softmax of
    the logits. Every term of this form is at least 0, so nothing cancels in the sum. Evaluated in
    float32 (float64 for float64 logits) whatever the logits' dtype and under autocast.

    Source: ROSE (Jiang et al., EMNLP 2022), Eq. 1.

    Args:
        logits_p: `[batch, classes]`, the logits of one pass; all finite, at least two classes.
        logits_q: The same shape, the logits of the other pass.
        reduction: `"batchmean"` sums over classes and averages over the batch, `"sum"` sums over
            both, `"none"` keeps `[batch]`.

    Returns:
        A 0-dim tensor, or `[batch]` for `reduction="none"`, in nats.

    Raises:
        ValueError: Shapes that are no two equal `[batch, classes]`, an empty batch, fewer than two
            classes, or an unknown reduction.
        TypeError: Logits that are not floating point.
    """
    check_logits(logits_p, logits_q)
    dtype = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p = F.log_softmax(logits_p, dim=-1, dtype=dtype)
    log_q = F.log_softmax(logits_q, dim=-1, dtype=dtype)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)
    if reduction == "batchmean":
        return kl.mean()
    if reduction == "sum":
        return kl.sum()
    if reduction == "none":
        return kl
    raise ValueError(f"reduction must be 'batchmean', 'sum' or 'none', got {reduction!r}")


def check_logits(logits_p: Tensor, logits_q: Tensor) -> None:
    if logits_p.shape != logits_q.shape:
        raise ValueError(
            "symmetric_kl compares two passes over one batch, so the logits must have the same "
            f"shape; got {tuple(logits_p.shape)} and {tuple(logits_q.shape)}"
        )
    if logits_p.dim() != 2:
        raise ValueError(
            f"symmetric_kl expects logits of shape [batch, classes], got {tuple(logits_p.shape)}; "
            "flatten other dimensions into the batch first and leave padded positions out"
        )
    if logits_p.shape[0] == 0 or logits_p.shape[1] < 2:
        raise ValueError(
            "symmetric_kl needs at least one example and two classes (the softmax of a single "
            f"logit is always 1, so its KL is always 0); got {tuple(logits_p.shape)}"
        )
    if not (logits_p.is_floating_point() and logits_q.is_floating_point()):
        raise TypeError(
            f"symmetric_kl expects floating-point logits, got {logits_p.dtype} and {logits_q.dtype}"
        )


class _TokenKL(torch.autograd.Function):
    """`symmetric_kl` of some rows, summed, in parts: of the size of the logits, only their gradients
    are made."""

    PART = 1 << 22  # elements

    @staticmethod
    def _parts(p: Tensor, q: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in rows.split(max(1, _TokenKL.PART // p.shape[1])):
            log_p, log_q = (
                F.log_softmax(x[part], dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
                for x in (p, q)
            )
            yield part, log_p, log_q

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(p, q, rows)
        total = torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for _, log_p, log_q in _TokenKL._parts(p, q, rows):
            total += ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        p, q, rows = ctx.saved_tensors
        of_p, of_q = torch.zeros_like(p), torch.zeros_like(q)
        for part, log_p, log_q in _TokenKL._parts(p, q, rows):
            prob_p, prob_q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
            # Of the sum by log_p and by log_q, then of these by the logits.
            by_p = prob_p * ratio + (prob_p - prob_q)
            by_q = -prob_q * ratio - (prob_p - prob_q)
            of_p[part] = (grad * (by_p - prob_p * by_p.sum(-1, keepdim=True))).to(p.dtype)
            of_q[part] = (grad * (by_q - prob_q * by_q.sum(-1, keepdim=True))).to(q.dtype)
        return of_p, of_q, None


def token_kl(logits_p: Tensor, logits_q: Tensor, rows: Tensor) -> Tensor:
    """`symmetric_kl(..., reduction="sum")` of those rows that `rows` lists, for large vocabularies:
    evaluated in parts, so that beside the logits only their gradients take memory.

    Args:
        logits_p, logits_q: `[tokens, classes]`.
        rows: int64 `[k]`, the tokens that count, each once.

    Returns:
        A 0-dim tensor, in nats; differentiable once.

    Raises:
        ValueError, TypeError: as `symmetric_kl`.
    """
    check_logits(logits_p, logits_q)
    return _TokenKL.apply(logits_p, logits_q, rows)
