"""`python -m benchmarks.paper surfaces` and `interpolate`: Figures 1, 2 and 4 of the paper."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.paper import geometry
from benchmarks.paper.analyses import INITIAL, SPLITS, Place, add_arguments, runs_of, some
from benchmarks.paper.arguments import above_zero, at_least
from benchmarks.paper.runs import Run
from benchmarks.paper.train import Trained
from rose_ops.finetune import UserError
from rose_ops.finetune.data import Task

SURFACES, INTERPOLATION = "surfaces", "interpolation"
SURFACE_COLUMNS = ("alpha", "beta", "loss", "accuracy")
LINE_COLUMNS = ("alpha", "loss", "accuracy")


def add_surfaces(parser: argparse.ArgumentParser) -> None:
    """The options of `surfaces`."""
    add_arguments(parser, [INITIAL, "adamw", "rose-first", "rose-second", "rose-ensemble"])
    _add_measurement(parser)
    parser.add_argument("--points", type=at_least(2), default=51, help="on each side of the grid")
    parser.add_argument(
        "--reach", type=above_zero, default=0.25, help="the grid goes from -REACH to REACH"
    )
    parser.add_argument("--direction-seed", type=int, default=0, help="the same for all models")


def add_interpolation(parser: argparse.ArgumentParser) -> None:
    """The options of `interpolate`."""
    add_arguments(parser, ["rose-ensemble", "adamw"])
    _add_measurement(parser)
    parser.add_argument(
        "--points",
        type=at_least(1),
        default=51,
        help="from -0.5 to 1.5; both models (0 and 1) come on top",
    )


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=SPLITS, default="clean", help="what the loss is of")
    parser.add_argument(
        "--examples", type=at_least(1), default=256, help="of the split, the first ones"
    )


def surfaces(args: argparse.Namespace) -> None:
    """Train each run and measure the loss around it."""
    place = Place.of(args)
    options = {x: getattr(args, x) for x in ("split", "examples", "points", "reach", "direction_seed")}
    for run in runs_of(args):
        if place.is_done(SURFACES, run, options):
            continue
        task = place.task(run)
        with place.recording(SURFACES, run, options, SURFACE_COLUMNS) as rows:
            trained, measure = _trained(place, run, task, args)
            # The middle of an odd number of points is exactly 0, the model itself.
            grid = [float(x) for x in np.linspace(-args.reach, args.reach, args.points)]
            points = geometry.surface(trained.model, measure, grid, args.direction_seed)
            rows += tqdm(points, desc="surface", total=args.points**2, mininterval=10)


def interpolate(args: argparse.Namespace) -> None:
    """Train pairs of runs and measure the loss on the line between them.

    Raises:
        UserError: `--methods` are not two.
    """
    if len(args.methods) != 2:
        raise UserError(
            f"--methods {' '.join(args.methods)}; expected two, the one at 0 and the one at 1"
        )
    place = Place.of(args)
    runs = runs_of(args)
    grid = sorted({float(x) for x in np.linspace(-0.5, 1.5, args.points)} | {0.0, 1.0})
    for first in (x for x in runs if x.method == args.methods[0]):
        for second in (x for x in runs if x.method == args.methods[1] and _is_beside(x, first)):
            options = {x: getattr(args, x) for x in ("split", "examples", "points")}
            options |= {"second": second.method, "second_run": second.id}
            if place.is_done(INTERPOLATION, first, options):
                continue
            task = place.task(first)
            with place.recording(INTERPOLATION, first, options, LINE_COLUMNS) as rows:
                trained, measure = _trained(place, first, task, args)
                other, _ = _trained(place, second, task, args)
                ends = [geometry.weights(x.model) for x in (trained, other)]
                line = geometry.interpolation(trained.model, *ends, measure, grid)
                rows += tqdm(line, desc="line", total=len(grid), mininterval=10)


def _is_beside(run: Run, other: Run) -> bool:
    """Whether two runs are of one task, model, seed, and granularity as far as they have one."""
    same = all(getattr(run, x) == getattr(other, x) for x in ("task", "model", "seed"))
    granularities = {run.granularity, other.granularity} - {"none"}
    return same and len(granularities) < 2


def _trained(
    place: Place, run: Run, task: Task, args: argparse.Namespace
) -> tuple[Trained, Callable[[], tuple[float, float]]]:
    """The trained model, and what measures it as it is."""
    examples = some(task, args.split, args.examples)
    trained = place.train(run, task, {"measured": examples})
    data, runtime = trained.encoder(examples), place.runtime(run)

    def measure() -> Any:
        return geometry.mean_loss(trained.model, data, runtime)

    return trained, measure
