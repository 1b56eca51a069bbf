"""Small steps of every order, granularity and selection, for a tool to watch that slows a GPU down::

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu_sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu_sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/gpu_sanitize.py

No test by itself, though first moments, which show every mask, are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

# Every tensor is an allocation of its own, so that the tool sees what reaches beyond it.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(n: int, generator: torch.Generator) -> Tensor:
    """With zeros and ties, a NaN and an infinity."""
    x = torch.randn(n, generator=generator)
    x = torch.where(x.abs() < 0.2, 0.0, torch.where(x > 1.5, 1.5, x))
    if n > 100:
        x[17], x[-3] = torch.nan, torch.inf
    return x


def layouts(data: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Odd, empty, of one element, unaligned, strided, transposed, padded, and a long vector."""
    odd, empty, one, unaligned, strided, transposed, padded, long = (
        x.to(device=device, dtype=dtype) for x in data
    )
    wide = torch.zeros(40, 35, dtype=dtype, device=device)
    wide[:, :33] = padded.view(40, 33)
    return [
        odd,
        empty,
        one,
        torch.cat([one, unaligned])[1:],
        torch.stack([strided, strided], 1)[:, 0],
        transposed.view(33, 41).t(),
        wide[:, :33],
        long,
    ]


class Run:
    """An optimizer on a device, fed from data on the CPU."""

    def __init__(self, start: list[Tensor], dtype: torch.dtype, device: str, **options) -> None:
        self.dtype, self.device = dtype, device
        self.params = [nn.Parameter(p) for p in layouts(start, dtype, device)]
        groups = [
            {"params": self.params[1:]},
            {"params": self.params[:1], "selective": False, "betas": (0.8, 0.99), "maximize": True},
        ]
        if dtype == torch.bfloat16:
            options |= {"state_dtype": dtype, "param_rounding": "stochastic"}
        self.optimizer = RoseFusedAdamW(groups, **options)

    def step(self, passes: list[list[Tensor]]) -> None:
        for i, grads in enumerate(passes):
            for p, g in zip(self.params, layouts(grads, self.dtype, self.device), strict=True):
                p.grad = g
            if i + 1 < len(passes):
                self.optimizer.capture("first")
        self.optimizer.step()

    def moments(self) -> Tensor:
        states = [self.optimizer.state[p]["exp_avg"] for p in self.params]
        return torch.cat([m.float().cpu().reshape(-1) for m in states])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, default=200_003, help="of the longest tensor")
    parser.add_argument("--seed", type=int, default=torch.seed() % 2**31)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, seed {options.seed}")
    generator = torch.Generator().manual_seed(options.seed)
    sizes = (5001, 0, 1, 4097, 1000, 33 * 41, 40 * 33, options.elements)

    def draw() -> list[Tensor]:
        return [numbers(n, generator) for n in sizes]

    start = [x.nan_to_num(0.5, 2.0) for x in draw()]
    ways = [
        *product(("element",), ("bracket", "exact", "approx"), ("first", "second", "ensemble")),
        *product(("tensor",), ("exact",), ("first", "second", "ensemble")),
    ]
    for i, (way, clips) in enumerate(product(ways, (False, True))):
        granularity, selection, order = way
        dtype = DTYPES[i % 3]
        settings = {"granularity": granularity, "selection": selection, "order": order}
        if clips:
            settings |= {"max_grad_norm": 100.0, "lower": (0.1, 0.2)}
        runs = [
            Run(start, dtype, device, backend=backend, **settings)
            for device, backend in ((options.device, "auto"), ("cpu", "cpu"))
        ]
        for _ in range(2):
            passes = [draw() for _ in range(1 if order == "second" else 2)]
            if clips or granularity == "tensor":  # whose norms would not be finite
                passes = [[g.nan_to_num(0.0, 0.0) for g in grads] for grads in passes]
            for run in runs:
                run.step(passes)
        name = " ".join((*way, str(dtype).removeprefix("torch."), *["clipped"] * clips))
        counts = runs[0].optimizer.selection["update"]
        print(f"{name}: {int(counts.updated)} updated, {int(counts.nonfinite)} not finite", flush=True)
        actual, expected = (run.moments() for run in runs)
        differ = (actual != expected) & ~(actual.isnan() & expected.isnan())
        if differ.any():
            sys.exit(f"{name}: {int(differ.sum())} first moments differ from the CPU's")
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
