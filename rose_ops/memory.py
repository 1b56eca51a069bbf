"""Large buffers on the CPU, on huge pages where the system grants them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# From here on glibc gives every allocation a mapping of its own: its pages are untouched, so that the
# advice still matters, and the advice ends with it. (M_MMAP_THRESHOLD is dynamic below.)
MIN_BYTES = 32 << 20
_CACHE_LINE = 64
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def advise_huge_pages(buffer: Tensor) -> bool:
    """Ask for huge pages under a contiguous tensor on the CPU, which nothing should have touched yet.

    Returns:
        Whether the system took the advice. Whether it follows is its business, see
        ``AnonHugePages`` in ``/proc/self/smaps``.
    """
    if _MADV_HUGEPAGE is None or not buffer.is_cpu:
        return False
    page = mmap.PAGESIZE
    begin = -(-buffer.data_ptr() // page) * page
    end = (buffer.data_ptr() + buffer.nbytes) // page * page
    if begin >= end:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(begin, end - begin, _MADV_HUGEPAGE) == 0


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, with huge pages under large buffers on the CPU."""
    buffer = torch.empty(numel, dtype=dtype, device=device)
    if buffer.is_cpu and buffer.nbytes >= MIN_BYTES:
        advise_huge_pages(buffer)
    return buffer


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
