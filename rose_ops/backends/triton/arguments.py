"""Arguments of the operators, checked before anything is launched, as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rose_ops.backends.triton import words
from rose_ops.backends.triton.launch import BLOCK
from rose_ops.backends.triton.table import (
    CPU,
    Role,
    Table,
    check,
    check_counts,
    check_groups,
    device_of,
    make,
    upload,
)
from rose_ops.definitions import FRACTION_UNIT, Hyper, Mode

_PREPARED = words.PREPARED.value


def _int32(x: int) -> int:
    """The same lower 32 bits: no kernel is compiled again for a number that is larger."""
    return (x + 2**31) % 2**32 - 2**31


def check_fractions(upper: int, lower: int) -> None:
    """Raise RuntimeError unless these are fractions that a ranking keeps."""
    if not 0 <= lower < upper <= FRACTION_UNIT:
        raise RuntimeError(
            f"expected 0 <= lower < upper <= {FRACTION_UNIT} (units of 1e-9); got lower {lower} and "
            f"upper {upper}"
        )


class Ranking(NamedTuple):
    """What is asked of a ranking."""

    mode: Mode
    upper: int
    lower: int
    rank_inactive: bool
    draw: int

    @classmethod
    def of(
        cls, ranking: Sequence[int], record: Tensor | None, may_be_empty: bool = False
    ) -> Ranking | None:
        """None: nothing."""
        if len(ranking) != len(cls._fields) and not (may_be_empty and len(ranking) == 0):
            raise RuntimeError(
                f"ranking has {len(ranking)} numbers; expected {'none or ' if may_be_empty else ''}"
                "mode, upper, lower, rank_inactive and draw"
            )
        if ranking and ranking[0] not in [*Mode]:
            raise RuntimeError(
                f"ranking[0] is {ranking[0]}; expected a mode: given (0), exact, bracket or approx"
            )
        if ranking and ranking[0] != Mode.GIVEN:
            check_fractions(ranking[1], ranking[2])
        if (record is not None) != (len(ranking) > 0 and ranking[0] == Mode.GIVEN):
            what = "not given" if record is None else "given"
            raise RuntimeError(
                f"record is {what}; expected it with a ranking of mode given (0), and with no other"
            )
        if not ranking:
            return None
        mode, upper, lower, rank_inactive, draw = ranking
        return cls(Mode(mode), upper, lower, bool(rank_inactive), draw)

    @property
    def arguments(self) -> dict[str, int]:
        return {"upper": self.upper, "lower": self.lower, "draw": _int32(self.draw)}


class Factors:
    """What gradients are multiplied by, on the device, and whether inactive elements are ranked."""

    def __init__(
        self, inv_scale: Tensor | None, clip: Tensor | None, rank_inactive: bool, device: torch.device
    ) -> None:
        for name, tensor, numel in (("inv_scale", inv_scale, 1), ("clip", clip, 2)):
            if tensor is not None:
                check(name, tensor, torch.float32, numel, device)
        self._inv_scale, self._clip, self._rank_inactive = inv_scale, clip, rank_inactive

    def of(self, table: Table) -> dict[str, Any]:
        """As arguments of kernels: ones where there is nothing."""
        return {
            "inv_scale": table.ones if self._inv_scale is None else self._inv_scale,
            "clip": table.ones if self._clip is None else self._clip,
            "rank_inactive": int(self._rank_inactive),
        }


def _masks(
    order: int, masks: Sequence[Tensor], params: Sequence[Tensor], selective: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Addresses and kinds."""
    name = ("first_masks", "second_masks")[order]
    if not masks:
        return [0] * len(params), [0] * len(params)
    if len(masks) != len(params):
        raise RuntimeError(
            f"{name} has {len(masks)} tensors; expected none or one for each of {len(params)} "
            "parameters"
        )
    kinds = []
    for mask, p, counts in zip(masks, params, selective, strict=True):
        kind = words.MASK_OF_BITS
        if mask.numel() == 0:
            kind = words.MASK_OF_ALL
        elif mask.dtype == torch.bool:
            kind = words.MASK_OF_ONE
            check(name, mask, torch.bool, 1, params[0].device)
        else:
            check(name, mask, torch.uint8, (p.numel() + 7) // 8, params[0].device)
        kinds.append(kind.value if counts else 0)
    return [mask.data_ptr() for mask in masks], kinds


def _check_masks(
    first_masks: list[Tensor], second_masks: list[Tensor], selective: list[bool], ranked: bool
) -> None:
    """Raise RuntimeError unless selective tensors have a mask, and no more than one of each order."""
    if ranked and second_masks:
        raise RuntimeError("both selection and second_masks are given; expected one second-order mask")
    if any(selective) and not first_masks and not second_masks and not ranked:
        raise RuntimeError(
            f"params[{selective.index(True)}] is selective; expected first_masks, second_masks or "
            "a selection"
        )


@dataclass
class UpdatePlan:
    """What an update is asked for, all of it checked; nothing is changed yet."""

    grads: list[Tensor]
    exp_avgs: list[Tensor]
    hyper: Tensor
    group: Tensor
    factors: Factors
    table: Table
    device: torch.device
    arguments: dict[str, Any]  # of kernels

    @classmethod
    def of(
        cls, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor], steps: list[Tensor], first_masks: list[Tensor],
        second_masks: list[Tensor], lr: Tensor, hyper: Tensor, group: Tensor, offsets: Tensor,
        inv_scale: Tensor | None, clip: Tensor | None, found_inf: Tensor | None, gamma: float,
        wanted: Ranking | None, seed: int, stochastic: bool,
    ) -> UpdatePlan:  # fmt: skip
        """See :func:`rose_ops.reference.step_`.

        Raises:
            RuntimeError: something does not fit.
        """
        device, ranked = device_of(params), wanted is not None
        roles = [
            Role("params", words.PARAM, params, True),
            Role("grads", words.GRAD, grads),
            Role("exp_avgs", words.MOMENT, exp_avgs, True),
            Role("exp_avg_sqs", words.SQUARE, exp_avg_sqs, True),
        ]
        check_counts(roles)
        check_groups(hyper, group, len(grads))
        check("offsets", offsets, torch.int64, len(params), CPU)
        check("lr", lr, torch.float64, hyper.numel() // len(Hyper), CPU if lr.is_cpu else device)
        if len(steps) != len(params):
            raise RuntimeError(
                f"steps has {len(steps)} tensors; expected one for each of {len(params)} parameters"
            )
        for step in steps:
            check("steps", step, torch.float32, 1, device)
        if found_inf is not None:
            check("found_inf", found_inf, torch.float32, 1, device)
        factors = Factors(inv_scale, clip, wanted is not None and wanted.rank_inactive, device)
        flags = hyper.reshape(-1, len(Hyper))[:, Hyper.SELECTIVE].tolist()
        selective = [0 <= row < len(flags) and flags[row] != 0 for row in group.tolist()]
        _check_masks(first_masks, second_masks, selective, ranked)
        columns = {words.OFFSET: offsets.tolist(), words.STEP: [step.data_ptr() for step in steps]}
        for order, masks in enumerate((first_masks, second_masks)):
            addresses, kinds = _masks(order, masks, params, selective)
            columns |= {words.MASKS + order: addresses, words.MASK_KINDS + order: kinds}
        table = make(roles, hyper, group, BLOCK, gamma, columns)
        count = len(params)
        arguments = {
            **factors.of(table), "all_rows": table.rows, "count": count, "hyper": table.hyper,
            "lr": upload(lr, device) if lr.is_cpu else lr, "gamma": table.gamma, "seed": _int32(seed),
            "found_inf": table.zero if found_inf is None else found_inf,
            # Written by the first launch, before others read them.
            "prepared": torch.empty(max(count, 1), _PREPARED, dtype=torch.int32, device=device),
            "FRACTIONAL": bool(first_masks) and (ranked or bool(second_masks)), "BY_RISK": ranked,
            "STOCHASTIC": stochastic, "SECOND_ORDER": True, "BLOCK": BLOCK,
        }  # fmt: skip
        return cls(grads, exp_avgs, hyper, group, factors, table, device, arguments)
