"""NVIDIA's kernel profiler: its command line, and what it prints."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {
    "n": 1e-9, "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3,
    "s": 1.0, "second": 1.0,
}  # fmt: skip
# Ours: theirs. Everything is a sum but percentages, which are averages over the time.
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "thread_instructions": "smsp__thread_inst_executed.sum",
    "warp_instructions": "smsp__inst_executed.sum",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "of_peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}
CORE = ("seconds", "read", "written", "thread_instructions")  # if it does not know one of the others


def find() -> str | None:
    """Its path, or None."""
    folders = [
        Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    folders += [
        Path("/usr/local/cuda/bin"),
        *sorted(Path("/opt/nvidia/nsight-compute").glob("*"))[::-1],
    ]
    found = [shutil.which("ncu"), *(shutil.which("ncu", path=str(folder)) for folder in folders)]
    return next(filter(None, found), None)


def command(ncu: str, log: Path, metrics: Iterable[str], child: Sequence[str]) -> list[str]:
    """Profiles what ``child`` runs between the calls of cudaProfilerStart and cudaProfilerStop."""
    names = ",".join(METRICS[metric] for metric in metrics)
    return [
        ncu, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw",
        "--print-units", "base", "--metrics", names, "--log-file", str(log), *child,
    ]  # fmt: skip


def parse(text: str) -> list[dict[str, str | float]]:
    """Kernels in the order of their launches: ``kernel`` and the keys of ``METRICS``, in bytes,
    seconds, per cent and numbers. A metric that it could not measure is not there.

    Takes both layouts: a row for each kernel after a row of units (``--page raw``), and a row for each
    metric of a kernel.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[start:]))
    ours = {theirs: name for name, theirs in METRICS.items()}
    units: dict[str, str] = {}
    if rows and not rows[0].get("Metric Name") and not rows[0]["ID"]:
        units = rows.pop(0)
    kernels: dict[str, dict[str, str | float]] = {}
    for row in rows:
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if "Metric Name" in row:
            found = {row["Metric Name"]: (row["Metric Value"], row["Metric Unit"])}
        else:
            found = {name: (row[name], units.get(name, "")) for name in ours if name in row}
        for name, (value, unit) in found.items():
            if name in ours and (number := _number(value)) is not None:
                kernel[ours[name]] = number * _scale(unit)
    return list(kernels.values())


def _number(text: str | None) -> float | None:
    """Of text that may have thousands separators."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # n/a
        return None


def _scale(unit: str) -> float:
    unit = unit.strip()
    if unit in _SECONDS:
        return _SECONDS[unit]
    prefix = unit.lower().removesuffix("byte").removesuffix("inst")
    return _SCALES.get(prefix, 1.0) if unit.lower().endswith(("byte", "inst")) else 1.0
