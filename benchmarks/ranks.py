"""``python -m benchmarks.ranks``: what one ranking over several processes costs, measured and modelled.

*Measured*: a step of processes that share a ranking (``process_group=``) over one of the same processes
that rank their parts by themselves (``local_ranking=True``), in turns, over gloo on this machine.

*Modelled*: what the sums of a step take by themselves on 1 to 4,096 ranks, from the bytes that were
counted in the measured steps, by the usual estimate of an all-reduce: ``2 * log2(R) * latency + 2 *
bytes * (R - 1) / R / bandwidth``; and, with parts that stay as large as they are, how many elements a
rank samples for a bracket, which is its share of ``16 * 0.4 * n^(2/3)``, and how many it logs, from
those of the measured steps, as a bracket's width goes with ``1 / sqrt`` of the sample. Nothing beyond
that is claimed: what a GPU counts was not timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.device import Cpu
from benchmarks.machine import describe
from rose_ops import RoseFusedAdamW

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, dict[str, Any]] = {
    "bracket": {},
    "exact": {"selection": "exact"},
    "clipped": {"max_grad_norm": 1e4},  # above what the norm is: moments stay what they are
    "ensemble": {"order": "ensemble"},
}
RANKS = [4**k for k in range(7)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebi", type=int, default=64, help="Mi elements, of all ranks together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--latency", type=float, default=10.0, help="of a message, in microseconds")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="of a rank, in GB/s")
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks.csv")
    args = parser.parse_args()
    rows = mp.get_context("spawn").SimpleQueue()
    store = args.output.parent / f".{args.output.stem}-store"
    store.unlink(missing_ok=True)
    try:
        mp.spawn(_measure, (args, str(store), rows), nprocs=args.ranks)
    finally:
        store.unlink(missing_ok=True)
    frame = pd.DataFrame(rows.get())
    for ranks in RANKS:
        frame[f"sums_ms_{ranks}"] = [
            1e3 * all_reduce(ranks, row.sums, row.bytes, args.latency * 1e-6, args.bandwidth * 1e9)
            for row in frame.itertuples()
        ]
        elements = (args.mebi << 20) / args.ranks
        frame[f"sampled_{ranks}"] = [sampled(ranks * elements) / ranks] * len(frame)
        shrinks = math.sqrt(sampled(args.ranks * elements) / sampled(ranks * elements))
        frame[f"logged_{ranks}"] = frame["logged"] * shrinks
    frame = frame.assign(
        mebi=args.mebi, ranks=args.ranks, latency_us=args.latency, bandwidth_gb=args.bandwidth,
        **describe(Cpu()),
    )  # fmt: skip
    frame.to_csv(args.output, index=False)
    shown = ["setting", "alone_ms", "shared_ms", "ratio", "sums", "bytes"]
    print(frame[shown].round(3).to_string(index=False))
    for name in ("sums_ms", "sampled", "logged"):
        columns = [f"{name}_{ranks}" for ranks in RANKS]
        print(frame[["setting", *columns]].round(3).to_string(index=False))


def all_reduce(ranks: int, sums: int, nbytes: int, latency: float, bandwidth: float) -> float:
    """Seconds that the sums of a step take together."""
    return 2 * sums * math.log2(ranks) * latency + 2 * nbytes * (ranks - 1) / ranks / bandwidth


def sampled(elements: float) -> float:
    """Elements in the sample of a bracket around that many."""
    return 16 * max(0.4 * elements ** (2 / 3), min(8192.0, elements / 128))


def _measure(rank: int, args: argparse.Namespace, store: str, rows: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    generator = torch.Generator().manual_seed(rank)
    p = nn.Parameter(torch.randn((args.mebi << 20) // args.ranks, generator=generator))
    # With the same gradient in every step, risks would be one number, that all elements share.
    gradients = [torch.randn(p.shape, generator=generator) for _ in range(3)]
    found = []
    for setting, options in SETTINGS.items():
        ways = {
            "alone_ms": RoseFusedAdamW([p], lr=1e-6, local_ranking=True, **options),
            "shared_ms": RoseFusedAdamW([p], lr=1e-6, process_group=dist.group.WORLD, **options),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        before = (0, 0)
        for step in range(args.steps + 2):  # one makes the state, one finds the first threshold
            for way, optimizer in ways.items():
                if step == 1:  # moments as they are after many steps of such gradients
                    # The same memory for both: where it lies makes a difference of several percent.
                    optimizer.state[p] = ways["alone_ms"].state[p]
                    moments = torch.randn(p.shape, generator=generator) * (0.1 / 1.9) ** 0.5
                    optimizer.state[p]["exp_avg"].copy_(moments)
                    optimizer.state[p]["exp_avg_sq"].fill_(1.0)
                ranks = optimizer._engine.ranks
                before = (ranks.sums, ranks.bytes) if ranks else before
                optimizer.zero_grad()
                p.grad = gradients[step % len(gradients)]
                dist.barrier()
                begin = time.perf_counter()
                if "first" in optimizer.settings.kinds:
                    optimizer.capture("first", clear=False)
                optimizer.step()
                dist.barrier()
                if step >= 2:
                    times[way].append(1e3 * (time.perf_counter() - begin))
        ranks = ways["shared_ms"]._engine.ranks
        assert ranks is not None
        medians = {way: statistics.median(of_way) for way, of_way in times.items()}
        ratios = [b / a for a, b in zip(times["alone_ms"], times["shared_ms"], strict=True)]
        found.append(
            {
                "setting": setting,
                **medians,
                "ratio": statistics.median(ratios),
                "sums": ranks.sums - before[0],
                "bytes": ranks.bytes - before[1],
                "logged": 0
                if setting == "exact"
                else torch.ops.rose_ops.latest_bracket_report()[2].item(),
            }
        )
    if rank == 0:
        rows.put(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
