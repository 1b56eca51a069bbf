"""Where and in which precision models run."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rose_ops.backends import BACKENDS
from rose_ops.finetune import UserError


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision models run."""

    device: torch.device
    precision: Literal["float32", "bfloat16"]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"
        )


def choose_runtime(device: str, precision: str) -> Runtime:
    """Resolve `"auto"`: a GPU that the optimizer runs on, bfloat16 where the hardware multiplies it."""
    if device == "auto":
        usable = any("cuda" in x.devices and x.why_not() is None for x in BACKENDS.values())
        device = "cuda" if usable and torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.empty((), device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {error}") from error
    if chosen.type == "meta":
        raise UserError("--device meta has no memory to train in; expected cpu or cuda")
    if precision == "auto":
        if chosen.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            capabilities: dict[str, Any] = {}
            if hasattr(torch.cpu, "get_capabilities"):  # newer than the oldest torch we support
                capabilities |= torch.cpu.get_capabilities()
            fast = any(capabilities.get(x) for x in ("amx_bf16", "avx512_bf16", "bf16"))
        precision = "bfloat16" if fast else "float32"
    return Runtime(chosen, "bfloat16" if precision == "bfloat16" else "float32")
