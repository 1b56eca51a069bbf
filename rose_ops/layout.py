"""The flattened index space: which element of which tensor has which index.

The parameters of an optimizer, in order, are one index space. Inside a parameter, elements are counted
in the order in which they lie in memory, so that a channels-last weight is one run, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_order(like: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as views whose row-major order is the memory order of ``like`` (same shape)."""
    if like.is_contiguous():
        return list(tensors)
    strides = like.stride()
    dims = sorted(range(like.dim()), key=lambda d: -strides[d])
    return [tensor.permute(dims) for tensor in tensors]


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of an expanded tensor share memory."""
    return not tensor.is_contiguous() and any(
        s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )


def empty_masks(numels: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
    """One bit per element: a uint8 tensor of ``ceil(n / 8)`` for each n, all in one allocation."""
    sizes = [(n + 7) // 8 for n in numels]
    if not sizes:
        return []
    return list(torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes))
