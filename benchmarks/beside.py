"""Processes that keep cores busy while something is measured, as workers of a DataLoader do."""

from __future__ import annotations

import os
import subprocess
import sys

# They end with the process that started them, however that ended: whoever's parent is gone has another.
_LOOP = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


class Busy:
    """So many processes that compute, and touch no memory, within the ``with`` block.

    Raises:
        RuntimeError: one of them did not start, or ended before the block did.

    Attributes:
        pids: of the processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def __enter__(self) -> Busy:
        try:
            for _ in range(self._count):
                command = [sys.executable, "-I", "-S", "-c", _LOOP, str(os.getpid())]
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                    )
                )
            for process in self._processes:
                assert process.stdout is not None
                if not process.stdout.readline():  # it says when it begins
                    raise RuntimeError("a busy process did not start")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ended = [process.pid for process in self._processes if process.poll() is not None]
        self._end()
        if ended and kind is None:
            raise RuntimeError(f"a busy process ended too early: {ended}; these times mean nothing")

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
