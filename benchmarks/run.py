"""The command line, and the order of things: parity, rounds in turn, memory, report."""

from __future__ import annotations

import argparse
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import machine, memory, parity, preset, report, targets
from benchmarks.beside import Busy
from benchmarks.contenders import Contender, Unavailable
from benchmarks.device import Cpu, Cuda, Device
from benchmarks.record import NoRecording
from benchmarks.specs import BASELINE, Spec, specs
from benchmarks.work import DATA, SCALING, Problem, Work, flat, llama, minilm, roberta, tiny

_RESULTS = Path(__file__).parent / "results"
_LARGEST_PEAK = 1 << 27  # elements
_LONGEST_HEAD_START = 0.5  # seconds
_SELECT_DATA = ("gaussian", "recorded")
_WORKS: dict[str, tuple[Callable[[Sequence[int]], list[Work]], tuple[str, ...], tuple[str, ...]]] = {
    "flat": (lambda sizes: [flat(n) for n in sizes], tuple(DATA), ("gaussian",)),
    "roberta": (lambda sizes: [roberta()], ("gaussian", "recorded"), ("gaussian",)),
    "minilm": (lambda sizes: [minilm()], ("recorded",), ()),
    "llama": (lambda sizes: [llama()], ("gaussian",), ("gaussian",)),
    "tiny": (lambda sizes: [tiny()], ("gaussian",), ()),  # AdamW waits for threads 10,000 times
    "scaling": (lambda sizes: [flat(n) for n in SCALING], ("gaussian",), ("gaussian",)),
}
"""Works, and the data that they are measured with, alone and beside busy processes, unless the command
line says otherwise."""


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    """Returns the exit status: 1 if parity failed or a contender did, whatever the times; 2 for what
    cannot be run.

    Args:
        device: instead of the one that ``--device`` names.
    """
    args = _parser().parse_args(argv)
    if args.check:
        try:
            print(*targets.judge(report.read(args.check)), sep="\n")
        except ValueError as error:
            print(f"--check {error}", file=sys.stderr)
            return 2
        return 0
    if device is None:
        if args.device == "cuda" and (reason := Cuda.why_not()) is not None:
            print(f"--device cuda: {reason}", file=sys.stderr)
            return 2
        device = Cuda() if args.device == "cuda" else Cpu()
    if args.preset:
        return _preset(args, device)
    table = specs(device)
    for part in args.only or ():
        if not any(_matches(name, [part]) for name in table):
            print(
                f"--only {part}: no such contender; expected part of one of {', '.join(table)}",
                file=sys.stderr,
            )
            return 2
    # In any case who the others are compared with.
    chosen = {name: s for name, s in table.items() if _matches(name, args.only)}
    wanted = {BASELINE, *(s.against for s in chosen.values())}
    chosen = {name: s for name, s in table.items() if name in chosen or name in wanted}
    run = _Run(args, device, chosen)
    run.all_cases()
    return run.finish()


def _preset(args: argparse.Namespace, device: Device) -> int:
    device.backends = device.backends[:1]
    device.slow_share = preset.SLOW_SHARE
    args.repeats, args.inputs = args.repeats or preset.ROUNDS, args.inputs or 1
    args.no_memory, args.name = True, args.name or preset.name(device)
    run = _Run(args, device, specs(device))
    if isinstance(device, Cuda):
        print(device.cooling())
    run.preset_cases()
    return run.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of one step, RoseFusedAdamW next to other optimizers. Parity is "
        "checked before anything is timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--preset",
        choices=("gpu",),
        help="works and contenders that tell most about a GPU in two minutes",
    )
    parser.add_argument(
        "--works", nargs="+", choices=tuple(_WORKS), default=["flat", "roberta", "tiny"]
    )
    parser.add_argument(
        "--sizes", nargs="+", type=_size, help="of flat: 64Mi (the default), 1000000, ..."
    )
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), help="default: what fits the work")
    parser.add_argument("--only", nargs="+", help="parts of names of contenders")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument(
        "--beside", nargs="+", type=_count, default=[0], metavar="N",
        help="so many busy processes run beside every step; above 0, unless --data and --only say "
        "otherwise, with gaussian, without tiny, the slow contenders and the selections",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, help="rounds of each case; default: 5, on a GPU 20")
    parser.add_argument(
        "--inputs", type=int, help="sets of tensors that rounds go through; default: 1, on a GPU 3"
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--name", help="of the files in benchmarks/results; default: the device")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder of the files")
    parser.add_argument("--check", type=Path, help="judge an existing CSV, measure nothing")
    return parser


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected a number such as 64Mi, got {text!r}")
    return int(found[1]) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30}[found[2]]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number such as 0 or 1, got {text!r}")
    return int(text)


def _matches(name: str, only: list[str] | None) -> bool:
    return only is None or any(part.lower() in name.lower() for part in only)


@dataclass
class _Entrant:
    """A contender on every set of tensors, and how it did."""

    spec: Spec
    contenders: list[Contender]
    seconds: dict[int, float] = field(default_factory=dict)  # by round
    host_seconds: list[float] = field(default_factory=list)  # the last warm-up, and rounds


