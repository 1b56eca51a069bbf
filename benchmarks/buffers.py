"""``python -m benchmarks.buffers``: what it brings where the optimizer's buffers lie.

A step over one tensor whose parameters, gradients and moments are buffers of ``rose_ops.memory``, in
several ways to get them, each in processes of its own, in turn and in random order: buffers that a
process makes later lie elsewhere. The time is CPU time of one thread, which other processes disturb
less than the time of the clock.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import random
import statistics
import time

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from rose_ops import RoseFusedAdamW, flatten_parameters, memory
from rose_ops.finetune.report import environment

VARIANTS: dict[str, dict[str, int]] = {
    "allocator": {"MIN_BYTES": 1 << 62},
    "usual pages": {"_ADVICE": mmap.MADV_NORMAL},
    "huge pages, no gap": {"_GAP": 0},
    "huge pages": {},
}
_STEPS = 7


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebi", type=float, nargs="+", default=[64, 29.7], help="Mi elements")
    parser.add_argument("--upper", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=5, help="for each row")
    args = parser.parse_args()
    trials = [(m, name, args.upper) for m in args.mebi for name in VARIANTS] * args.processes
    random.shuffle(trials)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = list(tqdm(pool.imap(_trial, trials), total=len(trials), mininterval=5))
    frame = pd.DataFrame(rows, columns=["Mi", "variant", "ns per element"])
    print(environment())
    print(frame.groupby(["Mi", "variant"]).agg(["median", "min", "max"]).round(3).to_string())


def _trial(trial: tuple[float, str, float]) -> tuple[float, str, float]:
    mebi, name, upper = trial
    for attribute, value in VARIANTS[name].items():
        setattr(memory, attribute, value)
    torch.set_num_threads(1)
    n = int(mebi * 2**20)
    [flat] = params = flatten_parameters([nn.Parameter(torch.randn(n))])
    optimizer = RoseFusedAdamW(params, upper=upper)
    flat.grad = torch.randn(n)
    times = []
    for step in range(_STEPS):
        start = time.process_time()
        optimizer.step()
        if step:  # the first one makes the state
            times.append(time.process_time() - start)
    return mebi, name, statistics.median(times) / n * 1e9


if __name__ == "__main__":
    main()
