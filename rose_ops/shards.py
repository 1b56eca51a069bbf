"""What this process has of a parameter that is spread over several: the local part of a DTensor, where
it lies in the whole, and whether another process has the same part, too."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rose_ops.definitions import pack, unpack
from rose_ops.layout import memory_order

_MODULE = "torch.distributed.tensor"  # who has a DTensor has imported it; it takes half a second


def is_spread(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of a DTensor that is here; any other tensor is here as it is."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():  # else it would be a node of a graph
        return tensor.to_local()


def spread_like(part: Tensor, like: Any) -> Tensor:
    """A DTensor placed as ``like`` is, of which ``part`` is here; where ``like`` is none, ``part``."""
    if not is_spread(like):
        return part
    return type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def part_of(whole: Tensor, like: Any) -> Tensor:
    """Of a tensor that every process has the whole of, what it has of ``like``; of a DTensor, its part.

    Raises:
        ValueError: a DTensor that is not placed as ``like`` is.
    """
    if not is_spread(like):
        return local(whole)
    if is_spread(whole):
        if has_placement_of(whole, like):
            return local(whole)
        raise ValueError(
            f"it is placed as {whole.placements} on {whole.device_mesh}, and its parameter "  # type: ignore[attr-defined]
            f"as {like.placements} on {like.device_mesh}: redistribute it"
        )
    shard = Shard.of(like)
    for dim, (begin, size) in enumerate(zip(shard.begin, shard.size, strict=True)):
        whole = whole.narrow(dim, begin if size else 0, size)
    return whole


def saved_mask(mask: Tensor, param: Any) -> Tensor:
    """A copy of a parameter's mask, as a checkpoint has it: as it is, packed, if the parameter is
    contiguous. A part of a DTensor, which can be resharded, is a DTensor of bools; and a tensor of
    bools says which bit is which where who loads it may have another order in memory.

    Args:
        mask: uint8 ``[ceil(n / 8)]`` of the n elements that are here, or bool of one element, of all.
    """
    is_plain = not is_spread(param) and param.is_contiguous()
    if is_plain or mask.is_meta or mask.dtype == torch.bool:
        return mask.clone()
    return spread_like(_unpacked(mask, local(param)), param)


def moved_mask(mask: Tensor, stride: tuple[int, ...] | None, param: Any) -> Tensor:
    """A packed mask in the order in memory that its parameter has now.

    Args:
        stride: of the parameter, or the part of it that is here, at the time of the mask; None: it was
            contiguous.
    """
    if mask.is_meta:
        return mask
    shape = local(param).shape
    if stride is None:
        was = torch.empty(shape, device="meta")
    else:
        was = torch.empty_strided(shape, stride, device="meta")
    return loaded_mask(spread_like(_unpacked(mask, was), param), param)


def loaded_mask(mask: object, param: Any) -> Tensor:
    """A mask for a parameter, or for the part of it that is here, of one that :func:`saved_mask` made,
    of this parameter or of one that was spread over other processes, or over none.

    Raises:
        ValueError: it is no mask of this parameter, or a DTensor that is not placed as it is.
    """
    if not isinstance(mask, Tensor):
        raise ValueError("is not a mask of this parameter")
    is_of_tensor = (mask.dtype, mask.numel()) == (torch.bool, 1) and not is_spread(mask)
    if (mask.dtype, mask.shape) == (torch.bool, param.shape) and not is_of_tensor:
        (ordered,) = memory_order(local(param), (part_of(mask, param),))
        with torch.device("cpu"):
            return pack(ordered.cpu()).to(param.device)
    is_packed = (mask.dtype, mask.numel()) == (torch.uint8, (param.numel() + 7) // 8)
    if not is_of_tensor and not is_packed:
        raise ValueError("is not a mask of this parameter")
    if is_of_tensor or mask.is_meta or (not is_spread(param) and param.is_contiguous()):
        return mask.to(param.device, copy=True)
    return loaded_mask(_unpacked(mask, torch.empty(param.shape, device="meta")), param)


def is_cast_mask(mask: object, param: Tensor) -> bool:
    """Whether it is what ``Optimizer.load_state_dict`` of another optimizer makes of a mask, of this
    parameter or of one of another dtype or order in memory: numbers of the parameter's dtype."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return False
    return mask.shape == param.shape or mask.numel() in (1, (param.numel() + 7) // 8)


def _unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """A bool tensor of the shape of ``like``, of whose elements, as they lie in memory, ``mask`` is."""
    bools = torch.empty(like.shape, dtype=torch.bool, device=mask.device)
    (ordered,) = memory_order(like, (bools,))
    with torch.device("cpu"):
        bits = unpack(mask.cpu(), like.numel())
    ordered.copy_(bits.view(ordered.shape))
    return bools


def has_placement_of(tensor: Any, like: Any) -> bool:
    return tensor.device_mesh == like.device_mesh and tuple(tensor.placements) == tuple(like.placements)


def unplaceable(tensor: Any) -> str | None:
    """What is in the way of using the local parts of a DTensor as they are; None: nothing."""
    if any(placement.is_partial() for placement in tensor.placements):
        return f"it is placed as {tensor.placements}: its elements are sums that are not taken yet"
    if tensor.device_mesh.get_coordinate() is None:
        return f"this process is not in its mesh, {tensor.device_mesh}"
    return None


class Shard(NamedTuple):
    """A part of a tensor: of each dimension, ``size`` elements from ``begin`` on.

    Attributes:
        shape: of the whole.
        is_first: whether no process before this one in the mesh has the same part.
        start: the number by which its first element's random bits are keyed: its place in the whole, if
            its elements are consecutive there; else one that no other part has.
    """

    shape: tuple[int, ...]
    begin: tuple[int, ...]
    size: tuple[int, ...]
    is_first: bool
    start: int

    @classmethod
    def of(cls, tensor: Any) -> Shard:
        """The part of a DTensor, or the whole of another tensor, that is here."""
        shape = tuple(tensor.shape)
        if not is_spread(tensor):
            return cls(shape, (0,) * len(shape), shape, True, 0)
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = tensor.device_mesh, tensor.placements
        with torch.device("cpu"):  # whatever torch.set_default_device() says
            size, begin = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        coordinate = mesh.get_coordinate()
        copies = [
            at for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
        ]
        shards = [
            (at, mesh.size(dim))
            for dim, (at, placement) in enumerate(zip(coordinate, placements, strict=True))
            if not placement.is_replicate()
        ]
        is_one_run = tuple(size[1:]) == shape[1:] or 0 in size
        if is_one_run:
            start = begin[0] * math.prod(shape[1:]) if shape else 0
        else:
            number = 0
            for at, count in shards:
                number = number * count + at
            start = number * -(-math.prod(shape) // math.prod(count for _, count in shards))
        return cls(shape, tuple(begin), tuple(size), not any(copies), start)

    def places(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some elements of the whole are here, and where.

        Args:
            elements: int64 ``[k]``, numbers in row-major order.

        Returns:
            int64, the indices of those that are here in ``elements``, and their numbers in the part.
        """
        here = torch.ones_like(elements, dtype=torch.bool)
        inside = torch.zeros_like(elements)
        below = math.prod(self.shape)
        for whole, begin, size in zip(self.shape, self.begin, self.size, strict=True):
            below //= max(whole, 1)
            at = elements // max(below, 1) % max(whole, 1) - begin
            here &= (at >= 0) & (at < size)
            inside = inside * size + at
        found = here.nonzero().flatten()
        return found, inside[found]
