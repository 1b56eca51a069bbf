"""Large buffers on the CPU, on huge pages where the system grants them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_BYTES = 8 << 20  # below, it hardly matters where a buffer lies
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
_HUGE_PAGE = 2 << 20
# Buffers of 2^n bytes, one right after the other, would meet in the same sets of caches and banks of
# memory at every element: a huge page between them, which nobody touches, keeps them apart.
_GAP = _HUGE_PAGE
_CACHE_LINE = 64


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; on Linux, a large buffer on the CPU asks for huge pages.

    It is a mapping of its own: the allocator may hand out memory that was touched before, and for
    that the advice comes too late. Whether the system follows is its business (``AnonHugePages`` in
    ``/proc/self/smaps``); where it will not hear of it, this is ``torch.empty``.
    """
    nbytes = numel * dtype.itemsize
    if device.type == "cpu" and nbytes >= MIN_BYTES and _ADVICE is not None:
        whole_pages = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE  # of such lengths, Linux aligns mappings
        try:
            # Private, as the heap is: a forked process writes into a copy.
            mapping = mmap.mmap(-1, whole_pages + _GAP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise(_ADVICE)
            return torch.frombuffer(mapping, dtype=dtype, count=numel)
        except OSError:
            pass
    return torch.empty(numel, dtype=dtype, device=device)


def zeros_like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros of the shapes and memory orders of ``tensors``, all on one device.

    On the CPU they share one buffer, each from a cache line on: tensors of a few MB would have no
    huge page of their own.
    """
    if not tensors or not tensors[0].is_cpu:
        return [torch.zeros_like(t, dtype=dtype) for t in tensors]
    line = _CACHE_LINE // dtype.itemsize
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.numel() // line) * line)
    buffer = empty(offsets[-1], dtype, tensors[0].device).zero_()
    return [
        buffer.as_strided(t.shape, dense_strides(t), offset)
        for t, offset in zip(tensors, offsets, strict=False)
    ]


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides without gaps that keep the memory order of ``tensor``, as ``torch.empty_like`` does."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor).stride()
