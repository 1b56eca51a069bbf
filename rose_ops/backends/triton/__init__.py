"""The operators as Triton kernels: no nvcc is needed, and any vendor's GPU will do.

Signatures and results are those of :mod:`rose_ops.reference`. With ``TRITON_INTERPRET=1`` in the
environment (before this is imported) the kernels are interpreted, on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton import knobs

from rose_ops.backends.triton import kernels
from rose_ops.backends.triton.table import (
    ALL,
    BITS,
    NO_MASK,
    WHOLE,
    Class,
    Role,
    Table,
    check,
    check_counts,
    check_groups,
    make,
)
from rose_ops.reference import FRACTION_UNIT, Field, keeps_denormals

INTERPRETED = bool(knobs.runtime.interpret)

# Elements of a tile. The interpreter has a price for each tile; a GPU wants 16 bytes for each thread,
# of which there are 256 where they share a histogram, and 128 elsewhere.
BLOCK = 1 << 14 if INTERPRETED else 512
SELECT_BLOCK = 1 << 14 if INTERPRETED else 1024
_STATE = 16 + 2 * 2048


@contextlib.contextmanager
def _on(device: torch.device):
    """Launch there: Triton would use the current device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    elif INTERPRETED:  # NumPy says so when it computes with inf and NaN
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    else:
        yield


def _programs(tiles: int, device: torch.device) -> int:
    """Programs that walk the tiles: a few for each multiprocessor."""
    resident = 3
    if device.type == "cuda":
        resident = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    elif not INTERPRETED:
        resident = 2048
    return max(1, min(tiles, resident))


def _launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


def _check(name: str, tensor: Tensor | None, numel: int, device: torch.device) -> None:
    if tensor is not None:
        check(name, tensor, torch.float32, numel, device)


class _Factors:
    """What gradients are multiplied by, on the device; None is checked, and costs nothing."""

    def __init__(self, inv_scale: Tensor | None, clip: Tensor | None, device: torch.device) -> None:
        _check("inv_scale", inv_scale, 1, device)
        _check("clip", clip, 2, device)
        self.inv_scale, self.clip = inv_scale, clip

    def pointers(self, table: Table) -> tuple[Tensor, Tensor]:
        return tuple(table.hyper if t is None else t for t in (self.inv_scale, self.clip))

    def constants(self) -> dict[str, Any]:
        return {"SCALED": self.inv_scale is not None, "CLIPPED": self.clip is not None}


def _risk_constants(
    c: Class, second: bool, rank_inactive: bool, factors: _Factors
) -> dict[str, Any]:
    return {
        "D0": c.dtypes[0],
        "D1": c.dtypes[-1],
        "LINEAR": c.linear,
        "ALIGNED": c.aligned,
        "SECOND": second,
        "RANK_INACTIVE": rank_inactive,
        **factors.constants(),
    }


