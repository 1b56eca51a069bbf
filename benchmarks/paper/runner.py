"""`python -m benchmarks.paper run`: the study's runs, one after the other or side by side.

It survives: a run that has finished is in the results, whatever comes next; a stop loses the run in
progress at most, and `--resume` goes on with what is missing.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.device import Cpu, Cuda, version
from benchmarks.machine import describe
from benchmarks.paper.arguments import at_least
from benchmarks.paper.methods import METHODS, has_setting
from benchmarks.paper.results import Results
from benchmarks.paper.runs import GRID_LR, GRID_UPPER, TASKS, Run, checked, published, study
from benchmarks.paper.train import splits, train_run
from rose_ops.finetune import UserError, require
from rose_ops.finetune.data import Task, load_task
from rose_ops.finetune.models import MODELS, model_folder
from rose_ops.finetune.runtime import choose_runtime
from rose_ops.finetune.train import Diverged

RESULTS = Path(__file__).parent / "results"
_JOB = "ROSE_PAPER_JOB"  # set in processes that --jobs started


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    group = parser.add_argument_group("which runs (default: the small study, in order of use)")
    group.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2", "rte", "qnli"])
    group.add_argument("--models", nargs="+", default=list(MODELS), help="also folders or hub names")
    group.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    group.add_argument("--granularities", nargs="+", choices=("element", "tensor"),
                       default=["element", "tensor"])  # fmt: skip
    group.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    group.add_argument(
        "--preset",
        choices=("small", "published-base", "published-large"),
        default="small",
        help="published: the authors' settings, 10 epochs, tensor granularity",
    )
    group.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="replace settings, as lr=3e-5"
    )
    group.add_argument(
        "--sweep", nargs="*", metavar="NAME=A,B,...",
        help="every combination of the settings that a method has; without any: the paper's grids of "
        "lr and upper",
    )  # fmt: skip
    group = parser.add_argument_group("where and for how long")
    group.add_argument("--data-dir", type=Path, default=os.environ.get("ROSE_DATA_DIR") or None,
                       help="folder of the tasks (or ROSE_DATA_DIR); default: the hub")  # fmt: skip
    group.add_argument("--cache-dir", type=Path, help="of models; default: the user's cache")
    group.add_argument("--results", type=Path, default=RESULTS)
    group.add_argument("--resume", action="store_true", help="leave out what is finished")
    group.add_argument("--minutes", type=at_least(0, float), help="start no run after so many")
    group.add_argument("--device", default="cpu")
    group.add_argument("--threads", type=at_least(1), help="default: what torch chooses")
    group.add_argument("--jobs", type=at_least(1), default=1, help="processes side by side")
    group.add_argument("--list", action="store_true", help="print the runs and stop")


def run(args: argparse.Namespace) -> None:
    """Do the runs that `args` ask for."""
    runs = chosen(args)
    results = Results(args.results)
    if args.list:
        for one in runs:
            print(one.id, one.method, one.task, one.model, one.granularity, one.seed, one.preset)
        return
    if not os.environ.get(_JOB):
        if not args.resume and (there := results.finished() & {one.id for one in runs}):
            raise UserError(
                f"{len(there)} of these {len(runs)} runs are in {results.runs} already; pass --resume "
                "to leave them out, or choose another --results folder"
            )
        if orphans := results.drop_orphans():
            print(f"dropped {orphans} rows of unfinished runs from {results.curves}")
    if args.jobs > 1:
        _side_by_side(args.jobs)
    else:
        _one_after_the_other(runs, results, args)


def chosen(args: argparse.Namespace) -> list[Run]:
    """The runs in their order, with settings replaced and swept over.

    Raises:
        UserError: A setting that there is not, or a value that it cannot have.
    """
    found = [
        one
        for one in study(args.tasks, args.seeds, args.models)
        if one.method in args.methods and one.granularity in (*args.granularities, "none")
    ]
    if args.preset != "small":
        size = args.preset.removeprefix("published-")
        sizes = {task: len(task_of(task, args.data_dir).train) for task in args.tasks}
        found = [published(one, size, sizes[one.task]) for one in found]  # type: ignore[arg-type]
    found = [replace(one, **_replacements(args.set)) for one in found]
    if args.sweep is not None:
        for name, values in _axes(args.sweep).items():
            found = [swept for one in found for swept in _swept(one, name, values)]
    return [checked(one) for one in dict.fromkeys(found)]


def _swept(one: Run, name: str, values: Sequence[Any]) -> list[Run]:
    """A run for each value; one, where the method does not have the setting."""
    if not has_setting(one.method, name):
        return [replace(one, preset="sweep")]
    return [replace(one, **{name: value}, preset="sweep") for value in values]


def _axes(sweep: Sequence[str]) -> dict[str, list[Any]]:
    if not sweep:
        return {"lr": list(GRID_LR), "upper": list(GRID_UPPER)}
    axes = {}
    for item in sweep:
        name, _, values = item.partition("=")
        axes[name] = [_replacements([f"{name}={value}"])[name] for value in values.split(",")]
    return axes


def _replacements(settings: Sequence[str]) -> dict[str, Any]:
    """Fields of `Run` from `NAME=VALUE`, in the types that they have."""
    defaults = vars(Run("adamw", "sst2"))
    found = {}
    for item in settings:
        name, separator, text = item.partition("=")
        if not separator or name not in defaults or name in ("method", "task", "model"):
            raise UserError(
                f"{item!r} is no setting of a run; expected NAME=VALUE with one of "
                f"{', '.join(defaults)}"
            )
        kind = type(defaults[name])
        try:
            found[name] = kind(text)
        except ValueError as error:
            raise UserError(f"{item!r}: expected a value of type {kind.__name__}") from error
    return found


def _side_by_side(jobs: int) -> None:
    """The same command in several processes, which claim runs from each other."""
    command = [sys.executable, "-m", "benchmarks.paper", *sys.argv[1:], "--jobs", "1"]
    environment = {**os.environ, _JOB: "1"}
    processes = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise
    if any(codes):
        raise UserError(f"{sum(map(bool, codes))} of {jobs} processes failed; see above")


def _one_after_the_other(runs: Sequence[Run], results: Results, args: argparse.Namespace) -> None:
    """Do what is not finished. A run that diverges is said, and stops none of the others.

    Raises:
        UserError: Some diverged; they are not in the results.
    """
    prepare(args.threads)
    start, diverged = time.perf_counter(), 0
    cost = {one.id: _cost(one) for one in runs}
    done = results.finished()
    todo = [one for one in runs if one.id not in done]
    with tqdm(
        total=sum(cost[one.id] for one in todo), unit="step", unit_scale=True,
        desc=f"{len(todo)} runs", mininterval=0.5 if sys.stderr.isatty() else 60, smoothing=0.05,
    ) as bar:  # fmt: skip
        for one in todo:
            if args.minutes is not None and time.perf_counter() - start > 60 * args.minutes:
                bar.write(f"{args.minutes:g} minutes are over")
                break
            with results.claim(one) as mine:
                # Another process may have finished it since.
                if mine and one.id not in results.finished():
                    bar.set_postfix_str(f"{one.method} {one.task} {one.model} {one.seed}")
                    try:
                        _do(one, results, args)
                    except Diverged as error:
                        diverged += 1
                        bar.write(f"{one.id} {one.method} {one.task} {one.seed}: {error}")
            bar.update(cost[one.id])
    if diverged:
        raise UserError(f"{diverged} runs diverged (see above) and are not in {results.runs}")


def _do(one: Run, results: Results, args: argparse.Namespace) -> None:
    """One run, into the results."""
    start = time.perf_counter()
    runtime = choose_runtime(args.device, one.precision)
    where = machine(runtime.device)
    task = task_of(one.task, args.data_dir)
    results.check_data(one.task, task)
    folder = model_folder(one.model, args.cache_dir)
    trained = train_run(one, task, runtime, folder, splits(task, one.perturbed))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    used = {**where, "used_precision": runtime.precision, "date": date}
    results.add(one, trained, time.perf_counter() - start, used)
    del trained
    gc.collect()  # models are in cycles with their optimizers' schedules


def prepare(threads: int | None = None) -> None:
    """Threads, numerics and quiet libraries, before any kernel runs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging = require("transformers").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # denormals cost about as much as the rest


def _cost(one: Run) -> float:
    """About how long a run takes, in steps of AdamW on MiniLM."""
    size = 8.0 if one.model != "minilm" else 1.0
    return one.steps * METHODS[one.method].forwards * size * one.batch_size / 32


@cache
def task_of(name: str, data_dir: Path | None) -> Task:
    """A task, read once."""
    return load_task(name, data_dir)


@cache
def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a row was measured, see `benchmarks.machine.describe`."""
    on = Cuda(str(device)) if device.type == "cuda" else Cpu()
    return {**describe(on), "transformers": version("transformers"),
            "threads": torch.get_num_threads()}  # fmt: skip
