"""Processes that start in some milliseconds: forked from one that has imported torch, and what takes
seconds beside it, but has not used it yet."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

IMPORTED = ["distributed_ranks", "reshard_ranks", "kill_ranks"]


def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    # (Where the server runs already, it stays as it is.)
    found.set_forkserver_preload(IMPORTED)
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):  # it does not get sys.path
        ensure_running()
    return found
