"""The commands `finetune` and `evaluate`, from parsed arguments to files."""

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from rose_ops.finetune import UserError, report, require
from rose_ops.finetune.classifier import Encoder, correct, load_model
from rose_ops.finetune.data import Examples, Task, load_task
from rose_ops.finetune.models import model_folder
from rose_ops.finetune.perturb import PERTURBATIONS, perturb
from rose_ops.finetune.recipes import METHODS, Settings
from rose_ops.finetune.runtime import Runtime, choose_runtime
from rose_ops.finetune.train import check_settings, train

_RECORD = "run.json"
# Of the validation split, for each evaluation along the way and each of its copies.
_ALONG = 300


def finetune(args: argparse.Namespace) -> None:
    """Train with each method and seed, measure, and write the run's folder."""
    start = time.perf_counter()
    runtime = prepare(args)
    settings = Settings(**{x.name: getattr(args, x.name) for x in fields(Settings)})
    check_settings(settings, [METHODS[x] for x in args.methods], runtime)
    output = args.output or Path("runs") / f"{args.task}-{datetime.now():%Y%m%d-%H%M%S}"
    if (output / _RECORD).exists():
        raise UserError(f"{output} already holds a run; choose another --output")
    task = load_task(args.task, args.data_dir, args.cache_dir)
    if args.epochs is not None:
        steps = max(1, round(args.epochs * (len(task.train) // args.batch_size)))
        settings = replace(settings, steps=steps)
    model_name = model_folder(args.model, args.cache_dir)
    measured = _Measured(
        final=measured_sets(task, args.evaluate_on),
        along=measured_sets(replace(task, validation=task.validation[:_ALONG]), "validation"),
        every=max(1, settings.steps // args.evaluations) if args.evaluations else None,
    )
    _announce(task, runtime, measured.final)
    outcomes: dict[str, dict[int, dict[str, list[bool]]]] = {x: {} for x in args.methods}
    runs: list[dict[str, Any]] = []
    made(output)
    for seed in dict.fromkeys(args.seeds):
        for name in args.methods:
            # Loaded anew with the same seed: the same initial weights for every method.
            model, encoder = load_model(model_name, task, args.max_length, seed, runtime)
            history, curve = _trained(name, model, encoder, task, settings, measured, runtime, seed)
            outcomes[name][seed] = {
                x: correct(model, encoder(test), runtime) for x, test in measured.final.items()
            }
            runs.append({"method": name, "seed": seed, "curve": curve, "history": history})
            if not args.no_models:
                _save(model, encoder, _model_folder(output, name, seed))
    summary, matched = report.summarise(outcomes), report.matched(runs, args.methods[0])
    record = {
        "arguments": {x: plain(y) for x, y in vars(args).items() if x != "run"},
        "settings": asdict(settings),
        "precision": runtime.precision,
        **report.environment(),
        "task": {
            "labels": task.labels,
            "sizes": {x: len(getattr(task, x)) for x in ("train", "validation", "test")},
            "source": task.source,
        },
        "summary": summary,
        "matched": matched,
        "seconds": time.perf_counter() - start,
        "runs": runs,
    }
    report.write_json(record, output / _RECORD)
    report.plot(summary, runs, _title(args, task, settings), output / "run.png")
    report.print_tables(summary, matched)
    for name in args.methods:
        times = sorted(x["seconds"] for run in runs if run["method"] == name for x in run["history"])
        print(f"{name}: {1000 * times[len(times) // 2]:.0f} ms per step (median)")
    print(textwrap.fill(report.reading(summary), 100))
    print(f"{record['seconds']:.0f} s in all; see {output / 'run.png'} and {output / _RECORD}")


def _announce(task: Task, runtime: Runtime, tests: Mapping[str, Examples]) -> None:
    print(
        f"{task.name}: {len(task.train)} training, {len(task.validation)} validation and "
        f"{len(task.test)} test examples; {runtime.precision} on {runtime.device}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, examples in tests.items():
        print(f"  {name}: {' | '.join(examples.texts[0])}")


@dataclass(frozen=True)
class _Measured:
    """What models are measured on: after training, and along the way after every so many steps."""

    final: dict[str, Examples]
    along: dict[str, Examples]
    every: int | None


def _trained(
    name: str,
    model: Any,
    encoder: Encoder,
    task: Task,
    settings: Settings,
    measured: _Measured,
    runtime: Runtime,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Train a model; the record of each step, and accuracies by set along the way."""
    along = {x: encoder(examples) for x, examples in measured.along.items()}
    curve: list[dict[str, float]] = []

    def evaluate(step: int) -> None:
        right = {x: correct(model, data, runtime) for x, data in along.items()}
        curve.append({"step": step, **{x: sum(y) / len(y) for x, y in right.items()}})

    with progress(f"{name}, seed {seed}", settings.steps) as show:
        history = train(
            model, encoder(task.train), METHODS[name], settings, runtime, seed, show,
            *((evaluate, measured.every) if measured.every else ()),
        )  # fmt: skip
    return history, curve


def evaluate(args: argparse.Namespace) -> None:
    """Measure the models of a run's folder again."""
    path = args.folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"could not read {path} ({error}); expected the output folder of a finetune run"
        ) from error
    runtime = prepare(args)
    trained = record["arguments"]
    data_dir = args.data_dir or (Path(trained["data_dir"]) if trained["data_dir"] else None)
    task = load_task(trained["task"], data_dir, args.cache_dir)
    tests = measured_sets(task, trained["evaluate_on"], args.perturbation_seed)
    outcomes: dict[str, dict[int, dict[str, list[bool]]]] = {}
    for run in record["runs"]:
        folder = _model_folder(args.folder, run["method"], run["seed"])
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: the run was made with --no-models")
        model, encoder = load_model(str(folder), task, trained["max_length"], run["seed"], runtime)
        right = {x: correct(model, encoder(test), runtime) for x, test in tests.items()}
        outcomes.setdefault(run["method"], {})[run["seed"]] = right
    summary = report.summarise(outcomes)
    arguments = {x: plain(y) for x, y in vars(args).items() if x != "run"}
    report.write_json(
        {"arguments": arguments, **report.environment(), "summary": summary},
        args.folder / "evaluation.json",
    )
    report.print_tables(summary)
    print(textwrap.fill(report.reading(summary), 100))


def made(folder: Path) -> Path:
    """The folder, which is there now.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; choose another one") from error
    return folder


def prepare(args: argparse.Namespace) -> Runtime:
    """Threads, numerics and quiet libraries; fails early where an extra is missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with ours
    for module in ("tqdm", "rich", "matplotlib", "scipy"):
        require(module)
    logging = require("transformers").utils.logging
    logging.set_verbosity_error()  # it warns of the new classifier, which is the point
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Activations and gradients underflow here, and denormals cost about as much as the rest. The
    # optimizer's masks do not depend on this mode. Before any kernel: its threads inherit it.
    torch.set_flush_denormal(True)
    return choose_runtime(args.device, args.precision)


def measured_sets(task: Task, split: str, seed: int = 0) -> dict[str, Examples]:
    """The clean examples, their perturbed copies, and AdvGLUE."""
    clean = getattr(task, split)
    sets = {"clean": clean}
    for kind in PERTURBATIONS:
        sets[kind] = Examples(perturb(clean.texts, kind, seed), clean.labels)
    if split == "test":  # what hyperparameters are chosen by must not be reported, too
        sets |= task.adversarial
    return sets


@contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar, and the function that shows the record of a step in it."""
    # A log gets a line now and then, a terminal a live bar.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with require("tqdm").tqdm(total=steps, desc=name, unit="step", mininterval=interval) as bar:

        def show(record: dict[str, Any]) -> None:
            shown = {"loss": f"{record['loss']:.3f}"}
            for quantity, style in (("kept", ".0%"), ("threshold", ".2g")):
                values = [x[quantity] for x in record["masks"].values()]
                if values:
                    texts = ("-" if x is None else format(x, style) for x in values)
                    shown[quantity] = "|".join(texts)
            bar.set_postfix(shown, refresh=False)
            bar.update()

        yield show


def _save(model: Any, encoder: Encoder, folder: Path) -> None:
    model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)


def _model_folder(output: Path, method: str, seed: int) -> Path:
    return output / f"{method}-seed{seed}"


def _title(args: argparse.Namespace, task: Task, settings: Settings) -> str:
    model = {"minilm": "MiniLM-L6", "mpnet": "MPNet-base"}.get(args.model, Path(args.model).name)
    return f"{model} on {task.name}: {settings.steps} steps of {args.batch_size}, upper={args.upper}"


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
