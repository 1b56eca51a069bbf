"""Masks of one's own, as ``set_masks()`` takes them: checked, packed, and carried in a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rose_ops.layout import memory_order, packed
from rose_ops.shards import local, part_of

# Under which keys of a parameter's state captured masks are.
MASKS = {kind: f"{kind}_mask" for kind in ("first", "second")}


@dataclass(frozen=True)
class OwnMasks:
    """The masks of one kind.

    Attributes:
        masks: by parameter, bool of its shape or 0-dim (the whole tensor).
        bits: the same as operators read them: one bit per element in memory order, or bool ``[1]``;
            behind the strides of the parameter that this is the order of. Empty where the masks limit
            a ranking.
        keep: whether they stay after the next step.
        limit: whether they say what is ranked; else they are the mask.
    """

    masks: dict[Tensor, Tensor]
    bits: dict[Tensor, tuple[tuple[int, ...], Tensor]]
    keep: bool
    limit: bool

    @classmethod
    def of(cls, masks: Mapping[Tensor, Tensor], keep: bool, limit: bool) -> OwnMasks:
        """Copies of ``masks``, which were checked."""
        copies = {p: mask.detach().clone() for p, mask in masks.items()}
        bits = {} if limit else {p: _bits(p, mask) for p, mask in copies.items()}
        return cls(copies, bits, keep, limit)

    def bits_of(self, p: Tensor) -> Tensor | None:
        """None: there is no mask of it."""
        if p not in self.bits:
            return None
        stride, bits = self.bits[p]
        if stride != local(p).stride():  # as after model.to(memory_format=torch.channels_last)
            _, bits = self.bits[p] = _bits(p, self.masks[p])
        return bits


def _bits(p: Tensor, mask: Tensor) -> tuple[tuple[int, ...], Tensor]:
    part = local(p)
    if mask.dim() == 0 and p.dim() > 0:
        return part.stride(), mask.reshape(1)
    (ordered,) = memory_order(part, (part_of(mask, p),))
    return part.stride(), packed(ordered)


def check_masks(masks: object, groups: list[dict[str, Any]], limit: bool, granularity: str) -> None:
    """Nothing, if ``masks`` can be given to an optimizer of ``groups``.

    Raises:
        TypeError: no mapping, or of something else than bool tensors. ValueError: of other
            parameters, shapes or devices. NotImplementedError: parts of tensors as a limit at tensor
            granularity.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks is a {type(masks).__name__}; expected a mapping of parameters to bool tensors"
        )
    if not masks:
        raise ValueError(
            "masks is empty; expected a mask for at least one parameter (clear_masks() takes them away)"
        )
    rows = {id(p): (row, i) for row, group in enumerate(groups) for i, p in enumerate(group["params"])}
    for p, mask in masks.items():
        if not isinstance(p, Tensor) or id(p) not in rows:
            what = f"of shape {tuple(p.shape)}" if isinstance(p, Tensor) else f"a {type(p).__name__}"
            raise ValueError(f"masks has a key ({what}) that is no parameter of this optimizer")
        row, i = rows[id(p)]
        where = f"the mask of parameter {i} of group {row} (shape {tuple(p.shape)})"
        if not groups[row].get("selective", True):
            raise ValueError(
                f"{where}: its group has selective=False, so it is plain AdamW; leave it out"
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{where} is {got}; expected a bool tensor (True: may be updated)")
        if mask.shape not in (p.shape, torch.Size(())):
            raise ValueError(
                f"{where} has shape {tuple(mask.shape)}; expected the parameter's, or a 0-dim tensor "
                "for all of it"
            )
        if mask.dim() > 0:
            try:
                part_of(mask, p)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if mask.device != p.device:
            raise ValueError(f"{where} is on {mask.device}; expected {p.device}, the parameter's")
        if limit and granularity == "tensor" and mask.dim() > 0:
            raise NotImplementedError(
                f"{where}: limit=True at granularity='tensor' takes whole tensors only; expected a "
                "0-dim bool tensor"
            )


def to_saved(own: Mapping[str, OwnMasks], params: Iterable[Tensor]) -> dict[str, Any]:
    """For a state dict: masks by the parameter's number, in types that ``weights_only=True`` knows."""
    numbers = {id(p): i for i, p in enumerate(params)}
    return {
        kind: {
            "keep": one.keep,
            "limit": one.limit,
            # (Of a parameter that was taken out of its group since, there is none.)
            "masks": {numbers[id(p)]: mask for p, mask in one.masks.items() if id(p) in numbers},
        }
        for kind, one in own.items()
    }


def from_saved(
    saved: Any, groups: list[dict[str, Any]], kinds: Iterable[str], granularity: str
) -> dict[str, OwnMasks]:
    """What :func:`to_saved` made, for an optimizer of ``groups``.

    Raises:
        ValueError: it does not fit; nothing was changed.
    """
    params = [p for group in groups for p in group["params"]]
    # A group may have become selective=False since, where its masks wait.
    groups = [{**group, "selective": True} for group in groups]
    found = {}
    try:
        for kind, one in saved.items():
            if kind not in kinds:
                raise ValueError(f"the order has no {kind!r} mask")
            masks = {params[int(i)]: mask.to(params[int(i)].device) for i, mask in one["masks"].items()}
            if not masks:
                continue
            check_masks(masks, groups, bool(one["limit"]), granularity)
            found[kind] = OwnMasks.of(masks, bool(one["keep"]), bool(one["limit"]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"the state dict has masks that set_masks() would not take: {error}; nothing was loaded"
        ) from error
    return found
