"""Memory that a step needs for a while, beyond parameters, gradients and states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contenders import Contender
from benchmarks.device import Clock, Cpu, Device
from benchmarks.specs import specs
from benchmarks.work import Problem, Work

_TIMEOUT_S = 300


def measure(name: str, work: Work, device: Device, threads: int) -> int | str:
    """Bytes, or why there are none."""
    if not device.isolated:
        return _temporaries(name, work, device)
    if sys.platform != "linux":
        return "needs Linux's /proc"
    shapes = [list(shape) for shape in work.shapes]
    dtype = str(work.dtype).removeprefix("torch.")
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parent.parent,
            input=json.dumps([name, work.name, shapes, dtype, threads]),
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


def _temporaries(name: str, work: Work, device: Device) -> int:
    contender: Contender = specs(device)[name].make(Problem(work, "gaussian", device.place))
    for _ in range(2):  # threads start, lazy imports are done, states are there
        contender.step(Clock())
    return device.temporaries(lambda: contender.step(Clock()))


def _main() -> None:
    name, work_name, shapes, dtype, threads = json.load(sys.stdin)
    torch.set_num_threads(threads)
    work = Work(work_name, [tuple(shape) for shape in shapes], getattr(torch, dtype))
    print(_temporaries(name, work, Cpu()))


if __name__ == "__main__":
    _main()
