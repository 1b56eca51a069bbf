"""The command `tune`: learning rate, upper and gamma by successive halving, and by the presets.

Successive halving (Jamieson and Talwalkar, 2016; asynchronous: Li et al., 2020) trains many settings a
little and few of them to the end. optuna draws the settings (its tree-structured Parzen estimator) and
decides at each rung who goes on. What is maximised is the mean of the accuracies on the validation
split and on its perturbed copies. The published presets compete at equal cost: they are trained in
full, those of the task first, for as long as they have trained no more steps than the search may. The
test split and AdvGLUE are left for the comparison at the end, for which the best settings of both train
anew, with seeds that took no part in the choice.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rose_ops.finetune import UserError, report, require
from rose_ops.finetune.data import Examples, digest, load_task
from rose_ops.finetune.models import model_folder
from rose_ops.finetune.presets import PUBLISHED_GAMMA, candidates
from rose_ops.finetune.recipes import METHODS, Settings
from rose_ops.finetune.run import made, measured_sets, plain, prepare
from rose_ops.finetune.runtime import Runtime
from rose_ops.finetune.search import Choice, Scores, Search, Trainer, rungs
from rose_ops.finetune.train import check_settings

_RECORD = "tune.json"
_JOURNAL = "study.log"
_TITLES = {"search": "successive halving", "presets": "published presets"}
# What the values of a study depend on, besides the settings.
_ASKED = (
    *("task", "model", "method", "max_length", "examples"),
    *("lr", "upper", "gamma", "reduction", "search_seed"),
)


def tune(args: argparse.Namespace) -> None:
    """Search, train presets at equal cost, compare the best of both, and write the folder."""
    runtime = prepare(args)
    require("optuna", extra="tune")
    method = METHODS[args.method]
    settings = _settings(args, runtime)
    task = load_task(args.task, args.data_dir, args.cache_dir)
    held_out = {x: y[: args.examples] for x, y in measured_sets(task, "validation").items()}
    tests = measured_sets(task, "test")
    output = made(args.output or Path("runs") / f"tune-{args.task}-{args.method}")
    model = model_folder(args.model, args.cache_dir)
    trainer = Trainer(task, model, method, settings, args.max_length, runtime)
    searches = _open_searches(args, settings, runtime, output / _JOURNAL, digest(task))
    budget = max(1, round(args.budget * args.steps))
    print(
        f"{args.method} on {task.name}: {budget} training steps for each of search and presets; "
        f"{len(held_out['clean'])} validation examples, clean and perturbed"
    )
    _search(searches["search"], trainer, args, held_out, budget)
    _try_presets(searches["presets"], trainer, args, held_out, budget)
    seeds = list(dict.fromkeys(args.seeds))
    best = {kind: search.best for kind, search in searches.items()}
    outcome = {
        kind: {
            "choice": choice,
            "validation": value,
            "steps": searches[kind].spent,
            "trials": len(searches[kind].study.trials),
            "test": [_confirmed(searches["search"], trainer, choice, x, tests) for x in seeds],
        }
        for kind, (choice, value) in best.items()
    }
    record = {
        "arguments": {x: plain(y) for x, y in vars(args).items() if x != "run"},
        "settings": asdict(settings),
        "precision": runtime.precision,
        **report.environment(),
        "outcome": outcome,
        "trials": {kind: _trials(search) for kind, search in searches.items()},
    }
    report.write_json(record, output / _RECORD)
    _print(outcome, seeds)
    print(f"see {output / _RECORD}; the same command with a larger --budget goes on from there")


def _settings(args: argparse.Namespace, runtime: Runtime) -> Settings:
    """All that is not searched, with gamma as the presets have it.

    Raises:
        UserError: A range is none, or has values that the optimizer refuses; or the comparison would
            use the search's seed.
    """
    if METHODS[args.method].order is None:
        raise UserError(f"--method {args.method} has no masks to tune; choose one that has")
    if args.search_seed in args.seeds:
        raise UserError(
            f"--seeds {' '.join(map(str, args.seeds))} and --search-seed {args.search_seed}; expected "
            "seeds for the comparison that had no part in the search"
        )
    fixed = {x.name: getattr(args, x.name) for x in fields(Settings)}
    for name in ("lr", "upper", "gamma"):
        low, high = fixed[name]
        if not low < high:
            raise UserError(
                f"--{name} {low:g} {high:g}; expected the lower end first, then a higher one"
            )
    for end in range(2):
        ends = {name: fixed[name][end] for name in ("lr", "upper", "gamma")}
        check_settings(Settings(**fixed | ends), [METHODS[args.method]], runtime)
    return Settings(**fixed | {"lr": args.lr[0], "upper": args.upper[0], "gamma": PUBLISHED_GAMMA})


def _open_searches(
    args: argparse.Namespace, settings: Settings, runtime: Runtime, journal: Path, data: str
) -> dict[str, Search]:
    """The studies of the search and of the presets, new or as a stopped run has left them."""
    optuna = require("optuna", extra="tune")
    asked = {x: str(getattr(args, x)) for x in _ASKED}
    asked |= {"data": data, "precision": runtime.precision, "device": runtime.device.type}
    asked |= {x: str(y) for x, y in asdict(settings).items() if x not in ("lr", "upper", "gamma")}

    def sampler(trials: int) -> Any:
        return optuna.samplers.TPESampler(seed=(args.search_seed + trials) % 2**32)

    stops = rungs(args.steps, args.reduction)
    halving = optuna.pruners.SuccessiveHalvingPruner(min(stops, default=1), args.reduction)
    return {
        "search": Search("search", journal, asked, sampler, halving),
        "presets": Search("presets", journal, asked, sampler, optuna.pruners.NopPruner()),
    }


def _search(
    search: Search,
    trainer: Trainer,
    args: argparse.Namespace,
    sets: dict[str, Examples],
    budget: int,
) -> None:
    """Trials until the budget is spent; the last may go beyond it, by less than one training."""

    def choose(trial: Any) -> Choice:
        choice = {
            "lr": trial.suggest_float("lr", *args.lr, log=True),
            "upper": trial.suggest_float("upper", *args.upper),
        }
        if trainer.method.order == "ensemble":
            choice["gamma"] = trial.suggest_float("gamma", *args.gamma)
        return choice

    while search.spent < budget:
        before = search.spent
        search.run(trainer, choose, sets, args.search_seed, rungs(args.steps, args.reduction))
        _say("search", search, search.spent - before, budget)


def _try_presets(
    search: Search,
    trainer: Trainer,
    args: argparse.Namespace,
    sets: dict[str, Examples],
    budget: int,
) -> None:
    """Published presets in full, those of the task first, within the budget; one in any case."""
    order = trainer.method.order
    assert order is not None  # `tune` has seen to it
    for lr, upper in candidates(order, args.task):
        choice: Choice = {"lr": lr, "upper": upper}
        if choice in search.finished:
            continue
        if search.finished and search.spent + args.steps > budget:
            break
        search.run(trainer, _always(choice), sets, args.search_seed)
        _say("presets", search, args.steps, budget)


def _always(choice: Choice) -> Callable[[Any], Choice]:
    return lambda trial: choice


def _say(kind: str, search: Search, steps: int, budget: int) -> None:
    """A line on the last trial."""
    trial = search.study.trials[-1]
    value = "" if trial.value is None else f", {100 * trial.value:.1f} on validation"
    print(f"{kind}: {steps} steps{value}, {trial.state.name.lower()}; {search.spent} of {budget}")


def _confirmed(
    search: Search, trainer: Trainer, choice: Choice, seed: int, sets: dict[str, Examples]
) -> Scores:
    """Accuracies on the test sets with a fresh seed, from the journal if they are there."""
    key = f"test of {sorted(choice.items())}, seed {seed}"
    if key not in search.study.user_attrs:
        search.study.set_user_attr(key, trainer(choice, seed, sets))
    scores: Scores = search.study.user_attrs[key]
    return scores


def _trials(search: Search) -> list[dict[str, Any]]:
    """All trials, as JSON has them."""
    kept = ("choice", "steps", "scores", "ended")
    return [
        {"state": x.state.name, "value": x.value, **{y: x.user_attrs.get(y) for y in kept}}
        for x in search.study.trials
    ]


def _print(outcome: dict[str, dict[str, Any]], seeds: list[int]) -> None:
    """The best of both, on the test sets."""
    console = require("rich.console").Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    table = require("rich.table").Table(
        "best of",
        title=f"Accuracy in percent on the test sets, {len(seeds)} seeds without a part in the choice",
        title_justify="left",
    )
    sets = list(next(iter(outcome.values()))["test"][0])
    for name in ("settings", "steps", "validation", *sets):
        table.add_column(name, justify="right" if name != "settings" else "left")
    for kind, found in outcome.items():
        choice = ", ".join(f"{x} {y:.2g}" for x, y in found["choice"].items())
        of_sets = [_spread([scores[s] for scores in found["test"]]) for s in sets]
        value = f"{100 * found['validation']:.1f}"
        table.add_row(_TITLES[kind], choice, str(found["steps"]), value, *of_sets)
    console.print(table)


def _spread(values: list[float]) -> str:
    """Mean in percent, and standard deviation where there are several."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"
