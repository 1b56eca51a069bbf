"""What takes seconds to import, for the server of ``forked.py``; what is not installed is left out."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks
for name in (
    "pytest",
    "torch._dynamo",  # which the first optimizer of a process imports
    "distributed_ranks", "reshard_ranks", "ddp_ranks", "kill_ranks", "rose_ops.cli",
    "benchmarks.paper.landscape", "benchmarks.paper.probing", "benchmarks.paper.report",
    "benchmarks.paper.runner", "benchmarks.paper.upper", "matplotlib.pyplot", "scipy.stats",
    "transformers.trainer", "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
):  # fmt: skip
    with suppress(ImportError):
        importlib.import_module(name)
