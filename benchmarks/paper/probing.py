"""`python -m benchmarks.paper probe` and `dropout`: Figure 3 and Table 4 of the paper."""

from __future__ import annotations

import argparse
import csv
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.paper.analyses import INITIAL, Place, add_arguments, runs_of
from benchmarks.paper.arguments import at_least
from benchmarks.paper.methods import METHODS
from benchmarks.paper.runs import Run
from benchmarks.paper.vocabulary import prune
from rose_ops.finetune import UserError
from rose_ops.finetune.classifier import Encoded, load_model, predict
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.runtime import Runtime
from rose_ops.finetune.train import train

PROBING, DROPOUT = "probing", "dropout"
PROBING_COLUMNS = ("inoculated", "matthews", "training_accuracy", "n")
DROPOUT_COLUMNS = ("step", "inconsistent", "n")
PARTS = ("train", "inoculating", "test")
PAIR = "control_raising_lexical_content_the"
_ROSE = ("adamw", "rose-first", "rose-second", "rose-ensemble")
_BATCH = 64


def add_probing(parser: argparse.ArgumentParser) -> None:
    """The options of `probe`."""
    add_arguments(parser, [*_ROSE, "random-mask"])
    parser.set_defaults(seeds=[0, 1, 2, 3, 4])
    parser.add_argument("--pair", default=PAIR, help="name of the MSGS files in <data-dir>/msgs")
    parser.add_argument(
        "--inoculate",
        type=float,
        nargs="+",
        default=[0.0],
        help="shares of the training sentences that disambiguate; MSGS has 0, 0.001, 0.003 and 0.01",
    )
    parser.add_argument(
        "--examples", type=at_least(1), default=1000, help="test sentences, the first ones"
    )


def probe(args: argparse.Namespace) -> None:
    """Train on ambiguous sentences, and see which feature disambiguating ones are judged by."""
    if args.data_dir is None:
        raise UserError("probe needs --data-dir with a folder msgs: the data set is not on the hub")
    place = Place.of(args)
    sets = {x: read_msgs(args.data_dir, args.pair, x) for x in PARTS}
    test = sets["test"][: args.examples]
    name = f"msgs:{args.pair}"
    place.results.check_data(name, task_of_msgs(*sets.values()))
    for run in runs_of(args):
        run = replace(run, task=name)
        for share in args.inoculate:
            options = {"inoculated": share, "examples": args.examples}
            if not place.is_done(PROBING, run, options):
                training = inoculated(sets["train"], sets["inoculating"], share, run.seed)
                with place.recording(PROBING, run, options, PROBING_COLUMNS) as rows:
                    rows.append({"inoculated": share, **_probe(place, run, training, test)})


def task_of_msgs(training: Examples, validation: Examples, test: Examples) -> Task:
    """As tasks of GLUE are; none of it is in AdvGLUE."""
    return Task("msgs", ("0", "1"), training, validation, test)


def _probe(place: Place, run: Run, training: Examples, test: Examples) -> dict[str, Any]:
    """Train one run and judge it by disambiguating sentences, and by some that it was trained on."""
    task = task_of_msgs(training, Examples([], []), test)
    sets = {"test": test, "training": training[: len(test)]}
    trained = place.train(run, task, sets)
    predicted = {
        name: predict(trained.model, trained.encoder(x), place.runtime(run)).argmax(dim=-1).numpy()
        for name, x in sets.items()
    }
    return {
        "matthews": matthews(predicted["test"], np.array(test.labels)),
        "training_accuracy": float(np.mean(predicted["training"] == sets["training"].labels)),
        "n": len(test),
    }


