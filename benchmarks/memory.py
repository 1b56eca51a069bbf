"""Memory that a step needs for a while, beyond parameters, gradients and states.

A process of its own measures its resident set before a step and at its highest during the step, which
Linux keeps (``VmHWM``, reset through ``clear_refs``).
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contenders import SPECS, Clock, Spec
from benchmarks.work import Problem, Work

_TIMEOUT_S = 300


def measure(spec: Spec, work: Work, threads: int) -> int | str:
    """Bytes, or why there are none."""
    if sys.platform != "linux":
        return "needs Linux's /proc"
    question = json.dumps([spec.name, work.name, [list(s) for s in work.shapes], threads])
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parent.parent,
            input=question,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT_S} s"
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        return last[0]
    return int(process.stdout.split()[-1])


def _main() -> None:
    name, work_name, shapes, threads = json.load(sys.stdin)
    torch.set_num_threads(threads)
    work, spec = Work(work_name, [tuple(s) for s in shapes]), SPECS[name]
    if (reason := spec.why_not(work)) is not None:
        sys.exit(reason)
    contender = spec.make(Problem(work, "tiled", restorable=False))
    contender.step(Clock())  # threads start, lazy imports are done
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what the first step freed would hide the second's peak
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    contender.step(Clock())
    print(max(0, _status("VmHWM") - before))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    _main()
