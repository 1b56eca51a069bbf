"""``make gpu``: everything that a GPU is needed for, in one command, with the Python that is there.

Stages run in order of value, each in processes of its own, with its own limit and its own log.
The summary is written before and after each of them, so that a run which is cut off has still said what
it found. ``--rehearse`` runs the same stages without a GPU, with what it would give replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from glob import glob
from pathlib import Path

from gpu_stages import ROOT, Run, Stage

RESULTS = ROOT / "benchmarks" / "results"
LIMIT, LIMIT_OF_REHEARSAL = 480.0, 1800.0  # seconds
PATIENCE = 3  # a rehearsal's limits over a GPU's
NO_GPU_ARCH = "9.0"
NAMES = (
    "build", "doctor", "contract", "parity", "large", "bench", "profile", "sanitizer", "triton",
)  # fmt: skip
# Neither of contract nor of parity: a stage by itself, not for GPUs, or slow through the host's memory.
OTHER_FILES = {
    f"test_{name}.py" for name in ("gpu_large", "gpu_run", "gpu_binaries", "huge", "benchmarks")
}


def pytest(run: Run, name: str, *arguments: str, workers: int = 1, seconds: int = 60) -> list[str]:
    """Command for tests. With xdist even one process is a worker, so that a crash costs one test, and
    with its own timeout a test that hangs is named."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short"]
    command += [f"--junitxml={run.logs / name}.xml"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(workers, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={seconds}", "--timeout-method=thread"]
    return [*command, *arguments]


def table(run: Run, facts: Mapping[str, str], work: Path, rehearse: bool) -> dict[str, Stage]:
    """All stages, in order of value."""
    python, arch = sys.executable, facts["architecture"]
    # A rehearsal leaves the library of this machine as it is, where there is one.
    how = "scratch" if rehearse and any((ROOT / "rose_ops").glob("_C*.so")) else "install"
    names = {path.name for path in (ROOT / "tests").glob("test_*.py")} - OTHER_FILES
    of_optimizer = {name for name in names if name.startswith("test_gpu")}
    contract, parity = (
        [f"tests/{name}" for name in sorted(part)] for part in (of_optimizer, names - of_optimizer)
    )
    # One seed, or every worker had its own.
    env = {"ROSE_TEST_SEED": facts["seed"], "ROSE_TEST_ALL": "1", "ROSE_TEST_AT_ONCE": "1"}
    of_contract = env | {"OMP_NUM_THREADS": "4"}
    shared = env | {"OMP_NUM_THREADS": "2"}
    thin = shared | {"ROSE_TEST_SHARE": "0.1", "ROSE_TEST_THOROUGH": "0.1"}
    bench = ["--name", facts["slug"], "--output", str(run.results)]
    contract += ["-m", "gpu"]
    parity += ["-m", "gpu", "-k", "cuda and not triton"]
    large = ["tests/test_gpu_large.py", "-m", "gpu"]
    triton = ["tests/test_ops.py", "tests/test_parity.py", "tests/test_bracket.py", "-m", "gpu"]
    triton += ["-k", "triton"]
    benchmarks = ["--device", "cuda", "--preset", "gpu", *bench]
    profile = ["--device", "cuda", "--output", str(run.results)]
    small_steps = [python, "tests/gpu_sanitize.py"]
    if rehearse:
        contract[-1], of_contract["ROSE_TEST_SHARE"] = "not gpu", "0.2"
        parity = ["tests/test_ops.py", "-m", "not gpu and not slow", "-k", "simt"]
        large = ["tests/test_gpu_large.py", "-m", "not gpu"]
        triton = ["tests/test_ops.py", "-m", "slow", "-k", "triton"]
        small = ["--device", "cpu", "--preset", "gpu", "--sizes", "256Ki", "--repeats", "2"]
        benchmarks = [*small, *bench]
        profile[1] = "cpu"
        small_steps += ["--device", "cpu", "--elements", "5000"]
    stages = [
        Stage("build", 90, [[python, "tests/gpu_machine.py", "build", arch, str(work), how]]),
        Stage("doctor", 40, [[python, "-m", "rose_ops", "doctor"]],
              says=f"^{'cpu' if rehearse else 'cuda'} +equals the reference"),
        Stage("contract", 60, [pytest(run, "contract", *contract, workers=4)], of_contract,
              junit=run.logs / "contract.xml"),
        Stage("parity", 100, [pytest(run, "parity", *parity, workers=8)], shared,
              junit=run.logs / "parity.xml"),
        Stage("large", 90, [pytest(run, "large", *large)], env, ["tests/test_gpu_large.py"],
              junit=run.logs / "large.xml"),
        Stage("bench", 125, [[python, "-m", "benchmarks", *benchmarks]]),
        Stage("profile", 65, [[python, "-m", "benchmarks.profile_gpu", *profile]],
              needs=["benchmarks/profile_gpu.py"]),
        Stage("sanitizer", 120,
              [["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *small_steps]
               for tool in ("memcheck", "racecheck", "initcheck")],
              {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ["tests/gpu_sanitize.py"],
              "compute-sanitizer", r"(?s)(SUMMARY: 0 (errors|hazards).*){3}"),
        Stage("triton", 120, [pytest(run, "triton", *triton, workers=16)], thin,
              junit=run.logs / "triton.xml"),
    ]  # fmt: skip
    return {stage.name: stage for stage in stages}


def environment() -> dict[str, str]:
    """Of every stage: this tree's package, and the tools of Python and of the CUDA toolkit."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in (*homes, "/usr/local/cuda", *glob("/usr/local/cuda-*"))]
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *folders]
    packages = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(packages),
        "PYTHONUNBUFFERED": "1",
    }


def stub(folder: Path) -> None:
    """A tool that only a machine with a GPU has, for a rehearsal: it runs the command that it gets."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "compute-sanitizer"
    skip = f'while [ "$1" != {shlex.quote(sys.executable)} ]; do shift; done'
    script.write_text(f'#!/bin/sh\n{skip}\necho "SUMMARY: 0 errors"\nexec "$@"\n')
    script.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def describe(rehearse: bool) -> dict[str, str]:
    """The head of the summary."""

    def ask(*command: str) -> str:
        env = environment()
        if shutil.which(command[0], path=env["PATH"]) is None:
            return ""
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = json.loads(ask(sys.executable, "tests/gpu_machine.py", "probe"))
    except json.JSONDecodeError:
        sys.exit(f"error: {sys.executable} cannot import torch and setuptools; name one with PYTHON=")
    device = found.pop("device")
    if rehearse:
        device = f"none (rehearsed for {NO_GPU_ARCH})"
        found["architecture"] = NO_GPU_ARCH
    elif not device:
        sys.exit("error: PyTorch finds no GPU here; --rehearse runs the stages without one")
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    nvcc = re.search(r"release ([\d.]+)", ask("nvcc", "--version"))
    return {
        "device": device,
        "driver": driver or "unknown",
        **found,
        "nvcc": nvcc[1] if nvcc else "none",
        "python": f"{platform.python_version()} ({sys.executable})",
        "processors": str(os.cpu_count()),
        "commit": ask("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown",
        "seed": os.environ.get("ROSE_TEST_SEED") or str(secrets.randbits(31)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "slug": "rehearsal" if rehearse else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"default: all: {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, help="folder; default: $OUT, or build/gpu")
    parser.add_argument("--limit", type=float, help=f"seconds for all stages; default: {LIMIT:.0f}")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: is the command right?")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.stages if name not in NAMES]:
        parser.error(f"no such stage: {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    if args.limit is not None and not args.limit > 0:
        parser.error(f"--limit {args.limit}: expected seconds, more than 0")
    limit = args.limit or (LIMIT_OF_REHEARSAL if args.rehearse else LIMIT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work = ROOT / "build" / "gpu"
    if args.rehearse:
        work = output = (args.output or ROOT / "build" / "gpu-rehearsal").resolve()
        stub(work / "bin")
    else:  # which may be a folder that takes a few files only
        output = (args.output or Path(os.environ.get("OUT") or work)).resolve()
    facts = describe(args.rehearse)
    title = "Rehearsal: no GPU, nothing here is a result" if args.rehearse else "On a GPU"
    results = work / "results" if args.rehearse else RESULTS
    run = Run(title, facts, output, work / "logs", results, environment())
    stages = table(run, facts, work, args.rehearse)
    chosen = [stages[name] for name in NAMES if name in (args.stages or NAMES)]
    if args.rehearse:
        chosen = [replace(stage, limit=PATIENCE * stage.limit) for stage in chosen]
    status = run.stages(chosen, limit - (time.monotonic() - start))
    print(f"\n{(output / 'summary.md').read_text()}\nWritten: {output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
