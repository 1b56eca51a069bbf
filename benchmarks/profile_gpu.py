"""``python -m benchmarks.profile_gpu``: what each kernel of a step does with the device, by ncu.

Time, bytes from and to DRAM, instructions, issue slots and occupancy of every kernel of one step, after
two steps that are not looked at. Where ncu is missing or may not count, only the times, by PyTorch's
profiler. ``--device cpu`` rehearses: it makes the steps and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import ncu, preset
from benchmarks.contenders import Contender
from benchmarks.device import Clock, Cpu, Cuda, Device
from benchmarks.run import _size
from benchmarks.specs import BASELINE, specs
from benchmarks.work import Problem, Work

_RESULTS = Path(__file__).parent / "results"
SECONDS = 55  # for everything
_MARK = "spin_kernel"  # of torch.cuda._sleep, before every step
_LIST = 64  # tensors, for the granularity of tensors


@dataclass(frozen=True)
class Case:
    name: str
    contender: str
    dtype: torch.dtype = torch.float32
    tensors: int = 1


CASES = (
    Case(BASELINE, BASELINE),
    Case("bracket", "rose bracket"),
    Case("exact", "rose exact"),
    Case("bracket, clip", "rose bracket, clip"),
    Case("first order, bracket", "rose first, bracket"),
    Case("ensemble, bracket", "rose ensemble, bracket"),
    Case("bracket, bfloat16", "rose bracket", torch.bfloat16),
    Case("tensors", "rose tensors, 40%", tensors=_LIST),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_gpu",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--elements", type=_size, help="default: 64Mi, on the CPU 64Ki")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder of the CSV")
    parser.add_argument("--no-ncu", action="store_true", help="times alone, by PyTorch's profiler")
    parser.add_argument("--child", choices=("ncu", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    elements = args.elements or (1 << 16 if args.device == "cpu" else 1 << 26)
    if args.device == "cuda" and (reason := Cuda.why_not()) is not None:
        print(f"--device cuda: {reason}", file=sys.stderr)
        return 2
    if args.child:
        print(json.dumps(_child(Cuda(), elements, args.child)))
        return 0
    if args.device == "cpu":
        return _rehearse(elements)
    return _measure(elements, args.output, not args.no_ncu)


# -------------------------------------------------------------------------------- the measured process


def _contender(case: Case, device: Device, elements: int) -> Contender:
    device.backends = device.backends[:1]
    shapes = [(elements // case.tensors,)] * case.tensors
    work = Work(f"{elements} in {case.tensors}", shapes, case.dtype)
    return specs(device)[case.contender].make(Problem(work, "gaussian", device.place))


def _rehearse(elements: int) -> int:
    found = ncu.find()
    print(*ncu.command(found or "ncu", Path("LOG"), ncu.METRICS, ["CHILD"]))
    for case in CASES:
        contender = _contender(case, Cpu(), elements)
        contender.step(Clock())
        print(f"{case.name}: {case.contender}, {contender.elements:,} elements, {case.dtype}")
    print(f"rehearsed {len(CASES)} cases; nothing measured; ncu: {found or 'not found'}")
    return 0


def _child(device: Device, elements: int, how: str) -> dict[str, Any]:
    """One step of every case between calls of the profiler. Returns what failed, the copy bandwidth in
    bytes per second, and with PyTorch's profiler the kernels."""
    told: dict[str, Any] = {"failed": {}, "kernels": [], "copy": _copy(device, elements)}
    for number, case in enumerate(CASES):
        contender = None
        try:
            contender = _contender(case, device, elements)
            for _ in range(2):
                contender.restore()
                contender.step(Clock())
            contender.restore()
        except Exception as error:
            told["failed"][case.name] = f"{type(error).__name__}: {error}"
            contender = None
        try:
            told["kernels"] += [{"case": number, **kernel} for kernel in _step(contender, how)]
        except Exception as error:
            told["failed"][case.name] = f"{type(error).__name__}: {error}"
        del contender
        device.release()
    return told


def _step(contender: Contender | None, how: str) -> list[dict[str, Any]]:
    """A step that is profiled, after a mark."""
    torch.cuda.synchronize()
    if how == "torch":
        return [] if contender is None else _by_torch(contender)
    torch.cuda.profiler.start()
    torch.cuda._sleep(1000)
    if contender is not None:
        contender.step(Clock())
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return []


