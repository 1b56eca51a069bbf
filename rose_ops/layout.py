"""The flattened index space: which element of which tensor has which index.

The parameters of an optimizer, in order, are one index space. Inside a parameter, elements are counted
in the order in which they lie in memory, so that a channels-last weight is one run, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rose_ops import memory


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


def sharing_memory(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two tensors that have an element's memory in common; None if there are none."""
    spans = sorted(
        (begin, begin + _extent(t) * t.element_size(), i)
        for i, t in enumerate(tensors)
        if (begin := address(t)) != 0 and t.numel() > 0
    )
    # Of the spans so far, the one that reaches farthest. A span that it ends before is clear of all,
    # unless they are interleaved (columns of one matrix), where more than the latest can matter.
    reaching: list[tuple[int, int, int]] = []
    for span in spans:
        reaching = [other for other in reaching if other[1] > span[0]]
        for other in reaching:
            i, j = sorted((other[2], span[2]))
            if _share(tensors[i], tensors[j]):
                return i, j
        reaching.append(span)
    return None


def address(tensor: Tensor) -> int:
    """0 where there is no memory."""
    return 0 if tensor.is_meta or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _extent(tensor: Tensor) -> int:
    """How many elements lie from the first to the last."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _share(a: Tensor, b: Tensor) -> bool:
    """Of tensors whose spans meet: whether an element of theirs is in the same place."""
    dense = _extent(a) == a.numel() and _extent(b) == b.numel()
    if dense or a.element_size() != b.element_size():
        return True  # no gaps for the other to lie in (or not worth a proof)
    start = min(a.data_ptr(), b.data_ptr())
    size = a.element_size()
    begins = [(t.data_ptr() - start) // size for t in (a, b)]
    taken = torch.zeros(
        max(begin + _extent(t) for begin, t in zip(begins, (a, b), strict=True)),
        dtype=torch.bool,
        device="cpu",
    )
    mine, other = (
        taken.as_strided(t.shape, t.stride(), begin) for begin, t in zip(begins, (a, b), strict=True)
    )
    mine.fill_(True)
    return bool(other.any())


def empty_masks(numels: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
    """One bit per element: a uint8 tensor of ``ceil(n / 8)`` for each n, all in one allocation."""
    sizes = [(n + 7) // 8 for n in numels]
    if not sizes:
        return []
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    return [memory.with_own_storage(part) for part in whole.split(sizes)]
