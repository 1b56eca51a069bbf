"""Where and on what a result was measured."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import cpuinfo
import psutil
import torch

import rose_ops
from benchmarks.device import Device, version

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def describe(device: Device) -> dict[str, object]:
    """Columns that are the same in every row of a result."""
    info = cpuinfo.get_cpu_info()
    return {
        "machine": f"{info.get('brand_raw', platform.processor())} ({platform.system()} "
        f"{platform.machine()}, {psutil.virtual_memory().total / 2**30:.0f} GiB)",
        **device.describe(),
        "cores": psutil.cpu_count(logical=False),
        "isa": torch.backends.cpu.get_cpu_capability(),  # that torch's own kernels were chosen for
        "cpu_flags": " ".join(flag for flag in _FLAGS if flag in info.get("flags", ())),
        "transparent_huge_pages": _huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rose_ops": rose_ops.__version__,
        "deepspeed": version("deepspeed"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": _revision(),
    }


class Others:
    """How many cores other processes have kept busy since this was made.

    Args:
        meant: processes that do not count as others, besides this one.
    """

    def __init__(self, meant: Sequence[int] = ()) -> None:
        self._own = [psutil.Process(), *map(psutil.Process, meant)]
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        total, own = psutil.cpu_times(), [process.cpu_times() for process in self._own]
        idle = total.idle + getattr(total, "iowait", 0.0)
        busy = sum(total) - idle - getattr(total, "guest", 0.0) - getattr(total, "guest_nice", 0.0)
        return time.perf_counter(), busy - sum(times.user + times.system for times in own)

    def cores(self) -> float:
        (start, before), (now, after) = self._start, self._now()
        return max(0.0, after - before) / max(now - start, 1e-9)


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def _revision() -> str:
    """Commit, and whether the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
