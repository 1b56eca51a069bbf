"""``python -m benchmarks.huge_pages``: a step on huge pages and on small ones, in turn.

Parameters, gradients and moments are flat buffers of the package's own (``flatten_parameters``). The
small pages take part twice: the difference between the two is noise.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import pandas as pd
import torch
from torch import nn

from benchmarks import machine
from rose_ops import RoseFusedAdamW, flatten_parameters, memory
from rose_ops.finetune.report import environment

VARIANTS = {"small": False, "small again": False, "huge": True}


def _huge_pages(granted: bool) -> AbstractContextManager[object]:
    return nullcontext() if granted else patch.object(memory, "MIN_BYTES", 1 << 62)


def _optimizer(n: int, upper: float) -> RoseFusedAdamW:
    params = flatten_parameters([nn.Parameter(torch.randn(n))])
    params[0].grad = torch.randn(n)
    optimizer = RoseFusedAdamW(params, upper=upper)
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"].normal_()  # as spread as the gradient
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=64 << 20)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    print(environment())
    others = machine.Others()
    rows = []
    for upper in (1.0, 0.6):
        optimizers = {}
        for name, granted in VARIANTS.items():
            with _huge_pages(granted):
                optimizers[name] = _optimizer(args.elements, upper)
        for round_ in range(args.rounds):
            for name in random.sample(list(optimizers), len(optimizers)):
                start = time.perf_counter()
                optimizers[name].step()
                rows.append((round_, f"step, upper={upper}", name, time.perf_counter() - start))
                with _huge_pages(VARIANTS[name]):
                    start = time.perf_counter()
                    memory.empty(args.elements, torch.float32, torch.device("cpu")).zero_()
                    rows.append((round_, "one buffer of zeros", name, time.perf_counter() - start))
    frame = pd.DataFrame(rows, columns=["round", "what", "pages", "seconds"])
    table = frame.groupby(["what", "pages"]).seconds.describe(percentiles=[0.2, 0.5, 0.8]) * 1e3
    table["over small"] = table["50%"] / table["50%"].xs("small", level="pages")
    print(table[["20%", "50%", "80%", "over small"]].round(3).to_string(), "\n(milliseconds)")
    print(f"Other processes kept {others.cores():.1f} cores busy.")


if __name__ == "__main__":
    main()
