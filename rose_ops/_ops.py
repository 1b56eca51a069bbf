"""Loads the operator library and gives every operator its fake (meta) implementation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rose_ops.reference import Field

_LIBRARY = Path(__file__).with_name("_C.abi3.so")

load_error: str | None = None
"""Why ``torch.ops.rose_ops`` is not there; None if it is."""

try:
    torch.ops.load_library(_LIBRARY)
except (OSError, RuntimeError) as error:
    hint = (
        f"it was built against another PyTorch than {torch.__version__}: rebuild it"
        if _LIBRARY.exists()
        else "it was not built"
    )
    load_error = (
        f"the compiled operators could not be loaded from {_LIBRARY.name}: {hint} with "
        f"`pip install --no-build-isolation .` in the source tree ({error})"
    )
else:

    @torch.library.register_fake("rose_ops::select")
    def _(grads, exp_avgs, hyper, *_rest) -> Tensor:
        return hyper.new_empty(Field.SIZE, dtype=torch.int64)

    @torch.library.register_fake("rose_ops::capture_")
    def _(*_args) -> None:
        return None

    @torch.library.register_fake("rose_ops::adamw_")
    def _(params, grads, exp_avgs, exp_avg_sqs, steps, first, second, selection, lr, *_rest) -> Tensor:
        return lr.new_empty(2, dtype=torch.int64)

    @torch.library.register_fake("rose_ops::tensor_norms")
    def _(tensors, inv_scale) -> Tensor:
        return torch.empty(len(tensors), device=tensors[0].device if tensors else None)
