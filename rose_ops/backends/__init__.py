"""Which implementations of the operators exist, and which can be used for a device and why not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rose_ops import _ops, reference


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what users pass as ``backend=``.
        devices: device types it runs on.
        load: returns its ``ops``, a namespace with the operators of :mod:`rose_ops.reference`.
        why_not: returns why it cannot be used on this machine, or None if it can.
    """

    name: str
    devices: frozenset[str]
    load: Callable[[], Any]
    why_not: Callable[[], str | None]

    @property
    def ops(self) -> Any:
        return self.load()


def _compiled() -> Any:
    return torch.ops.rose_ops


# Interpreted, Triton's kernels run on the CPU, and nowhere else.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_DEVICES = frozenset({"cpu"} if _INTERPRETED else {"cuda", "xpu"})


def _load_triton() -> Any:
    return importlib.import_module("rose_ops.backends.triton")


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with `pip install triton` (the extra [triton])"
    if not _INTERPRETED and not torch.cuda.is_available() and not torch.xpu.is_available():
        return "PyTorch finds no GPU here (no driver, or a PyTorch built without one)"
    try:
        return _load_triton().why_not()
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"Triton's kernels could not be imported: {error}"


def _why_not_cuda() -> str | None:
    if _ops.load_error is not None:
        return _ops.load_error
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs, and this PyTorch is for ROCm"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("rose_ops::select", "CUDA"):
        return (
            "the library was built without CUDA kernels; reinstall it from the source tree where there "
            "is an nvcc, with `ROSE_CUDA=1 pip install --no-build-isolation .`"
        )
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here (no driver, or a PyTorch built without CUDA)"
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", frozenset({"cuda"}), _compiled, _why_not_cuda),
        Backend("triton", _TRITON_DEVICES, _load_triton, _why_not_triton),
        Backend("cpu", frozenset({"cpu"}), _compiled, lambda: _ops.load_error),
        Backend("reference", frozenset({"cpu"}), lambda: reference, lambda: None),
    )
}
"""In the order in which ``"auto"`` tries them."""

NAMES = ("auto", *BACKENDS)

# What has no memory (parameters on "meta", or in FakeTensorMode, as estimators of memory use them): the
# operators' fakes, whatever device it pretends to be on.
_FAKE = Backend("fake", frozenset({"meta"}), _compiled, lambda: _ops.load_error)


def resolve(name: str, device: torch.device, *, fake: bool = False) -> Backend:
    """The backend to use for tensors on ``device``; ``fake`` ones only look as if they were there.

    Raises:
        ValueError: ``name`` is no backend, or does not run on ``device``.
        NotImplementedError: there is no backend for ``device``.
        RuntimeError: the backend asked for, or every one for ``device``, cannot be used here.
    """
    if name not in NAMES:
        raise ValueError(
            f"backend={name!r} ({type(name).__name__}); expected one of {', '.join(map(repr, NAMES))}"
        )
    if fake or device.type == "meta":
        if (reason := _FAKE.why_not()) is not None:
            raise RuntimeError(f"parameters without memory cannot be stepped over: {reason}")
        return _FAKE
    if name != "auto":
        backend = BACKENDS[name]
        if device.type not in backend.devices:
            raise ValueError(
                f"backend={name!r} runs on {', '.join(sorted(backend.devices))}, and the parameters "
                f"are on {device}; move them, or use backend='auto'"
            )
        if (reason := backend.why_not()) is not None:
            raise RuntimeError(f"backend={name!r} cannot be used: {reason}")
        return backend
    return _first_usable(device.type)


@cache  # so that it is said once what was chosen instead
def _first_usable(device_type: str) -> Backend:
    reasons: list[str] = []
    for backend in BACKENDS.values():
        if device_type not in backend.devices or (backend.name == "triton" and device_type == "cpu"):
            continue
        if (reason := backend.why_not()) is None:
            if reasons:
                slow = "slow " if backend.name == "reference" else ""
                warnings.warn(
                    f"rose_ops uses the {slow}backend {backend.name!r}: " + "; ".join(reasons),
                    stacklevel=2,
                )
            return backend
        reasons.append(f"{backend.name!r}: {reason}")
    if reasons:
        raise RuntimeError(
            f"rose_ops has no usable backend for {device_type} parameters: " + "; ".join(reasons)
        )
    known = sorted(set().union(*(backend.devices for backend in BACKENDS.values())))
    raise NotImplementedError(
        f"rose_ops has no backend for {device_type} parameters; move the model to one of: "
        + ", ".join(known)
    )