def _resolved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Lazy negation carried out: the kernels read memory."""
    return [t.resolve_neg() for t in tensors]


def _risk_roles(grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> list[Role]:
    return [Role("grads", grads), *([Role("exp_avgs", exp_avgs)] if exp_avgs else [])]


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


@keeps_denormals
def select(
    grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor, inv_scale: Tensor | None,
    clip: Tensor | None, upper: int, lower: int, rank_inactive: bool, approx: bool,
) -> Tensor:  # fmt: skip
    """See :func:`rose_ops.reference.select`."""
    if not 0 <= lower < upper <= FRACTION_UNIT:
        raise RuntimeError(
            f"expected 0 <= lower < upper <= {FRACTION_UNIT} (units of 1e-9); got lower {lower} and "
            f"upper {upper}"
        )
    grads = _resolved(grads)
    table = make(_risk_roles(grads, exp_avgs), hyper, group, SELECT_BLOCK)
    device = _device(grads)
    factors = _Factors(inv_scale, clip, device)
    state = torch.zeros(_STATE + Field.SIZE, dtype=torch.int64, device=device)
    record = state[_STATE:]
    programs = [_programs(c.tiles, device) for c in table.classes]
    passes = 1 if approx else 3
    with _on(device):
        for i in range(passes):
            for c, own in zip(table.classes, programs, strict=True):
                _launch(
                    kernels._select_kernel, own, c.rows, c.tile_rows, c.tiles, table.dims, table.hyper,
                    *factors.pointers(table), state, record, upper, lower, sum(programs), PASS=i,
                    LAST=i == passes - 1, APPROX=approx, BLOCK=SELECT_BLOCK, num_warps=8,
                    **_risk_constants(c, bool(exp_avgs), rank_inactive, factors),
                )  # fmt: skip
    return record


@keeps_denormals
def capture_(
    masks: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor,
    inv_scale: Tensor | None, clip: Tensor | None, selection: Tensor, rank_inactive: bool,
) -> None:  # fmt: skip
    """See :func:`rose_ops.reference.capture_`."""
    device = _device(grads)
    check_counts(_risk_roles(grads, exp_avgs))
    if len(masks) != len(grads):
        raise RuntimeError(
            f"masks has {len(masks)} tensors; expected one for each of {len(grads)} gradients"
        )
    for mask, g in zip(masks, grads, strict=True):
        check("masks", mask, torch.uint8, (g.numel() + 7) // 8, device)
    check("selection", selection, torch.int64, Field.SIZE, device)
    factors = _Factors(inv_scale, clip, device)
    grads = _resolved(grads)
    columns = {11: [mask.data_ptr() for mask in masks]}
    table = make(_risk_roles(grads, exp_avgs), hyper, group, BLOCK, columns=columns)
    with _on(device):
        for c in table.classes:
            _launch(
                kernels._capture_kernel, _programs(c.tiles, device), c.rows, c.tile_rows, c.tiles,
                table.dims, table.hyper, *factors.pointers(table), selection, BLOCK=BLOCK,
                **_risk_constants(c, bool(exp_avgs), rank_inactive, factors),
            )  # fmt: skip


def _mask_columns(
    name: str, masks: Sequence[Tensor], params: Sequence[Tensor], selective: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Addresses and kinds."""
    if not masks:
        return [0] * len(params), [NO_MASK] * len(params)
    if len(masks) != len(params):
        raise RuntimeError(
            f"{name} has {len(masks)} tensors; expected none or one for each of {len(params)} "
            "parameters"
        )
    kinds = []
    for mask, p, counts in zip(masks, params, selective, strict=True):
        kind = ALL if mask.numel() == 0 else WHOLE if mask.dtype == torch.bool else BITS
        if kind == WHOLE:
            check(name, mask, torch.bool, 1, params[0].device)
        elif kind == BITS:
            check(name, mask, torch.uint8, (p.numel() + 7) // 8, params[0].device)
        kinds.append(kind if counts else NO_MASK)
    return [mask.data_ptr() for mask in masks], kinds


@keeps_denormals
def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], first_masks: list[Tensor], second_masks: list[Tensor],
    selection: Tensor | None, lr: Tensor, hyper: Tensor, group: Tensor, offsets: Tensor,
    inv_scale: Tensor | None, clip: Tensor | None, found_inf: Tensor | None, gamma: float,
    rank_inactive: bool, seed: int, stochastic: bool,
) -> Tensor:  # fmt: skip
    """See :func:`rose_ops.reference.adamw_`."""
    device = _device(params)
    cpu = torch.device("cpu")
    grads = _resolved(grads)
    roles = [
        Role("params", params, True), Role("grads", grads), Role("exp_avgs", exp_avgs, True),
        Role("exp_avg_sqs", exp_avg_sqs, True),
    ]  # fmt: skip
    check_counts(roles)
    check_groups(hyper, group, len(grads))
    check("offsets", offsets, torch.int64, len(params), cpu)
    check("lr", lr, torch.float64, hyper.numel() // 6, cpu if lr.is_cpu else device)
    if len(steps) != len(params):
        raise RuntimeError(
            f"steps has {len(steps)} tensors; expected one for each of {len(params)} parameters"
        )
    for step in steps:
        check("steps", step, torch.float32, 1, device)
    if selection is not None:
        if second_masks:
            raise RuntimeError(
                "both selection and second_masks are given; expected one second-order mask"
            )
        check("selection", selection, torch.int64, Field.SIZE, device)
    factors = _Factors(inv_scale, clip, device)
    _check("found_inf", found_inf, 1, device)
    has_second = selection is not None or bool(second_masks)
    flags = hyper.reshape(-1, 6)[:, 5].tolist()
    selective = [0 <= row < len(flags) and flags[row] != 0 for row in group.tolist()]
    if any(selective) and not first_masks and not has_second:
        raise RuntimeError(
            f"params[{selective.index(True)}] is selective; expected first_masks, second_masks or a "
            "selection"
        )
    firsts, first_kinds = _mask_columns("first_masks", first_masks, params, selective)
    seconds, second_kinds = _mask_columns("second_masks", second_masks, params, selective)
    columns = {
        2: offsets.tolist(), 7: firsts, 8: seconds, 9: first_kinds, 10: second_kinds,
        12: [step.data_ptr() for step in steps],
    }  # fmt: skip
    rates = lr.tolist() if lr.is_cpu else []
    extra = [gamma, float(seed % 2**32), *rates]
    table = make(roles, hyper, group, BLOCK, extra, columns)
    fractional = bool(first_masks) and has_second
    weights = (1, 2) if fractional else (3, 3)
    rules_out = selection is None and WHOLE in first_kinds + second_kinds
    found = table.hyper if found_inf is None else found_inf
    with _on(device):
        # Workspaces are written by the first kernel before the second reads them.
        count = max(len(params), 1)
        prepared = torch.empty(count, 16, device=device)
        keys = torch.empty(count, 2, dtype=torch.int32, device=device)
        counts = torch.empty(2, dtype=torch.int64, device=device)
        _launch(
            kernels._prepare_kernel, count, table.rows, len(params), table.hyper,
            table.extra[2:] if lr.is_cpu else lr, found, prepared, keys, counts, table.extra,
            table.extra[1:], *weights, RULES_OUT=rules_out, FOUND=found_inf is not None,
        )  # fmt: skip
        for c in table.classes:
            _launch(
                kernels._update_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles,
                table.dims, table.hyper, *factors.pointers(table), found,
                counts if selection is None else selection, prepared, keys, counts, *weights,
                D0=c.dtypes[0], D1=c.dtypes[1], D2=c.dtypes[2], D3=c.dtypes[3], LINEAR=c.linear,
                ALIGNED=c.aligned, FRACTIONAL=fractional, FROM_RISK=selection is not None,
                HAS_FIRST=bool(first_masks), HAS_SECOND=bool(second_masks), RULES_OUT=rules_out,
                RANK_INACTIVE=rank_inactive, STOCHASTIC=stochastic, FOUND=found_inf is not None,
                BLOCK=BLOCK, **factors.constants(),
            )  # fmt: skip
    return counts


@keeps_denormals
def sums_of_squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """See :func:`rose_ops.reference.sums_of_squares`."""
    device = _device(tensors)
    factors = _Factors(inv_scale, None, device)
    hyper, group = torch.zeros(1, 6, dtype=torch.float64), torch.zeros(len(tensors), dtype=torch.int64)
    tensors = _resolved(tensors)
    table: Table = make([Role("tensors", tensors)], hyper, group, BLOCK)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    if not tensors:
        return sums
    partial = torch.empty(table.tiles + 1, dtype=torch.float64, device=device)
    with _on(device):
        for c in table.classes:
            _launch(
                kernels._squares_kernel, _programs(c.tiles, device), c.rows, c.tile_rows, c.tiles,
                table.dims, factors.pointers(table)[0], partial, c.base, D0=c.dtypes[0],
                LINEAR=c.linear, ALIGNED=c.aligned, SCALED=inv_scale is not None, BLOCK=BLOCK,
            )  # fmt: skip
            _launch(
                kernels._sums_kernel, len(c.rows), c.rows, partial, c.base, sums, BLOCK=BLOCK, PARTS=256
            )
    return sums
