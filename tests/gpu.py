"""``make gpu``: everything that a GPU is needed for, in one command, with the Python that is there.

Stages run in order of value, each in processes of its own, with its own limit and its own log.
The summary is written before and after each of them, so that a run which is cut off has still said what
it found. ``--rehearse`` runs the same stages without a GPU, with what it would give replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import importlib.util
import io
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
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from glob import glob
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARY = ROOT / "rose_ops" / "_C.abi3.so"
GRACE = 5.0  # seconds in which what was interrupted may still say what it found
LOG_LINES = 300  # of each log, in the file with all of them
NAMED = 20  # failures of a stage in the summary
NO_GPU_ARCH = "9.0"
# Not of the parity stage: they are stages themselves, or pass much through the host's memory.
NOT_PARITY = {f"test_{name}.py" for name in ("gpu", "gpu_large", "gpu_run", "huge", "benchmarks")}
# What tools say where a machine does not let them work.
REFUSED = re.compile(
    r".*(?:Device not supported|LibraryNotLoaded|ERR_NVGPUCTRPERM|Failed to initialize the profiler"
    r"|not supported on this (?:device|system|platform)|Unable to (?:attach|connect) to).*"
)


@dataclass(frozen=True)
class Stage:
    """Commands that run one after the other.

    Attributes:
        limit: seconds for all commands together.
        needs: files without which it fails.
        tool: a program without which it is skipped, and whose refusal to work skips it, too.
        says: what its log has to match.
        junit: where pytest, if it is the command, writes results.
    """

    name: str
    limit: float
    commands: Sequence[Sequence[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    tool: str = ""
    says: str = ""
    junit: Path | None = None


@dataclass
class Result:
    stage: str
    limit: float
    result: str = "not run"
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    note: str = ""
    failures: list[str] = field(default_factory=list)


class Run:
    """Stages one after the other, and what is known of them.

    Args:
        output: folder of the summary and of all logs in one file.
        work: folder of each stage's log.
        results: folder from which what stages wrote is copied to ``output``.
    """

    def __init__(self, title: str, facts: Mapping[str, str], output: Path, work: Path, results: Path):
        self.title, self.facts, self.output, self.results = title, facts, output, results
        self.logs = work / "logs"
        self.all: list[Result] = []
        for folder in (output, self.logs, results):
            folder.mkdir(parents=True, exist_ok=True)

    def stages(self, stages: Sequence[Stage], limit: float) -> int:
        """Returns the exit status: 0 if every stage is ok or was skipped."""
        self.all = [Result(stage.name, stage.limit) for stage in stages]
        end = time.monotonic() + limit
        stop = ""
        for stage, result in zip(stages, self.all, strict=True):
            left = end - time.monotonic()
            if stop or left < 1:
                result.note = stop or f"nothing left of {limit:.0f} s"
                continue
            result.limit, result.result = min(stage.limit, left), "running"
            self.write()
            print(f"{stage.name} (at most {result.limit:.0f} s) ...", flush=True)
            start, started = time.monotonic(), time.time()
            try:
                self._stage(stage, result)
            except KeyboardInterrupt:
                result.result, stop = "interrupted", "the run was interrupted"
            result.seconds = time.monotonic() - start
            for path in self.results.glob("*"):
                if path.is_file() and path.stat().st_mtime >= started and self.results != self.output:
                    shutil.copy(path, self.output)
            if stage.name == "build" and result.result != "ok":
                stop = "the build failed"
            self.write()
            print(*self._lines(result), sep="\n", flush=True)
        self.write()
        return 0 if all(result.result in ("ok", "skipped") for result in self.all) else 1

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _stage(self, stage: Stage, result: Result) -> None:
        log = self.log(stage.name)
        log.write_text("")
        env = environment() | stage.env
        if missing := [name for name in stage.needs if not (ROOT / name).exists()]:
            result.result, result.note = "failed", f"there is no {', '.join(missing)}"
            return
        if stage.tool and shutil.which(stage.tool, path=env["PATH"]) is None:
            result.result, result.note = "skipped", f"there is no {stage.tool} on this machine"
            return
        if stage.junit:
            stage.junit.unlink(missing_ok=True)
        end = time.monotonic() + result.limit
        statuses = []
        for command in stage.commands:
            status = execute(command, log, env, end - time.monotonic())
            statuses.append(status)
            if status is None:
                break
        text = log.read_text(errors="replace")
        if stage.junit:
            result.counts, result.failures = tests(stage.junit, text)
        refused = REFUSED.search(text) if stage.tool else None
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        if statuses[-1] is None:
            result.result, result.note = "timed out", f"while it said: {last}"
        elif refused:
            result.result, result.note = "skipped", f"{stage.tool}: {refused[0].strip()}"
        elif stage.junit and not result.counts["passed"] + result.counts["failed"]:
            result.result, result.note = "failed", f"no test ran: {last}"
        elif any(statuses):
            codes = ", ".join(str(status) for status in statuses)
            result.result, result.note = "failed", f"exit status {codes}: {last}"
        elif stage.says and not re.search(stage.says, text, re.M):
            result.result, result.note = "failed", f"its log has no line {stage.says}"
        else:
            result.result, result.note = "ok", last if stage.junit is None else ""

    def _lines(self, result: Result) -> list[str]:
        lines = [f"{result.stage}: {result.result} in {result.seconds:.0f} s. {result.note}"]
        if result.result in ("failed", "timed out") and not result.failures:
            log = self.log(result.stage)
            lines += log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
        return lines + [f"  {name}" for name in result.failures[:NAMED]]

    def write(self) -> None:
        """The summary, for people and for programs, and all logs."""
        counted = ("passed", "failed", "skipped")
        rows = [
            {
                "stage": r.stage, "result": r.result, **{key: r.counts[key] or "" for key in counted},
                "seconds": f"{r.seconds:.1f}", "limit": f"{r.limit:.0f}", "note": r.note[:200],
            }
            for r in self.all
        ]  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        replace(self.output / "summary.csv", text.getvalue())
        lines = [f"# {self.title}", "", *(f"- {key}: {value}" for key, value in self.facts.items()), ""]
        lines += [f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
        cells = [[str(value).replace("|", "\\|") for value in row.values()] for row in rows]
        lines += [f"| {' | '.join(row)} |" for row in cells]
        for r in self.all:
            if r.failures:
                more = len(r.failures) - NAMED
                lines += ["", f"## Failures of {r.stage}", ""]
                lines += [f"- {name}" for name in r.failures[:NAMED]]
                lines += [f"- and {more} more"] if more > 0 else []
        replace(self.output / "summary.md", "\n".join(lines) + "\n")
        logs = []
        for r in self.all:
            if r.result != "not run" and (log := self.log(r.stage)).exists():
                tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                logs += [f"=== {r.stage}: {r.result}", *tail, ""]
        replace(self.output / "logs.txt", "\n".join(logs))


def replace(path: Path, text: str) -> None:
    """At once: whoever is cut off in between leaves the old one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def execute(command: Sequence[str], log: Path, env: Mapping[str, str], seconds: float) -> int | None:
    """Returns the exit status; None if it ran out of time. It and all that it started are gone then:
    first it is interrupted, so that pytest still writes what it knows."""
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        status = None
        try:
            status = process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            file.write(f"\nkilled after {seconds:.0f} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status


def tests(junit: Path, log: str) -> tuple[Counter[str], list[str]]:
    """What pytest's tests did, and those that failed: from its results or, where it was killed before
    it wrote any, from its log."""
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    failures = []
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        for word, name in re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b +(\S+::.*\S)", log):
            if " - " not in name:  # a test as it ends, not the list of failures at the end
                counts["failed" if word == "ERROR" else word.lower()] += 1
                failures += [name] if word in ("FAILED", "ERROR") else []
        return counts, failures
    for case in cases:
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        if bad is not None:
            counts["failed"] += 1
            said = (bad.get("message") or bad.text or "").strip().splitlines() or [""]
            where = case.get("classname", "").replace(".", "/")
            failures.append(f"{where}.py::{case.get('name')}: {said[0][:160]}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failures


# ------------------------------------------------------------------------------- what the stages are


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
    inside = [python, "tests/gpu.py", "--inside"]
    others = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    parity_files = [f"tests/{name}" for name in others if name not in NOT_PARITY]
    # Workers must agree on what is random. Half the processors are left to the reference.
    env = {"ROSE_TEST_SEED": os.environ.get("ROSE_TEST_SEED") or str(secrets.randbits(31))}
    shared = env | {"OMP_NUM_THREADS": "2"}
    thin = shared | {"ROSE_TEST_SHARE": "0.1", "ROSE_TEST_THOROUGH": "0.1"}
    bench = ["--name", facts["slug"], "--output", str(run.results)]
    tools = ("memcheck", "racecheck", "initcheck")
    contract = ["tests/test_gpu.py", "-m", "gpu"]
    parity = [*parity_files, "-m", "gpu", "-k", "cuda and not triton"]
    large = ["tests/test_gpu_large.py", "-m", "gpu"]
    triton = ["tests/test_ops.py", "tests/test_parity.py", "tests/test_bracket.py", "-m", "gpu"]
    triton += ["-k", "triton"]
    benchmarks = ["--device", "cuda", "--preset", "gpu", *bench]
    if rehearse:
        contract[-1] = "not gpu"
        parity = ["tests/test_ops.py", "-m", "not gpu and not slow", "-k", "simt"]
        large = ["tests/test_gpu_large.py", "-m", "not gpu"]
        triton = ["tests/test_ops.py", "-m", "slow", "-k", "triton"]
        benchmarks = ["--device", "cpu", "--works", "flat", "--sizes", "1Mi", "--data", "gaussian",
                      "--repeats", "2", "--only", "bracket", "--no-memory", *bench]  # fmt: skip
    stages = [
        Stage("build", 90, [[*inside, "build", arch, str(work), "scratch" if rehearse else "install"]]),
        Stage("doctor", 40, [[python, "-m", "rose_ops", "doctor"]],
              says=f"^{'cpu' if rehearse else 'cuda'} +equals the reference"),
        Stage("contract", 60, [pytest(run, "contract", *contract)], env,
              junit=run.logs / "contract.xml"),
        Stage("parity", 100, [pytest(run, "parity", *parity, workers=8)], shared,
              junit=run.logs / "parity.xml"),
        Stage("large", 90, [pytest(run, "large", *large)], env, ["tests/test_gpu_large.py"],
              junit=run.logs / "large.xml"),
        Stage("bench", 125, [[python, "-m", "benchmarks", *benchmarks]]),
        Stage("profile", 60, [[python, "benchmarks/profile_gpu.py"]],
              needs=["benchmarks/profile_gpu.py"], tool="ncu"),
        Stage("sanitizer", 120,
              [["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", python,
                "tests/gpu_sanitize.py"] for tool in tools],
              {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ["tests/gpu_sanitize.py"],
              "compute-sanitizer", r"(?s)(SUMMARY: 0 (errors|hazards).*){3}"),
        Stage("triton", 120, [pytest(run, "triton", *triton, workers=16)], thin,
              junit=run.logs / "triton.xml"),
    ]  # fmt: skip
    return {stage.name: stage for stage in stages}


NAMES = (
    "build", "doctor", "contract", "parity", "large", "bench", "profile", "sanitizer", "triton",
)  # fmt: skip


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


def stubs(folder: Path) -> None:
    """Tools that only a machine with a GPU has, for a rehearsal: they run the command that they get."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("compute-sanitizer", "ncu"):
        script = folder / name
        python = shlex.quote(sys.executable)
        script.write_text(
            f'#!/bin/sh\nwhile [ "$1" != {python} ]; do shift; done\necho "SUMMARY: 0 errors"; exec "$@"\n'
        )
        script.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


# ------------------------------------------------------------------- what runs in a process of its own


def load_setup():
    spec = importlib.util.spec_from_file_location("rose_ops_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(arch: str, work: str, how: str) -> None:
    """Build the library for one architecture and, to install it, put it where the package looks for it.
    Not from the tree itself: setuptools before 77 does not read its pyproject.toml."""
    code = f"sm_{arch.replace('.', '')}"
    setup = load_setup()
    if how == "install" and code in codes(LIBRARY, setup.fingerprint()):
        print(f"{LIBRARY} is of these sources and has kernels for {code}: taken as it is")
        return
    tree = Path(work, "tree")
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "rose_ops").mkdir(parents=True)
    for name in ("csrc", "setup.py"):
        (tree / name).symlink_to(ROOT / name)
    env = {**os.environ, "ROSE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=env, check=True)
    made = tree / "rose_ops" / LIBRARY.name
    if code not in codes(made, setup.fingerprint()):
        sys.exit(f"{made} has no kernels for {code}")
    import torch

    torch.ops.load_library(made)
    if how == "install":
        new = LIBRARY.with_name(LIBRARY.name + ".new")
        shutil.copy(made, new)
        new.replace(LIBRARY)
    print(f"built for {code} by setuptools {importlib.metadata.version('setuptools')}: {how}")


def codes(library: Path, fingerprint: str) -> list[str]:
    """What a library has CUDA kernels for; nothing if it is of other sources. See setup.py."""
    data = library.read_bytes() if library.exists() else b""
    _, _, rest = data.partition(bytes.fromhex(fingerprint))
    return rest[:200].partition(b";")[0].decode("ascii", "replace").split()


def probe() -> None:
    """Print what this machine is."""
    import torch

    facts = {"device": "", "architecture": NO_GPU_ARCH, "torch": torch.__version__}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts["device"], facts["architecture"] = p.name, f"{p.major}.{p.minor}"
        facts["memory"] = f"{p.total_memory / 2**30:.0f} GiB"
    installed = {d.name: d.version for d in reversed([*importlib.metadata.distributions()])}
    facts |= {name: installed.get(name, "none") for name in ("triton", "setuptools")}
    facts["sources"] = load_setup().fingerprint()[:12]
    print(json.dumps(facts))


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
        found = json.loads(ask(sys.executable, "tests/gpu.py", "--inside", "probe"))
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
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "slug": "rehearsal" if rehearse else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"default: all: {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, help="folder; default: $OUT, or build/gpu")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: is the command right?")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.stages if name not in NAMES]:
        parser.error(f"no such stage: {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    if args.limit <= 0:
        parser.error(f"--limit {args.limit}: expected seconds, more than 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work = ROOT / "build" / ("gpu-rehearsal" if args.rehearse else "gpu")
    output = args.output or Path((not args.rehearse and os.environ.get("OUT")) or work)
    if args.rehearse:
        stubs(work / "bin")
    facts = describe(args.rehearse)
    title = "Rehearsal: no GPU, nothing here is a result" if args.rehearse else "On a GPU"
    results = work / "results" if args.rehearse else RESULTS
    run = Run(title, facts, output.resolve(), work, results)
    stages = table(run, facts, work, args.rehearse)
    status = run.stages([stages[n] for n in NAMES if n in (args.stages or NAMES)], args.limit)
    print(f"\n{(output / 'summary.md').read_text()}\nWritten: {output.resolve()}")
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit({"build": build, "probe": probe}[sys.argv[2]](*sys.argv[3:]))
    sys.exit(main())
