"""Arguments of the operators, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rose_ops.backends.triton import words
from rose_ops.backends.triton.launch import BLOCK
from rose_ops.backends.triton.table import (
    CPU,
    DTYPES,
    Class,
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


class Factors:
    """What gradients are multiplied by, on the device, and whether inactive elements are ranked."""

    def __init__(
        self, inv_scale: Tensor | None, clip: Tensor | None, rank_inactive: bool, device: torch.device
    ) -> None:
        for name, tensor, numel in (("inv_scale", inv_scale, 1), ("clip", clip, 2)):
            if tensor is not None:
                check(name, tensor, torch.float32, numel, device)
        self.inv_scale, self.clip, self.rank_inactive = inv_scale, clip, rank_inactive

    def of(self, table: Table) -> tuple[Tensor, Tensor, int]:
        """As arguments of kernels: ones where there is nothing."""
        scale, clip = (table.ones if t is None else t for t in (self.inv_scale, self.clip))
        return scale, clip, int(self.rank_inactive)


def _mask_columns(
    name: str, masks: Sequence[Tensor], params: Sequence[Tensor], selective: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Addresses and kinds; the masks of tensors that are not selective do not count."""
    if not masks:
        return [0] * len(params), [words.NO_MASK.value] * len(params)
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
        kinds.append((kind if counts else words.NO_MASK).value)
    return [mask.data_ptr() for mask in masks], kinds


def _check_masks(
    first_masks: list[Tensor], second_masks: list[Tensor], selective: list[bool], from_risk: bool
) -> None:
    """Raise RuntimeError unless selective tensors have a mask, and no more than one of each order."""
    if from_risk and second_masks:
        raise RuntimeError("both record and second_masks are given; expected one second-order mask")
    if any(selective) and not first_masks and not second_masks and not from_risk:
        raise RuntimeError(
            f"params[{selective.index(True)}] is selective; expected first_masks, second_masks or "
            "a selection"
        )


class Update:
    """The arguments of an update, checked, and its workspaces."""

    def __init__(
        self, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor], steps: list[Tensor], first_masks: list[Tensor],
        second_masks: list[Tensor], lr: Tensor, hyper: Tensor, group: Tensor, offsets: Tensor,
        inv_scale: Tensor | None, clip: Tensor | None, found_inf: Tensor | None, gamma: float,
        wanted: Ranking | None, seed: int, stochastic: bool,
    ) -> None:  # fmt: skip
        device, from_risk = device_of(params), wanted is not None
        self.device = device
        roles = [
            Role("params", params, True), Role("grads", grads), Role("exp_avgs", exp_avgs, True),
            Role("exp_avg_sqs", exp_avg_sqs, True),
        ]  # fmt: skip
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
        self.factors = Factors(inv_scale, clip, wanted is not None and wanted.rank_inactive, device)
        if found_inf is not None:
            check("found_inf", found_inf, torch.float32, 1, device)
        flags = hyper.reshape(-1, len(Hyper))[:, Hyper.SELECTIVE].tolist()
        selective = [0 <= row < len(flags) and flags[row] != 0 for row in group.tolist()]
        _check_masks(first_masks, second_masks, selective, from_risk)
        firsts, first_kinds = _mask_columns("first_masks", first_masks, params, selective)
        seconds, second_kinds = _mask_columns("second_masks", second_masks, params, selective)
        columns = {
            words.OFFSET.value: offsets.tolist(),
            words.MASKS.value: firsts,
            words.MASKS.value + 1: seconds,
            words.MASK_KINDS.value: first_kinds,
            words.MASK_KINDS.value + 1: second_kinds,
            words.STEP.value: [step.data_ptr() for step in steps],
        }
        extra = [gamma, float(seed % 2**32)]
        table = self.table = make(roles, hyper, group, BLOCK, extra, columns)
        fractional = bool(first_masks) and (from_risk or bool(second_masks))
        self.weights = (1, 2) if fractional else (3, 3)
        self.rules_out = not from_risk and words.MASK_OF_ONE.value in first_kinds + second_kinds
        self.found = table.zero if found_inf is None else found_inf
        self.stochastic, self.fractional = stochastic, fractional
        # Written by the first launch, before others read them.
        count = self.count = len(params)
        self.prepared = torch.empty(max(count, 1), words.PREPARED.value, device=device)
        self.keys = torch.empty(max(count, 1), 2, dtype=torch.int32, device=device)
        self.lr = upload(lr, device) if lr.is_cpu else lr

    def of(self, c: Class) -> dict[str, Any]:
        """Constants of kernels that update a class."""
        dtypes = {f"D{i}": dtype for i, dtype in enumerate(c.dtypes)}
        return {
            **dtypes, "LINEAR": c.linear, "ALIGNED": c.aligned, "FRACTIONAL": self.fractional,
            "STOCHASTIC": self.stochastic and c.dtypes[0] == DTYPES[torch.bfloat16], "BLOCK": BLOCK,
        }  # fmt: skip
