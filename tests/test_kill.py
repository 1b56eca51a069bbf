"""Runs that are killed (SIGKILL) at random moments, and resumed from the latest complete checkpoint."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import context
from torch import Tensor
from training import assert_same

pytestmark = [
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system has no SIGKILL"
    ),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
    ),
]
if torch.distributed.is_available():
    from kill_ranks import HALVES, alone, together

SECONDS = 60  # for a run, which takes one or two


class Running:
    """A run in one process or several that share its parameters."""

    def __init__(self, size: int, folder: Path) -> None:
        self.folder, self.processes, connections = folder, [], []
        self.meet = folder.with_suffix(f".{time.monotonic_ns()}")
        for rank in range(size):
            here, there = context().Pipe()
            target: Any = alone if size == 1 else together
            place = () if size == 1 else (rank, size, self.meet)
            process = context().Process(target=target, args=(*place, folder, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            connections.append(here)
        self.begun = [connection.recv() for connection in connections]  # with so many halves of steps
        self.since = time.monotonic()

    def killed(self, ranks: list[int], after: float) -> bool:
        """Kill some of the processes so many seconds from the beginning, and wait until none is left.

        Returns:
            Whether it was not at its end already.
        """
        time.sleep(max(0.0, self.since + after - time.monotonic()))
        for rank in ranks:
            self.processes[rank].kill()
        return self.ended()[ranks[0]] == -signal.SIGKILL

    def ended(self) -> list[int | None]:
        """Exit codes. What hangs is killed, and fails."""
        for process in self.processes:
            process.join(SECONDS)
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, "a process did not end after another was killed"
        return [process.exitcode for process in self.processes]

    def result(self) -> list[dict[str, Tensor]]:
        """Of each rank."""
        assert set(self.ended()) == {0}
        ranks = range(len(self.processes))
        return [torch.load(self.folder / f"result{rank}.pt", weights_only=True) for rank in ranks]


def is_torn(folder: Path) -> bool:
    """Whether a checkpoint was not complete."""
    return any(folder.glob("*.partial"))


@pytest.mark.thin(2)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("times", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(size, times, tmp_path, generator, record_property):
    """During saves, too, all processes or one of them: parameters, moments, masks and random numbers at
    the end are, bit for bit and every time, those of a run that was not killed. (100 times in the slow
    suite.)"""
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = Running(size, folder)
    expected = whole.result()
    seconds = time.monotonic() - whole.since
    assert any("first_mask" in name for name in expected[0])
    kills = torn = halfway = 0
    for attempt in range(5 * times):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        moment = seconds * float(torch.rand((), generator=generator))
        ranks = [*range(size)] if attempt % 3 == 0 else [attempt % size]
        if Running(size, folder).killed(ranks, moment):
            kills += 1
            torn += is_torn(folder)
            resumed = Running(size, folder)
            assert_same(resumed.result(), expected, f"killed after {moment} s")
            halfway += 0 < resumed.begun[0] < HALVES
        shutil.rmtree(folder)
        if kills == times:
            break
    assert kills == times
    record_property(
        "table",
        f"{size} processes killed {kills} times, {torn} of them within a save, {halfway} resumed",
    )
    assert halfway > 0
    assert torn > 0
