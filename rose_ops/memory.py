"""Large buffers on the CPU, on huge pages where the system grants them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

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
    if device.type == "cpu" and nbytes >= MIN_BYTES and _ADVICE is not None and not _is_traced():
        whole_pages = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE  # of such lengths, Linux aligns mappings
        try:
            # Private, as the heap is: a forked process writes into a copy.
            mapping = mmap.mmap(-1, whole_pages + _GAP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise(_ADVICE)
            return torch.frombuffer(mapping, dtype=dtype, count=numel)
        except OSError:
            pass
    return torch.empty(numel, dtype=dtype, device=device)


def _is_traced() -> bool:
    """Whether somebody looks on, for whom tensors need not have memory (FakeTensorMode, estimators)."""
    return torch._C._len_torch_dispatch_stack() > 0


def with_own_storage(view: Tensor) -> Tensor:
    """The memory of ``view``, which is of a larger buffer, as a tensor with no larger a storage.

    What saves tensors (``pickle``, ``safetensors``, ``torch.save``) goes by storages: it would write,
    or refuse, the whole buffer for each view. The buffer lives as long as any of these.
    """
    if _is_traced() or view.is_meta:
        return view
    return from_dlpack(to_dlpack(view))


def empties(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Uninitialized tensors of the shapes and memory orders of ``tensors``, all on one device, one
    after the other as they are asked for (of ``tensors``, none is kept).

    On the CPU they lie in one buffer, each from a cache line on: tensors of a few MB would have no huge
    page of their own.
    """
    windows = [(t.shape, dense_strides(t)) for t in tensors]
    line = _CACHE_LINE // dtype.itemsize
    sizes = [-(-t.numel() // line) * line for t in tensors]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type != "cpu" or sum(sizes) * dtype.itemsize < MIN_BYTES or _is_traced():
        return (torch.empty_strided(*window, dtype=dtype, device=device) for window in windows)
    buffer = empty(sum(sizes), dtype, device)
    offsets = accumulate(sizes, initial=0)
    return (
        with_own_storage(buffer.as_strided(*window, offset))
        for window, offset in zip(windows, offsets, strict=False)
    )


def zeros_like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros, placed as :func:`empties` places them."""
    return [tensor.zero_() for tensor in empties(tensors, dtype)]


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides without gaps that keep the memory order of ``tensor``, as ``torch.empty_like`` does."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor).stride()