def _copy(device: Device, elements: int) -> float:
    """Read and written, of the best of some."""
    a, b = (torch.ones(elements, device=device.place) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        device.cool(1e-4)
        with (clock := device.clock()):
            a.copy_(b)
        best = min(best, clock.seconds)
    return 2 * a.nbytes / best


def _by_torch(contender: Contender) -> list[dict[str, Any]]:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        contender.step(Clock())
        torch.cuda.synchronize()
    return [
        {"kernel": event.name, "seconds": event.time_range.elapsed_us() / 1e6}
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("Optimizer.")
    ]


# ------------------------------------------------------------------------------------- the measurement


def _measure(elements: int, folder: Path, with_ncu: bool) -> int:
    end = time.monotonic() + SECONDS
    launches: list[dict[str, Any]] | None = None
    told: dict[str, Any] = {}
    says = "asked not to use it"
    if with_ncu:
        launches, told, says = _by_ncu(elements, end)
    if launches is None:
        print(f"ncu: {says}. Times by PyTorch's profiler; bytes and instructions unknown")
        told, says = _run([], "torch", elements, max(30.0, end - time.monotonic()))
        launches = told.get("kernels", [])
    if not launches:
        print(f"FAILED: {says}", file=sys.stderr)
        return 1
    frame = table(launches, elements, told["copy"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{preset.name(Cuda())}-kernels.csv"
    frame.to_csv(path, index=False, float_format="%.5g")
    print(frame.to_markdown(index=False, floatfmt=".3g"))
    print(f"\ncopy: {told['copy'] / 1e9:.0f} GB/s (read and written). Written: {path}")
    for name, reason in told["failed"].items():
        print(f"FAILED: {name}: {reason}", file=sys.stderr)
    return 1 if told["failed"] else 0


def _by_ncu(elements: int, end: float) -> tuple[list[dict[str, Any]] | None, dict[str, Any], str]:
    """Kernels, with the number of their case; None and why not."""
    if (found := ncu.find()) is None:
        return None, {}, "not found"
    says = ""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        for metrics in (tuple(ncu.METRICS), ncu.CORE):
            left = end - time.monotonic()
            if left < 10:
                break
            told, says = _run(ncu.command(found, log, metrics, []), "ncu", elements, left)
            text = log.read_text() if log.exists() else ""
            launches = in_cases(ncu.parse(text))
            if launches and told and any("seconds" in launch for launch in launches):
                return launches, told, ""
            errors = [line for line in text.splitlines() if "==ERROR==" in line]
            says = (errors or [says or "no kernels in its output"])[0]
            print(f"ncu: {says}")
            if "ERR_NVGPUCTRPERM" in text:
                break
    return None, {}, says


def _run(prefix: list[str], how: str, elements: int, timeout: float) -> tuple[dict[str, Any], str]:
    """What the child told, or an empty one and why."""
    child = [
        sys.executable,
        "-m",
        "benchmarks.profile_gpu",
        "--child",
        how,
        "--elements",
        str(elements),
    ]
    process = subprocess.Popen(
        prefix + child, cwd=Path(__file__).parent.parent, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what ncu started, too
        process.communicate()
        return {}, f"no answer in {timeout:.0f} s"
    answers = [line for line in out.splitlines() if line.startswith('{"failed"')]
    if answers:
        return json.loads(answers[-1]), ""
    last = (out + err).strip().splitlines()[-1:]
    return {}, (last or [f"exit status {process.returncode}"])[0]


def in_cases(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the number of the case, by the marks between them, which are left out."""
    case, found = -1, []
    for launch in launches:
        if _MARK in launch["kernel"]:
            case += 1
        elif case >= 0:
            found.append({"case": case, **launch})
    return found


def table(launches: list[dict[str, Any]], elements: int, copy: float) -> pd.DataFrame:
    """Launches of the same kernel in a case together, and the whole step of each case.

    Args:
        copy: bytes per second.
    """
    frame = pd.DataFrame(launches)
    frame["kernel"] = frame["kernel"].map(short)
    rows = []
    for case, of_case in frame.groupby("case", sort=True):
        parts = [*of_case.groupby("kernel", sort=False), ("whole step", of_case)]
        rows += [{"case": CASES[case].name, **_row(name, part, elements, copy)} for name, part in parts]
    return pd.DataFrame(rows)


def _row(name: str, part: pd.DataFrame, elements: int, copy: float) -> dict[str, Any]:
    seconds = part["seconds"].sum()
    row: dict[str, Any] = {"kernel": name, "launches": len(part), "us": seconds * 1e6}
    if "read" in part:
        row["read_per_element"] = part["read"].sum() / elements
        row["written_per_element"] = part["written"].sum() / elements
        row["of_copy"] = (part["read"] + part["written"]).sum() / seconds / copy
    if "thread_instructions" in part:
        row["instructions_per_element"] = part["thread_instructions"].sum() / elements
    if "warp_instructions" in part:  # slots that an element takes, whichever lanes are on
        row["slots_per_element"] = part["warp_instructions"].sum() * 32 / elements
    for column in ("issue", "occupancy", "of_peak"):
        if column in part:
            row[f"{column}_percent"] = (part[column] * part["seconds"]).sum() / seconds
    if "registers" in part:
        row["registers"] = part["registers"].max()
    if "bank_conflicts" in part:
        row["bank_conflicts_per_element"] = part["bank_conflicts"].sum() / elements
    return row


def short(kernel: str) -> str:
    """A kernel's name without its namespaces, arguments and, but for ours, what it is made of."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void |\([\w:]+\)", "", kernel).split("(")[0]
    if name.startswith("rose::"):
        return name.replace("rose::", "").replace("cuda::", "")
    return name.split("<")[0].split("::")[-1] or kernel


if __name__ == "__main__":
    sys.exit(main())
