"""Runs stages, each in processes of its own, and keeps a summary of what they have found so far."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5.0  # seconds in which what was interrupted may still say what it found
LOG_LINES = 300  # of each log, in the file with all of them
NAMED = 20  # failures of a stage in the summary
NOTE = 200  # characters of a note
# What tools say where a machine does not let them work.
REFUSED = re.compile(
    r".*(?:Device not supported|LibraryNotLoaded|ERR_NVGPUCTRPERM|Failed to initialize the profiler"
    r"|not supported on this (?:device|system|platform)|Unable to (?:attach|connect) to).*"
)


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side.

    Attributes:
        limit: seconds.
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
        title, facts: head of the summary.
        output: folder of the summary and of the ends of all logs in one file.
        logs: folder of each stage's log.
        results: folder from which what stages wrote is copied to ``output``.
        env: of every stage.
    """

    def __init__(
        self, title: str, facts: Mapping[str, str], output: Path, logs: Path, results: Path,
        env: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.title, self.facts, self.env = title, facts, env
        self.output, self.logs, self.results = output, logs, results
        self.all: list[Result] = []
        for folder in (output, logs, results):
            folder.mkdir(parents=True, exist_ok=True)

    def stages(self, stages: Sequence[Stage], limit: float) -> int:
        """Returns the exit status: 0 if every stage is ok or was skipped."""
        self.all = [Result(stage.name, stage.limit) for stage in stages]
        end = time.monotonic() + limit
        try:
            for stage, result in zip(stages, self.all, strict=True):
                if (left := end - time.monotonic()) < 1:
                    self._not_run("no time was left")
                    break
                self._timed(stage, result, min(stage.limit, left))
                if stage.name == "build" and result.result != "ok":
                    self._not_run("the build failed")
                    break
        except KeyboardInterrupt:
            for result in self.all:
                if result.result == "running":
                    result.result = "interrupted"
            self._not_run("the run was interrupted")
        self.write()
        return 0 if all(result.result in ("ok", "skipped") for result in self.all) else 1

    def _not_run(self, why: str) -> None:
        for result in self.all:
            if result.result == "not run":
                result.note = why

    def _timed(self, stage: Stage, result: Result, limit: float) -> None:
        result.limit, result.result = limit, "running"
        self.write()
        print(f"{stage.name} (at most {limit:.0f} s) ...", flush=True)
        start, started = time.monotonic(), time.time()
        try:
            self._stage(stage, result)
        finally:
            result.seconds = time.monotonic() - start
            for path in self.results.iterdir() if self.results != self.output else ():
                if path.is_file() and path.stat().st_mtime >= started:
                    shutil.copy(path, self.output)
        self.write()
        print(*self._lines(result), sep="\n", flush=True)

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _stage(self, stage: Stage, result: Result) -> None:
        log = self.log(stage.name)
        log.write_text("")
        env = {**self.env, **stage.env}
        if missing := [name for name in stage.needs if not (ROOT / name).exists()]:
            result.result, result.note = "failed", f"there is no {', '.join(missing)}"
            return
        if stage.tool and shutil.which(stage.tool, path=env["PATH"]) is None:
            result.result, result.note = "skipped", f"there is no {stage.tool} on this machine"
            return
        if stage.junit:
            stage.junit.unlink(missing_ok=True)
        statuses = execute(stage.commands, log, env, result.limit)
        text = log.read_text(errors="replace")
        if stage.junit:
            result.counts, result.failures = tests(stage.junit, text)
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        refused = REFUSED.search(text) if stage.tool else None
        said = re.search(stage.says, text, re.M)
        if None in statuses:
            result.result, result.note = "timed out", f"killed; the last line: {last}"
        elif refused:
            result.result, result.note = "skipped", f"{stage.tool} says: {refused[0]}"
        elif stage.junit and not result.counts["passed"] + result.counts["failed"]:
            result.result, result.note = "failed", f"no test ran: {last}"
        elif any(statuses):
            numbers = ", ".join(map(str, statuses))
            result.result, result.note = "failed", f"exit status {numbers}: {last}"
        elif said is None:
            result.result, result.note = "failed", f"its log does not match {stage.says}"
        else:
            result.result, result.note = "ok", "" if stage.junit else said[0].partition("\n")[0] or last

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
                "seconds": f"{r.seconds:.1f}", "limit": f"{r.limit:.0f}",
                "note": " ".join(r.note.split())[:NOTE],
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


def execute(
    commands: Sequence[Sequence[str]], log: Path, env: Mapping[str, str], seconds: float
) -> list[int | None]:
    """Run commands side by side, in groups of processes of which none is left.

    Returns:
        Exit statuses; None of one that ran out of time. It was interrupted first, and then killed:
        pytest still writes what it knows.
    """
    processes: list[subprocess.Popen[bytes]] = []
    parts = [log.with_name(f"{log.name}.{i}") for i in range(len(commands))]
    late: list[subprocess.Popen[bytes]] = []
    try:
        for command, part in zip(commands, parts, strict=True):
            part.write_text(f"$ {shlex.join(command)}\n")
            with part.open("a") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            processes.append(process)
        late = _wait(processes, seconds)
        for process in late:
            process.send_signal(signal.SIGINT)
        _wait(late, GRACE)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.write_text("\n".join(part.read_text(errors="replace") for part in parts if part.exists()))
        for part in parts:
            part.unlink(missing_ok=True)
    return [None if process in late else process.returncode for process in processes]


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], seconds: float
) -> list[subprocess.Popen[bytes]]:
    """Returns those that did not end in time."""
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    return [process for process in processes if process.poll() is None]


def tests(junit: Path, log: str) -> tuple[Counter[str], list[str]]:
    """What pytest's tests did, and those that failed. Where it was killed before it wrote results, from
    the line that it prints as each ends. (Its results call a test passed that was interrupted.)"""
    words = "(PASSED|FAILED|ERROR|SKIPPED)"
    ended = [(word, name) for name, word in re.findall(rf"^(\S+::.*?) {words}\b", log, re.M)]
    ended += re.findall(rf"^\[gw\d+\].*? {words} (\S.*?) *$", log, re.M)
    if last := re.findall(r"^=+ (\d+ .* in [\d.]+s\b.*) =+$", log, re.M):
        found = re.findall(r"(\d+) (passed|failed|error|skipped)", last[-1])
    else:
        found = [("1", word.lower()) for word, _ in ended]
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    for number, what in found:
        counts["failed" if what == "error" else what] += int(number)
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return counts, [name for word, name in ended if word in ("FAILED", "ERROR")]
    failures = []
    for case in cases:
        for bad in (part for part in case if part.tag in ("failure", "error")):
            said = (bad.get("message") or bad.text or "").strip().splitlines() or [""]
            where = case.get("classname", "").replace(".", "/")
            failures.append(f"{where}.py::{case.get('name')}: {said[0][:160]}")
    return counts, failures
