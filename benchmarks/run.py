"""The command line, and the order of things: parity, rounds in turn, memory, report."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import psutil
import torch
from tqdm import tqdm

from benchmarks import machine, memory, parity, report
from benchmarks.contenders import BASELINE, SPECS, Clock, Contender
from benchmarks.work import DATA, Problem, Work, flat, roberta, tiny

_RESULTS = Path(__file__).parent / "results"
_SLOW_SHARE = 4  # slow contenders take part in every fourth round
_BYTES_NEEDED = 80  # per element, at the height of the parity check


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if parity failed, whatever the times."""
    args = _parser().parse_args(argv)
    if args.check:
        print(*report.judge(pd.read_csv(args.check)), sep="\n")
        return 0
    if args.device != "cpu":
        print(f"device {args.device!r} is not there yet; expected 'cpu'", file=sys.stderr)
        return 2
    for part in args.only or ():
        if not any(_matches(name, [part]) for name in SPECS):
            print(
                f"--only {part}: no such contender; expected part of one of {', '.join(SPECS)}",
                file=sys.stderr,
            )
            return 2
    works = {"flat": [flat(n) for n in args.sizes], "roberta": [roberta()], "tiny": [tiny()]}
    chosen = [name for name in SPECS if name == BASELINE or _matches(name, args.only)]
    run = _Run(args, [work for kind in args.works for work in works[kind]], chosen)
    run.all_cases()
    return run.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of one step, RoseFusedAdamW next to other optimizers. Parity is "
        "checked before anything is timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--works", nargs="+", choices=("flat", "roberta", "tiny"), default=["flat", "roberta"]
    )
    parser.add_argument(
        "--sizes", nargs="+", type=_size, default=[1 << 26], help="of flat: 64Mi, 1000000, ..."
    )
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--only", nargs="+", help=f"parts of names, from: {', '.join(SPECS)}")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--name", default="cpu", help="of the files in benchmarks/results")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder of the files")
    parser.add_argument("--check", type=Path, help="judge an existing CSV, measure nothing")
    return parser


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected a number such as 64Mi, got {text!r}")
    return int(found[1]) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30}[found[2]]


def _matches(name: str, only: list[str] | None) -> bool:
    return only is None or any(part.lower() in name.lower() for part in only)


class _Run:
    def __init__(self, args: argparse.Namespace, works: list[Work], names: list[str]) -> None:
        self.args, self.works, self.names = args, works, names
        self.rows: list[dict[str, object]] = []
        self.machine = machine.describe()
        self.wrong: list[str] = []
        self.frame = pd.DataFrame()
        self._peaks: dict[tuple[str, str, int], int | str] = {}
        args.output.mkdir(parents=True, exist_ok=True)
        print(*(f"{key}: {value}" for key, value in self.machine.items()), sep="\n")

    def all_cases(self) -> None:
        for threads in self.args.threads:
            torch.set_num_threads(threads)
            for work in self.works:
                for data in self.args.data:
                    self._case(work, data, threads)

    def _case(self, work: Work, data: str, threads: int) -> None:
        title = f"{work.name}, {data}, {threads} threads"
        print(
            f"\n## {title}\n\n{work.elements:,} elements in {len(work.shapes):,} tensors; {DATA[data]}"
        )
        case = {
            "work": work.name,
            "data": data,
            "threads": threads,
            "elements": work.elements,
            "tensors": len(work.shapes),
            "full_size": work.full_size,
            "device": self.args.device,
        }
        free = psutil.virtual_memory().available
        if work.elements * _BYTES_NEEDED > free:
            print(f"skipped: needs about {work.elements * _BYTES_NEEDED / 2**30:.0f} GiB of memory")
            return
        problem = Problem(work, data)
        contenders: dict[str, Contender] = {}
        skipped: dict[str, str] = {}
        for name in self.names:
            if (reason := SPECS[name].why_not(work)) is not None:
                skipped[name] = reason
            else:
                contenders[name] = SPECS[name].make(problem)
        try:
            parity.check(problem, contenders)
        except parity.ParityError as error:
            print(f"PARITY FAILED, nothing timed: {error}")
            self.wrong.append(f"{title}: {error}")
            return
        others = machine.Others()
        seconds = _rounds(contenders, self.args.repeats, title)
        case["others_busy_cores"] = busy = others.cores()
        elements = {name: contender.elements for name, contender in contenders.items()}
        del problem, contenders
        for name in self.names:
            if name in skipped:
                row: dict[str, object] = {"contender": name, "skipped": skipped[name]}
            else:
                times = seconds[name]
                pairs = [seconds[BASELINE][r] for r in times]
                row = report.row(name, elements[name], list(times.values()), pairs)
                row |= self._memory(name, work, threads)
            self.rows.append({**case, **row, **self.machine})
        self.frame = report.compare(self.rows)
        self.frame.to_csv(self._path("csv"), index=False, float_format="%.6g")
        print(report.table(self.frame.tail(len(self.names))))
        if busy > report.BUSY:
            print(f"\nWarning: other processes kept {busy:.1f} cores busy; these times mean little.")
        for name, reason in skipped.items():
            print(f"\nNot run: {name}: {reason}")

    def _memory(self, name: str, work: Work, threads: int) -> dict[str, object]:
        if self.args.no_memory or name in report.BANDWIDTH:
            return {}
        if (name, work.name, threads) not in self._peaks:  # the same for every kind of data
            print(f"peak memory: {name}", file=sys.stderr)
            self._peaks[name, work.name, threads] = memory.measure(SPECS[name], work, threads)
        peak = self._peaks[name, work.name, threads]
        if isinstance(peak, str):
            print(f"peak memory of {name} was not measured: {peak}")
            return {}
        return {"peak_bytes": peak, "peak_bytes_per_element": peak / work.elements}

    def _path(self, suffix: str) -> Path:
        return self.args.output / f"{self.args.name}.{suffix}"

    def finish(self) -> int:
        if not self.frame.empty:
            report.plot(self.frame, self._path("png"))
            print("\n## Targets\n")
            print(*report.judge(self.frame), sep="\n")
            print(f"\nWritten: {self._path('csv')} and {self._path('png')}")
        for line in self.wrong:
            print(f"PARITY FAILED: {line}", file=sys.stderr)
        return 1 if self.wrong else 0


def _rounds(contenders: dict[str, Contender], repeats: int, title: str) -> dict[str, dict[int, float]]:
    """Seconds of each contender in each of its rounds.

    Everyone takes turns, and the order rotates, so that a machine that slows down slows all of them.
    """
    seconds: dict[str, dict[int, float]] = {name: {} for name in contenders}
    names = list(contenders)
    schedule = [
        (round_, name)
        for round_ in range(-1, repeats)  # -1 warms up
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]
        if not SPECS[name].slow or round_ % _SLOW_SHARE == 0
    ]
    gc.collect()
    gc.disable()
    try:
        for round_, name in (bar := tqdm(schedule, desc=title, leave=False, mininterval=0.5)):
            bar.set_postfix_str(name, refresh=False)
            contenders[name].restore()
            clock = Clock()
            contenders[name].step(clock)
            if round_ >= 0:
                seconds[name][round_] = clock.seconds
    finally:
        gc.enable()
    return seconds