class _Run:
    def __init__(self, args: argparse.Namespace, device: Device, chosen: dict[str, Spec]) -> None:
        self.args, self.device, self.specs = args, device, chosen
        self.repeats = args.repeats or device.rounds
        self.inputs = args.inputs or device.inputs
        self.rows: list[dict[str, object]] = []
        self.machine = machine.describe(device)
        self.wrong: list[str] = []
        self.frame = pd.DataFrame()
        self.until = math.inf  # rounds end early then, by time.monotonic()
        self._peaks: dict[tuple[str, str], int | str] = {}
        args.output.mkdir(parents=True, exist_ok=True)
        print(*(f"{key}: {value}" for key, value in self.machine.items()), sep="\n")

    def all_cases(self) -> None:
        cases = {
            (threads, beside, work.name, data): work
            for threads in self.args.threads
            for beside in self.args.beside
            for make, alone, busy in map(_WORKS.__getitem__, self.args.works)
            for work in make(self.args.sizes or [1 << 26])
            for data in self.args.data or (busy if beside else alone)
        }
        if not cases:
            print(
                "\nnothing to measure: of these works none beside busy processes by default; see --data"
            )
        for (threads, beside, _, data), work in cases.items():
            torch.set_num_threads(threads)
            self._case(work, data, threads, beside)

    def preset_cases(self) -> None:
        """All that there is time for, and what else happens to the others: it may not happen again that
        soon that there is a GPU."""
        everyone, end = self.specs, time.monotonic() + preset.SECONDS
        for case in preset.cases(self.args.sizes):
            start = time.monotonic()
            if start > end:
                print(f"\n{case.work.name}: not run, {preset.SECONDS} s are over")
                continue
            self.specs = {name: everyone[name] for name in case.contenders if name in everyone}
            self.until = min(end, start + case.share * preset.SECONDS)
            try:
                self._case(case.work, "gaussian", torch.get_num_threads())
            except Exception as error:
                self.wrong.append(f"{case.work.name}: {type(error).__name__}: {error}")
                print(f"FAILED: {self.wrong[-1]}")
            print(f"\n{time.monotonic() - start:.1f} s", flush=True)

    def _case(self, work: Work, data: str, threads: int, beside: int = 0) -> None:
        title = report.name(work.name, data, threads, beside)
        case: dict[str, object] = {
            "work": work.name,
            "data": data,
            "threads": threads,
            "beside": beside,
            "elements": work.elements,
            "tensors": len(work.shapes),
            "dtype": str(work.dtype).removeprefix("torch."),
            "full_size": work.full_size,
            "device": self.device.name,
        }
        print(
            f"\n## {title}\n\n{work.elements:,} elements in {len(work.shapes):,} {case['dtype']} "
            f"tensors; {DATA[data]}"
        )
        self.device.release()  # what a case that failed has left
        needs = self.inputs * work.elements * work.dtype.itemsize * 7
        if needs > (free := self.device.free_bytes()):
            print(f"skipped: needs {needs / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
            return
        if not self.args.preset:  # which compiles nothing
            torch._dynamo.reset()  # or a compiler would generalize from one case to the next
        try:
            problems = [Problem(work, data, self.device.place, seed) for seed in range(self.inputs)]
        except NoRecording as error:
            print(f"skipped: {error}")
            return
        skipped = {
            name: reason
            for name, spec in self.specs.items()
            if (reason := self._left_out(spec, problems[0], beside)) is not None
        }
        try:
            entrants = self._prepare(problems, skipped, title)
        except parity.ParityError as error:
            print(f"PARITY FAILED, nothing timed: {error}")
            self.wrong.append(f"PARITY FAILED: {title}: {error}")
            return
        with Busy(beside) as meant:
            others = machine.Others(meant.pids)
            self._rounds(entrants, title)
            case["others_busy_cores"] = busy = others.cores()
        measured = {name: self._row(entrant, entrants) for name, entrant in entrants.items()}
        del problems, entrants
        self.device.release()
        for name in self.specs:
            if name in skipped:
                row: dict[str, object] = {"skipped": skipped[name]}
            else:
                row = measured[name] | self._memory(name, work, threads)
            self.rows.append({**case, "contender": name, **row, **self.machine})
        self._say(skipped, busy)

    def _say(self, skipped: dict[str, str], busy: float) -> None:
        """Write what is known so far, and print the latest case."""
        self.frame = report.compare(self.rows)
        self.frame.to_csv(self._path("csv"), index=False, float_format="%.6g")
        print(report.table(self.frame.tail(len(self.specs))))
        if busy > report.BUSY:
            print(f"\nWarning: other processes kept {busy:.1f} cores busy; these times mean little.")
        for name, reason in skipped.items():
            print(f"\nNot run: {name}: {reason}")

    def _prepare(
        self, problems: list[Problem], skipped: dict[str, str], title: str
    ) -> dict[str, _Entrant]:
        """Everyone who can take part, each known to compute what it should. The others go to
        ``skipped``, with the reason.

        Raises:
            ParityError: somebody does not.
        """
        expected = [parity.Expected(problem, self.device) for problem in problems]
        for problem in problems:
            parity.check_kernels(problem)
        entrants = {}
        asked = [(name, spec) for name, spec in self.specs.items() if name not in skipped]
        for name, spec in (bar := tqdm(asked, leave=False, disable=None)):
            bar.set_description_str(f"parity: {name}")
            reason = spec.obstacle(problems[0], self.device)
            if reason is None:
                try:
                    contenders = [spec.make(problem) for problem in problems]
                    for contender, truth in zip(contenders, expected, strict=True):
                        parity.check(name, spec.rtol, contender, truth)
                    entrants[name] = _Entrant(spec, contenders)
                except (Unavailable, NotImplementedError) as error:
                    reason = str(error)
                except parity.ParityError as error:
                    if not self.args.preset:
                        raise
                    reason = f"PARITY FAILED: {error}"
                    self.wrong.append(f"{title}: {reason}")
                except Exception as error:  # the others go on, and the exit status says so
                    reason = f"FAILED: {type(error).__name__}: {error}"
                    self.wrong.append(f"{title}: {name} {reason}")
            if reason is not None:
                skipped[name] = reason
        return entrants

    def _left_out(self, spec: Spec, problem: Problem, beside: int) -> str | None:
        """Sorting takes as long as all steps together, and does not care for the data."""
        if beside and (spec.slow or spec.kind == "select") and self.args.only is None:
            return "by default not beside busy processes; see --only"
        alike = len(problem.work.shapes) > 1 or problem.data not in _SELECT_DATA
        if spec.kind == "select" and alike and self.args.only is None:
            return f"by default only with flat works, {' and '.join(_SELECT_DATA)}; see --only"
        return None

    def _rounds(self, entrants: dict[str, _Entrant], title: str) -> None:
        """Everyone takes turns, and the order rotates, so that a machine that slows down slows all of
        them."""
        names = list(entrants)
        schedule = [
            (round_, name)
            for round_ in range(-self.inputs, self.repeats)  # below 0: warm-ups
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]
            if not entrants[name].spec.slow or round_ % self.device.slow_share == 0
        ]
        gc.collect()
        gc.disable()
        try:
            bar = tqdm(schedule, desc=title, leave=False, disable=None, mininterval=0.5)
            for round_, name in bar:
                bar.set_postfix_str(name, refresh=False)
                if round_ >= preset.FEWEST and time.monotonic() > self.until:
                    break
                entrant = entrants[name]
                contender = entrant.contenders[round_ % self.inputs]
                contender.restore()
                warm = round_ >= 0
                ahead = 2 * min(entrant.host_seconds[-3:], default=0.0)
                self.device.cool(min(ahead, _LONGEST_HEAD_START) * warm)
                clock = self.device.clock()
                contender.step(clock)
                entrant.host_seconds.append(clock.host_seconds)
                if warm:
                    entrant.seconds[round_] = clock.seconds
        finally:
            gc.enable()

    def _row(self, entrant: _Entrant, entrants: dict[str, _Entrant]) -> dict[str, object]:
        spec, contender = entrant.spec, entrant.contenders[0]
        traffic = contender.traffic or spec.traffic
        moved = traffic and traffic.bytes(contender.problem.work.dtype, contender.exp_avgs[0].dtype)
        baseline = entrants[spec.against].seconds if spec.against in entrants else {}
        pairs = [baseline.get(round_) for round_ in entrant.seconds]
        row = report.row(spec, contender.elements, moved, list(entrant.seconds.values()), pairs)
        row["kept"] = contender.kept()
        if self.device.asynchronous:
            steady = entrant.host_seconds[-len(entrant.seconds) :]
            row["host_ms"] = statistics.median(steady) * 1e3
        return row

    def _memory(self, name: str, work: Work, threads: int) -> dict[str, object]:
        """The same for every kind of data and, next to nothing, every number of threads."""
        too_large = work.elements > _LARGEST_PEAK  # it is per element what it was
        if self.args.no_memory or too_large or not self.specs[name].peak:
            return {}
        if (name, work.name) not in self._peaks:
            print(f"peak memory: {name}", file=sys.stderr)
            self._peaks[name, work.name] = memory.measure(name, work, self.device, threads)
        peak = self._peaks[name, work.name]
        if isinstance(peak, str):
            print(f"peak memory of {name} was not measured: {peak}")
            return {}
        return {"peak_bytes": peak, "peak_bytes_per_element": peak / work.elements}

    def _path(self, suffix: str, of: str = "") -> Path:
        return self.args.output / f"{self.args.name or self.device.name}{of}.{suffix}"

    def finish(self) -> int:
        if "ms_p50" in self.frame:
            written = [self._path("csv"), self._path("png")]
            report.plot(self.frame, written[-1])
            if report.plot_scaling(self.frame, scaling := self._path("png", "-scaling")):
                written.append(scaling)
            if verdicts := targets.judge(self.frame):
                print("\n## Targets\n")
                print(*verdicts, sep="\n")
            print(f"\nWritten: {', '.join(map(str, written))}")
        for line in self.wrong:
            print(line, file=sys.stderr)
        return 1 if self.wrong else 0
