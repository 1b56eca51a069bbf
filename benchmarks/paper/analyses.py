"""Measurements of models trained anew: surfaces, interpolation, probing, dropout.

Each appends its numbers to a file of its own in the results folder, and then a row to `analyses.csv`
that says what they are of: a measurement without that row was not finished. One that is there already
is left out.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paper.arguments import at_least
from benchmarks.paper.methods import METHODS
from benchmarks.paper.results import KEY, MACHINE, Results, append, drop, read
from benchmarks.paper.runner import RESULTS, chosen, machine, prepare, task_of
from benchmarks.paper.runs import TASKS, Run
from benchmarks.paper.train import Trained, train_run
from rose_ops.finetune import UserError
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.models import model_folder
from rose_ops.finetune.runtime import Runtime, choose_runtime

ANALYSES = (
    *("analysis", "command", "run", *KEY, "preset", "steps", "lr", "upper", "gamma", "options"),
    *("seconds", "used_precision", *MACHINE),
)  # fmt: skip
INITIAL = "initial"  # the pre-trained encoder with a new classifier, not trained
SPLITS = ("clean", "adversarial", "train")


def add_arguments(
    parser: argparse.ArgumentParser, methods: Sequence[str], granularity: str = "element"
) -> None:
    """The options that all measurements have: which runs to train, and where."""
    group = parser.add_argument_group("what is trained, with the settings of `run`")
    group.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2"])
    group.add_argument("--models", nargs="+", default=["minilm"], help="also folders or hub names")
    names = f"{INITIAL} (not trained), {', '.join(METHODS)}"
    group.add_argument("--methods", nargs="+", default=list(methods), help=f"from: {names}")
    group.add_argument(
        "--granularities", nargs="+", choices=("element", "tensor"), default=[granularity]
    )
    group.add_argument("--seeds", nargs="+", type=int, default=[0])
    group.add_argument(
        "--preset", choices=("small", "published-base", "published-large"), default="small"
    )
    group.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="as steps=100")
    group = parser.add_argument_group("where")
    data_dir = os.environ.get("ROSE_DATA_DIR") or None
    group.add_argument("--data-dir", type=Path, default=data_dir, help="default: the hub")
    group.add_argument("--cache-dir", type=Path, help="of models; default: the user's cache")
    group.add_argument("--results", type=Path, default=RESULTS)
    group.add_argument("--device", default=os.environ.get("DEVICE") or "cpu")
    group.add_argument("--threads", type=at_least(1), help="default: what torch chooses")
    parser.set_defaults(sweep=None)


def runs_of(args: argparse.Namespace) -> list[Run]:
    """What to train, each once.

    Raises:
        UserError: An unknown method, or nothing is left to be trained.
    """
    if unknown := [x for x in args.methods if x not in METHODS and x != INITIAL]:
        raise UserError(f"unknown method {unknown[0]!r}; choose from {INITIAL}, {', '.join(METHODS)}")
    found = chosen(args)
    if INITIAL in args.methods:
        blank = chosen(argparse.Namespace(**vars(args) | {"methods": ["adamw"]}))
        found = [replace(run, method=INITIAL, steps=0) for run in blank] + found
    if not found:
        raise UserError(
            f"the study has no run of {', '.join(args.methods)} on {', '.join(args.tasks)} for "
            f"{', '.join(args.models)} at {', '.join(args.granularities)} granularity"
        )
    return found


@dataclass(frozen=True)
class Place:
    """Where runs are trained and measurements are kept.

    Attributes:
        args: The command's options.
        results: The folder.
    """

    args: argparse.Namespace
    results: Results

    @classmethod
    def of(cls, args: argparse.Namespace) -> Place:
        """Ready to train: threads and numerics are set."""
        prepare(args.threads)
        return cls(args, Results(args.results))

    def runtime(self, run: Run) -> Runtime:
        return choose_runtime(self.args.device, run.precision)

    def model_folder(self, run: Run) -> str:
        return model_folder(run.model, self.args.cache_dir)

    def task(self, run: Run) -> Task:
        """The run's task, if its data are those of the results in the folder."""
        task = task_of(run.task, self.args.data_dir)
        self.results.check_data(run.task, task)
        return task

    def train(self, run: Run, task: Task, tests: Mapping[str, Examples]) -> Trained:
        """`train_run` with a progress bar. The method `INITIAL` is not trained."""
        real = replace(run, method="adamw") if run.method == INITIAL else run
        real = replace(real, eval_every=max(1, real.steps))  # only the end matters here
        title = f"{run.method}, {run.task}, {run.model}, {run.granularity}, seed {run.seed}"
        with tqdm(total=run.steps, desc=title, unit="step", mininterval=10) as bar:
            return train_run(
                *(real, task, self.runtime(run), self.model_folder(run), tests),
                on_step=lambda record: bar.update(),
            )

    def is_done(self, command: str, run: Run, options: Mapping[str, Any]) -> bool:
        """Whether the measurement is in the results. Says so."""
        with self.results.locked():
            return self._is_there(command, run, options)

    def _is_there(self, command: str, run: Run, options: Mapping[str, Any]) -> bool:
        """As `is_done`, within the lock."""
        there = {row["analysis"] for row in read(self.results.folder / "analyses.csv")}
        if found := analysis_id(command, run, options) in there:
            print(f"{command}: {run.method}, {run.task}, seed {run.seed} is there already")
        return found

    @contextmanager
    def recording(
        self, command: str, run: Run, options: Mapping[str, Any], columns: Sequence[str]
    ) -> Iterator[list[dict[str, Any]]]:
        """A list for the rows of one measurement, which are written when the block ends well.

        They are not if another process has written the same measurement meanwhile. What it, or this
        one, was stopped at writing is replaced.

        Args:
            command: Gives the file its name, `<command>.csv`.
            run: What was trained.
            options: All else that the numbers depend on.
            columns: Of the file.
        """
        rows: list[dict[str, Any]] = []
        start, runtime = time.perf_counter(), self.runtime(run)
        where = machine(runtime.device)
        yield rows
        analysis = analysis_id(command, run, options)
        settings = {x: y for x, y in vars(run).items() if x in ANALYSES}
        entry = {
            **{"analysis": analysis, "command": command, "run": run.id, **settings},
            "options": json.dumps(options, sort_keys=True),
            "seconds": round(time.perf_counter() - start, 1),
            "used_precision": runtime.precision,
            **{name: where.get(name, "") for name in MACHINE},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        numbers = self.results.folder / f"{command}.csv"
        shown = [{"analysis": analysis, **{x: _short(y) for x, y in row.items()}} for row in rows]
        with self.results.locked():
            if not self._is_there(command, run, options):
                drop(numbers, lambda row: row.get("analysis") == analysis)
                append(numbers, ("analysis", *columns), shown)
                append(self.results.folder / "analyses.csv", ANALYSES, [entry])
        gc.collect()  # models are in cycles with their optimizers' schedules


def analysis_id(command: str, run: Run, options: Mapping[str, Any]) -> str:
    """Of all that the numbers depend on."""
    content = json.dumps([command, run.id, options], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _short(value: Any) -> Any:
    """Six digits are enough for a plot, and keep files small enough to be committed."""
    return f"{value:.6g}" if isinstance(value, float) else value


def some(task: Task, split: str, count: int) -> Examples:
    """The first examples of a split: `clean` is GLUE dev, `adversarial` AdvGLUE dev.

    Raises:
        UserError: The task has no adversarial split.
    """
    if split == "train":
        return task.train[:count]
    if split == "clean":
        return task.test[:count]
    if not task.adversarial:
        raise UserError(f"{task.name} has no adversarial split; choose --split clean or train")
    return next(iter(task.adversarial.values()))[:count]