def matthews(predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Matthews correlation of two binary vectors `[n]`: their Pearson correlation.

    0 where one of them is constant, by convention (as in scikit-learn).
    """
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def inoculated(training: Examples, extra: Examples, share: float, seed: int) -> Examples:
    """Training examples of which a share is replaced by as many of `extra`, drawn with a seed.

    Raises:
        UserError: There are not as many.
    """
    count = round(share * len(training))
    if not 0 <= count <= min(len(extra), len(training)):
        raise UserError(
            f"--inoculate {share:g}: expected a share from 0 to 1, and {count} inoculating sentences; "
            f"there are {len(extra)}"
        )
    generator = random.Random(seed)
    drawn = generator.sample(range(len(extra)), count)
    kept = generator.sample(range(len(training)), len(training) - count)
    return Examples(
        [training.texts[i] for i in kept] + [extra.texts[i] for i in drawn],
        [training.labels[i] for i in kept] + [extra.labels[i] for i in drawn],
    )


def read_msgs(folder: Path, pair: str, part: str) -> Examples:
    """Sentences with their linguistic labels. In `train` the surface feature agrees with them, in the
    others it is their opposite."""
    path = folder / "msgs" / f"{pair}.{part}.tsv"
    if not path.exists():
        raise UserError(f"{path} does not exist; probe expects {pair}.{{train,inoculating,test}}.tsv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        return Examples(
            [(row["sentence"],) for row in rows], [int(row["linguistic_label"]) for row in rows]
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path}: {error!r}; expected the columns sentence and linguistic_label (0 or 1)"
        ) from error


def add_dropout(parser: argparse.ArgumentParser) -> None:
    """The options of `dropout`."""
    add_arguments(parser, ["rose-first", "adamw"])
    parser.add_argument("--at", type=int, nargs="+", default=[200, 600, 2000, 4000], help="steps")
    parser.add_argument(
        "--examples", type=at_least(1), default=1000, help="training examples, the first ones"
    )


def dropout(args: argparse.Namespace) -> None:
    """Count, along training, the examples on which two passes with dropout disagree."""
    place = Place.of(args)
    for run in runs_of(args):
        at = sorted(x for x in args.at if 0 < x <= run.steps)
        if run.method == INITIAL or not at:
            raise UserError(
                f"{run.method} has {run.steps} steps, --at {' '.join(map(str, args.at))}; choose some "
                "that it has, or more with --set steps=..."
            )
        options = {"at": at, "examples": args.examples}
        if place.is_done(DROPOUT, run, options):
            continue
        with place.recording(DROPOUT, run, options, DROPOUT_COLUMNS) as rows:
            rows += _dropout(place, run, at, args.examples)


def _dropout(place: Place, run: Run, at: list[int], examples: int) -> list[dict[str, Any]]:
    """Train one run, and measure after the steps of `at`."""
    task, runtime = place.task(run), place.runtime(run)
    model, encoder = load_model(place.model_folder(run), task, run.max_length, run.seed, runtime)
    encoder = prune(model, encoder, [task.train])
    data, sample = encoder(task.train), encoder(task.train[:examples])
    rows = []

    def evaluate(step: int) -> None:
        if step in at:
            share = inconsistent(model, sample, runtime)
            rows.append({"step": step, "inconsistent": share, "n": len(sample.rows)})

    with tqdm(total=run.steps, desc=run.method, unit="step", mininterval=10) as bar:
        train(
            *(model, data, METHODS[run.method], run.settings(), runtime, run.seed),
            on_step=lambda record: bar.update(),
            evaluate=evaluate,
            evaluate_every=math.gcd(*at),
        )
    return rows


@torch.inference_mode()
def inconsistent(model: nn.Module, data: Encoded, runtime: Runtime) -> float:
    """Share of examples whose predictions in two passes with dropout differ.

    The model is left in evaluation mode, and training's random numbers as they were.
    """
    order = sorted(range(len(data.rows)), key=data.lengths.__getitem__)
    differ = 0
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train()
        for i in range(0, len(order), _BATCH):
            inputs, _ = data.batch(order[i : i + _BATCH])
            with runtime.autocast():
                first, second = (model(**inputs).logits.argmax(dim=-1) for _ in range(2))
            differ += int((first != second).sum())
        model.eval()
    return differ / len(order)
