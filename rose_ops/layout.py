"""The flattened index space: which element of which tensor has which index.

The parameters of an optimizer, in order, are one index space. Inside a parameter, elements are counted
in the order in which they lie in memory, so that a channels-last weight is one run, too.
"""

from __future__ import annotations

import sys
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
        if t.numel() > 0 and (begin := address(t)) != 0
    )
    cluster: list[
        int
    ] = []  # whose spans meet: they may still be interleaved, as columns of a matrix are
    end = 0
    for begin, until, i in [*spans, (sys.maxsize, sys.maxsize, -1)]:
        if begin >= end:
            if len(cluster) > 1 and (pair := _sharing(tensors, cluster)):
                return pair
            cluster = []
        cluster.append(i)
        end = max(end, until)
    return None


def _sharing(tensors: Sequence[Tensor], cluster: list[int]) -> tuple[int, int] | None:
    size = tensors[cluster[0]].element_size()
    if any(tensors[i].element_size() != size for i in cluster):
        return cluster[0], cluster[1]  # not worth a proof
    start = address(tensors[cluster[0]])
    begins = {i: (address(tensors[i]) - start) // size for i in cluster}
    taken = torch.zeros(
        max(begins[i] + _extent(tensors[i]) for i in cluster), dtype=torch.int32, device="cpu"
    )
    for i in cluster:
        places = taken.as_strided(tensors[i].shape, tensors[i].stride(), begins[i])
        if places.any():
            return int(places.max()) - 1, i  # the other's number is written there
        places.fill_(i + 1)
    return None


def address(tensor: Tensor) -> int:
    """0 where there is no memory."""
    return 0 if tensor.is_meta or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _extent(tensor: Tensor) -> int:
    """How many elements lie from the first to the last."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def empty_masks(numels: Sequence[int], device: torch.device) -> list[Tensor]:
    """One bit per element: a uint8 tensor of ``ceil(n / 8)`` for each n, all in one allocation."""
    sizes = [(n + 7) // 8 for n in numels]
    if not sizes:
        return []
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    return [memory.with_own_storage(part) for part in whole.split(sizes)]


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as one bit per element, row by row: uint8 ``[ceil(n / 8)]``, lowest bit first."""
    padding = -mask.numel() % 8
    eights = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, padding)).view(torch.int64)
    # Byte i of a number (0 or 1) times 2^(56 - 7*i), one of the factor's bits, is bit 56 + i: so the
    # highest byte of the product is the eight bits (little-endian, as all machines here are).
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)
