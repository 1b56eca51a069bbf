"""Loads the operator library and gives every operator its fake (meta) implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rose_ops._arguments import register_negation
from rose_ops.definitions import Field
from rose_ops.portable import count_keys, counted

_LIBRARY = Path(__file__).with_name("_C.abi3.so")

load_error: str | None = None
"""Why ``torch.ops.rose_ops`` is not there; None if it is."""

# What every operator returns: how many numbers, from its arguments, of which dtype.
_RESULTS: dict[str, tuple[Callable[..., int], torch.dtype]] = {
    "rank_": (lambda *_: Field.SIZE, torch.int64),
    "step_": (lambda *_: Field.SIZE + 2, torch.int64),
    "count_keys": (lambda *args: counted(args[-1]), torch.int64),
    "sums_of_squares": (lambda tensors, _: len(tensors), torch.float64),
    "clip_factors": (lambda *_: 3, torch.float32),
    "select_tensors_": (lambda *_: Field.SIZE, torch.int64),
}
OPERATORS = tuple(_RESULTS)

_TABLES = ("lr", "hyper", "group", "offsets")  # arguments that may be on the CPU, whatever the device


def _device_of(arguments: dict[str, Any]) -> torch.device | None:
    """The device of an operator's arguments.

    Raises:
        RuntimeError: they are not all on one device (a single one on "meta" would send the others
            here, too), or a table is neither there nor on the CPU.
    """
    places: dict[torch.device, list[str]] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in _TABLES:
            places.setdefault(value.device, []).append(name)
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else ()):
            if isinstance(tensor, Tensor):
                places.setdefault(tensor.device, []).append(f"{name}[{i}]")
    for name in _TABLES:
        table = arguments.get(name)
        if table is not None and (table.device.type != "cpu" or set(places) <= {table.device}):
            places.setdefault(table.device, []).append(name)
    if len(places) > 1:
        device, names = min(places.items(), key=lambda place: (len(place[1]), str(place[0]) != "meta"))
        raise RuntimeError(
            f"{names[0]} is on {device} and other tensors are not; expected all tensors on one device "
            "(hyper, group and offsets on the CPU)"
        )
    return next(iter(places), None)


def _fake(op: torch._ops.OpOverload) -> Callable[..., Tensor]:
    names = [argument.name for argument in op._schema.arguments]
    size, dtype = _RESULTS[op._schema.name.partition("::")[2]]

    def fake(*args: Any) -> Tensor:
        device = _device_of(dict(zip(names, args, strict=True)))
        return torch.empty(size(*args), dtype=dtype, device=device)

    return fake


def register(namespace: str) -> None:
    """What Python adds to the operators of a library that has those of csrc/operators.h."""
    ops = [getattr(getattr(torch.ops, namespace), name).default for name in OPERATORS]
    for op in ops:
        torch.library.register_fake(op, _fake(op))
    register_negation(ops)


@contextmanager
def bracket_width(ops: Any, width: float) -> Iterator[None]:
    """For tests, and the doctor: in the block, half-widths of the brackets of ``ops`` are multiplied by
    ``width``. With anything but 1, one pass is taken even where there is so little data that two are
    faster."""
    before = ops._set_bracket_width(width)
    try:
        yield
    finally:
        ops._set_bracket_width(before)


try:
    torch.ops.load_library(_LIBRARY)
    # It counts without a kernel of its own, and without waiting for the device.
    torch.library.impl("rose_ops::count_keys", "CUDA", count_keys)
    register("rose_ops")  # fails if the library is of another version, and lacks an operator
except (OSError, RuntimeError, AttributeError) as error:
    reason = (
        f"it was built against another PyTorch than {torch.__version__} or from other sources"
        if _LIBRARY.exists()
        else "it was not built"
    )
    load_error = (
        f"the compiled operators could not be loaded from {_LIBRARY.name}: {reason}; build it with "
        f"`pip install --no-build-isolation .` in the source tree ({error})"
    )
