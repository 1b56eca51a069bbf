"""Processes that start in some milliseconds: forked from one that has imported torch, and what takes
seconds beside it (``preloaded.py``), but has not used it yet."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
# No hub, and no way to one.
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
}  # fmt: skip


def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    # (Where the server runs already, it stays as it is.)
    found.set_forkserver_preload(["preloaded"])
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**OFFLINE, "PYTHONPATH": os.pathsep.join(path)}  # it does not get sys.path
    with mock.patch.dict(os.environ, environment):
        ensure_running()
    return found


# ------------------------------------------------------------------------------------------ commands


class Command:
    """A module or a script that runs as Python runs it for a command, in a process of its own.

    Args:
        target: The module's name, or the script's path.
        arguments: Of the command line.
        folder: The working directory.
        environment: Variables to set.
    """

    def __init__(
        self, target: str, *arguments: str, folder: Path = ROOT, environment: Mapping[str, str] = {}
    ) -> None:  # fmt: skip
        self.said = tempfile.TemporaryDirectory()
        self.files = [Path(self.said.name) / name for name in ("output", "errors")]
        given = (target, arguments, folder, {**environment}, self.files)
        self.process = context().Process(target=_become, args=given, daemon=False)
        self.process.start()

    def wait(self, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """What it printed, and its exit status, after the end. Kills it if that does not come."""
        self.process.join(seconds)
        hangs = self.process.is_alive()
        self.process.kill()
        self.process.join()
        said = [file.read_text() if file.exists() else "" for file in self.files]
        self.said.cleanup()
        assert not hangs, f"no end after {seconds} s: {said}"
        return subprocess.CompletedProcess([], self.process.exitcode, *said)


def command(target: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, until its end."""
    return Command(target, *arguments, **options).wait()


def program(source: str, folder: Path) -> None:
    """Run a program that must come to its end."""
    script = folder / "program.py"
    script.write_text(source)
    done = command(str(script), folder=folder)
    assert done.returncode == 0, done.stderr


def torchrun(target: str, *arguments: str, size: int = 2, **options: Any) -> list[str]:
    """What a script prints in each of so many processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    commands = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        commands.append(Command(target, *arguments, environment={**place, **own}, **options))
    results = [each.wait() for each in commands]
    for result in results:
        assert result.returncode == 0, result.stderr
    return [result.stdout for result in results]


_kept: list[dict[str, Any]] = []


def _become(
    target: str, arguments: Collection[str], folder: Path, environment: Mapping[str, str],
    files: Collection[Path],
) -> None:  # fmt: skip
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [target, *arguments]
    torch.set_num_threads(1)
    run = runpy.run_path if target.endswith(".py") else runpy.run_module
    # Kept to the end: the destructor of DistributedDataParallel's reducer waits for gloo's threads with
    # the lock of the interpreter in its hands, which one of them may need.
    _kept.append(run(target, run_name="__main__"))


# --------------------------------------------------------------------------------------------- ranks


def answer(connection: Any, call: Callable[[Any], Any]) -> None:
    """Send what ``call`` makes of each task that comes through the connection, or what was wrong,
    until there is no more."""
    while (task := connection.recv()) is not None:
        try:
            connection.send((True, call(task)))
        except BaseException:  # noqa: PERF203 (torch.distributed.checkpoint's are no Exception)
            connection.send((False, traceback.format_exc()))


class Ranks:
    """Processes that serve one call after the other; started by the first, and anew after a failure, as
    some of them may wait for others then.

    Args:
        serve: What each runs: ``serve(rank, size, store, connection)``, where ``store`` is the path of
            a new file to meet at. It receives calls, until None, and sends whether each was fine, and
            what it returned or what was wrong.
        size: How many.
        folder: Where their files may be.
        seconds: For one call; they take one or two.
    """

    def __init__(
        self, serve: Callable[..., None], size: int, folder: Path, seconds: float = 90
    ) -> None:
        self.serve, self.size, self.folder, self.seconds = serve, size, folder, seconds
        self.started: list[tuple[Any, Any]] = []

    def run(self, call: Any, size: int | None = None, lost: Collection[int] = ()) -> list[Any]:
        """What a call of the first ``size`` gives on each rank; of those that are lost, None."""
        if not self.started:
            self._start()
        try:
            return self._run(call, self.started[:size], lost)
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        store = tempfile.mkdtemp(dir=self.folder) + "/store"
        for rank in range(self.size):
            here, there = context().Pipe()
            given = (rank, self.size, store, there)
            process = context().Process(target=self.serve, args=given, daemon=True)
            process.start()
            there.close()
            self.started.append((process, here))

    def _run(self, call: Any, started: list[tuple[Any, Any]], lost: Collection[int]) -> list[Any]:
        for _, connection in started:
            connection.send(call)
        results: list[Any] = [None] * len(started)
        left = {there: rank for rank, (_, there) in enumerate(started) if rank not in lost}
        while left:
            ready = multiprocessing.connection.wait(left, self.seconds)
            assert ready, f"{call[0]} hangs on ranks {[*left.values()]} of {len(started)}"
            for connection in ready:
                fine, value = connection.recv()
                assert fine, value
                results[left.pop(connection)] = value
        return results

    def stop(self) -> None:
        for process, connection in self.started:
            with suppress(OSError):
                connection.send(None)
            process.kill()
        self.started = []
