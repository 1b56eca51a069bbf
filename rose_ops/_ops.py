"""Loads the operator library and gives every operator its fake (meta) implementation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rose_ops._arguments import register_negation
from rose_ops.reference import Field

_LIBRARY = Path(__file__).with_name("_C.abi3.so")

load_error: str | None = None
"""Why ``torch.ops.rose_ops`` is not there; None if it is."""


def _check_devices(
    tables: dict[str, Tensor], **data: list[Tensor] | Tensor | None
) -> torch.device | None:
    """The device of ``data``.

    Raises:
        RuntimeError: they are not all on one device (a single one on "meta" would send the others
            here, too), or one of ``tables`` is neither there nor on the CPU.
    """
    places: dict[torch.device, list[str]] = {}
    for name, value in data.items():
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(name)
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else ()):
            places.setdefault(tensor.device, []).append(f"{name}[{i}]")
    for name, table in tables.items():
        if table.device.type != "cpu" or set(places) <= {table.device}:
            places.setdefault(table.device, []).append(name)
    if len(places) > 1:
        device, names = min(places.items(), key=lambda place: (len(place[1]), str(place[0]) != "meta"))
        raise RuntimeError(
            f"{names[0]} is on {device} and other tensors are not; expected all tensors on one device "
            "(hyper, group and offsets on the CPU)"
        )
    return next(iter(places), None)


def register_fakes(namespace: str = "rose_ops") -> None:
    """For the operators of a library with the schemas of csrc/schemas.h."""

    @torch.library.register_fake(f"{namespace}::select")
    def _(grads, exp_avgs, hyper, group, inv_scale, clip, *_settings) -> Tensor:
        device = _check_devices(
            {"hyper": hyper, "group": group},
            grads=grads,
            exp_avgs=exp_avgs,
            inv_scale=inv_scale,
            clip=clip,
        )
        return torch.empty(Field.SIZE, dtype=torch.int64, device=device)

    @torch.library.register_fake(f"{namespace}::capture_")
    def _(masks, grads, exp_avgs, hyper, group, inv_scale, clip, selection, *_settings) -> None:
        _check_devices(
            {"hyper": hyper, "group": group},
            masks=masks,
            grads=grads,
            exp_avgs=exp_avgs,
            inv_scale=inv_scale,
            clip=clip,
            selection=selection,
        )

    @torch.library.register_fake(f"{namespace}::adamw_")
    def _(
        params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, second_masks, selection, lr, hyper,
        group, offsets, inv_scale, clip, found_inf, *_settings,
    ) -> Tensor:  # fmt: skip
        device = _check_devices(
            {"lr": lr, "hyper": hyper, "group": group, "offsets": offsets},
            params=params,
            grads=grads,
            exp_avgs=exp_avgs,
            exp_avg_sqs=exp_avg_sqs,
            steps=steps,
            first_masks=first_masks,
            second_masks=second_masks,
            selection=selection,
            inv_scale=inv_scale,
            clip=clip,
            found_inf=found_inf,
        )
        return torch.empty(2, dtype=torch.int64, device=device)

    @torch.library.register_fake(f"{namespace}::bracket_adamw_")
    def _(
        params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, lr, hyper, group, offsets, inv_scale,
        clip, found_inf, *_settings,
    ) -> Tensor:  # fmt: skip
        device = _check_devices(
            {"lr": lr, "hyper": hyper, "group": group, "offsets": offsets},
            params=params,
            grads=grads,
            exp_avgs=exp_avgs,
            exp_avg_sqs=exp_avg_sqs,
            steps=steps,
            first_masks=first_masks,
            inv_scale=inv_scale,
            clip=clip,
            found_inf=found_inf,
        )
        return torch.empty(Field.SIZE + 2, dtype=torch.int64, device=device)

    @torch.library.register_fake(f"{namespace}::bracket_capture_")
    def _(masks, grads, exp_avgs, hyper, group, inv_scale, clip, *_settings) -> Tensor:
        device = _check_devices(
            {"hyper": hyper, "group": group},
            masks=masks,
            grads=grads,
            exp_avgs=exp_avgs,
            inv_scale=inv_scale,
            clip=clip,
        )
        return torch.empty(Field.SIZE, dtype=torch.int64, device=device)

    @torch.library.register_fake(f"{namespace}::sums_of_squares")
    def _(tensors, inv_scale) -> Tensor:
        device = _check_devices({}, tensors=tensors, inv_scale=inv_scale)
        return torch.empty(len(tensors), dtype=torch.float64, device=device)

    @torch.library.register_fake(f"{namespace}::clip_factors")
    def _(sums, max_norm) -> Tensor:
        return sums.new_empty(3, dtype=torch.float32)

    @torch.library.register_fake(f"{namespace}::select_tensors_")
    def _(mask, sums, exp_avg_sums, hyper, group, clip, *_settings) -> Tensor:
        device = _check_devices(
            {"hyper": hyper, "group": group},
            mask=mask,
            sums=sums,
            exp_avg_sums=exp_avg_sums,
            clip=clip,
        )
        return torch.empty(Field.SIZE, dtype=torch.int64, device=device)


try:
    torch.ops.load_library(_LIBRARY)
    register_fakes()  # fails if the library is of another version, and lacks an operator
    register_negation("rose_ops")
except (OSError, RuntimeError) as error:
    reason = (
        f"it was built against another PyTorch than {torch.__version__} or from other sources"
        if _LIBRARY.exists()
        else "it was not built"
    )
    load_error = (
        f"the compiled operators could not be loaded from {_LIBRARY.name}: {reason}; build it with "
        f"`pip install --no-build-isolation .` in the source tree ({error})"
    )
