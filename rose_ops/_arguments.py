"""What operators of Python look at before they touch a tensor; ``csrc/data.h`` is that of C++."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Those of an argument, and what they are called."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, tensor in enumerate(value):
            if isinstance(tensor, Tensor):
                yield f"{name}[{i}]", tensor


def check_memory(name: str, value: object) -> None:
    """Nothing, if the storages of an argument's tensors hold all their elements.

    Raises:
        RuntimeError: one was freed or made smaller since. PyTorch itself would read beyond it.
    """
    for what, tensor in _tensors(name, value):
        numel = tensor.numel()
        if numel == 0 or tensor.is_meta:
            continue
        count = tensor.storage_offset() + numel
        if not tensor.is_contiguous():
            ends = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            count = tensor.storage_offset() + sum(ends) + 1
        size, needed = tensor.untyped_storage().nbytes(), count * tensor.element_size()
        if needed > size:
            raise RuntimeError(
                f"{what} has a storage of {size} bytes and needs {needed}: it was freed or made "
                "smaller, as FSDP does with resize_(0); step where parameters, gradients and state are "
                "materialized"
            )


def without_negation(name: str, value: Any, is_written: bool) -> Any:
    """An argument as memory has it: with lazy negation (``imag`` of a conjugate) carried out.

    Raises:
        RuntimeError: that is of a tensor to be written, whose memory holds the negated values.
    """
    negated = [what for what, tensor in _tensors(name, value) if tensor.is_neg()]
    if not negated:
        return value
    if is_written:
        raise RuntimeError(
            f"{negated[0]} is lazily negated (its is_neg() is true) and cannot be updated in place; "
            "expected a tensor that is not (use .resolve_neg())"
        )
    return value.resolve_neg() if isinstance(value, Tensor) else [t.resolve_neg() for t in value]


def checks_memory(function: Callable[P, T]) -> Callable[P, T]:
    """Of an operator: :func:`check_memory` of all its arguments first."""
    names = [*inspect.signature(function).parameters]

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            check_memory(name, value)
        return function(*args, **kwargs)

    return wrapper


def reads_pointers(*written: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Of an operator that hands addresses to kernels, and writes what is called so."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        names = [*inspect.signature(function).parameters]

        @wraps(function)
        def resolved(*args: Any, **kwargs: Any) -> T:
            given = [
                without_negation(name, value, name in written)
                for name, value in zip(names, args, strict=False)
            ]
            named = {
                name: without_negation(name, value, name in written) for name, value in kwargs.items()
            }
            return function(*given, **named)

        return checks_memory(resolved)

    return decorate


_libraries: list[torch.library.Library] = []  # registrations last as long as these


def register_negation(ops: list[torch._ops.OpOverload]) -> None:
    """For operators of one library: PyTorch's own way refuses without saying which argument."""
    library = torch.library.Library(ops[0].namespace, "IMPL", "Negative")
    for op in ops:
        library.impl(op._schema.name.partition("::")[2], _negation(op))
    _libraries.append(library)


def _negation(op: torch._ops.OpOverload) -> Callable[..., Any]:
    arguments = op._schema.arguments

    def kernel(*args: Any) -> Any:
        pairs = [*zip(arguments, args, strict=False)]  # defaults at the end are left out
        for argument, value in pairs:
            check_memory(argument.name, value)
        return op(*(without_negation(a.name, value, a.is_write) for a, value in pairs))

    return kernel
