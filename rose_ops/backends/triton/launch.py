"""How kernels are launched: where, how many programs, and with which options."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton import knobs

from rose_ops.backends.triton.access import KERNELS

INTERPRETED = bool(knobs.runtime.interpret)

# Elements of a tile. The interpreter has a price for each tile; a GPU wants 16 bytes for each thread,
# and more where each tile takes a histogram.
BLOCK = 1 << 14 if INTERPRETED else 512
SELECT_BLOCK = 1 << 14 if INTERPRETED else 1024
# Lines of the sample at a time: drawn, and counted.
DRAWN_LINES, COUNTED_LINES = (1024, 1024) if INTERPRETED else (32, 64)


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
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


def programs_for(tiles: int, device: torch.device, each: int = 8) -> int:
    """Programs that walk the tiles: ``each`` for each multiprocessor."""
    resident = 3
    if device.type == "cuda":
        resident = each * torch.cuda.get_device_properties(device).multi_processor_count
    elif not INTERPRETED:
        resident = 2048
    return max(1, min(tiles, resident))


def _options(kernel: Any) -> dict[str, Any]:
    """What to launch a kernel with: all that Triton knows on this machine."""
    _, options = KERNELS[kernel.fn.__name__]
    if torch.version.cuda is None:  # a limit to registers is NVIDIA's
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    return options


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """So many programs of a kernel, on the current device."""
    kernel[(programs,)](*args, **constants, **_options(kernel))
